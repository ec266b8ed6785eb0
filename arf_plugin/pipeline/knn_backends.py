"""The ways to search a pool: exact blocked search, a faiss index, and a clip-retrieval service.

All return pool rows and cosines, best first, ties by ascending row. Where the pool's vectors are at hand, cosines are
computed from them and not taken from an approximate index.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.errors import FlagError, MissingDependencyError, PoolError, ServiceError
from arf_plugin.files import content_digest, list_files
from arf_plugin.flags import check_service
from arf_plugin.pipeline.datacomp import DataComp
from arf_plugin.pipeline.embeddings import Embeddings
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.index import IndexFolder, check_found, check_vectors, open_index
from arf_plugin.pipeline.knn import block_sizes, exact_search
from arf_plugin.pipeline.replies import REPLY_COLUMNS, Replies

if TYPE_CHECKING:
    from arf_plugin.pipeline.knn_service import KnnClient

CANDIDATES_PER_NEIGHBOUR = 4
_RANKED_AT_ONCE = 256  # queries


@dataclass(frozen=True)
class Search:
    """How to search: the flags of ``arf retrieve``, by name.

    Attributes:
        backend: ``exact``, ``faiss`` or ``service``.
        memory: bytes that exact search may allocate; see :func:`arf_plugin.pipeline.knn.block_sizes`.
        index, search_parameters, candidates: of ``faiss``; see :class:`FaissBackend`.
        service_url, service_index, service_threads, service_timeout, service_patience: of ``service``; see
            :class:`arf_plugin.pipeline.knn_service.KnnClient`.
    """

    backend: str = "exact"
    memory: int = 2**30
    index: Path | None = None
    search_parameters: str | None = None
    candidates: int | None = None
    service_url: str | None = None
    service_index: str | None = None
    service_threads: int = 4
    service_timeout: float = 60.0
    service_patience: float = 300.0

    def __post_init__(self) -> None:
        waits = (self.service_timeout, self.service_patience)
        check_service("--service", self.service_url, *waits, "http://127.0.0.1:1234")
        if self.service_index and not self.service_url:
            raise FlagError("--service-index needs --backend service and --service-url.")
        if (self.backend == "service") != bool(self.service_url):
            raise FlagError("--backend service and --service-url belong together: give both, or neither.")
        if self.backend != "faiss" and (self.index or self.search_parameters or self.candidates):
            raise FlagError("--index, --search-parameters and --candidates are for --backend faiss.")

    def pool(self, folder: Path | None, queries: Embeddings, out: Path) -> Embeddings:
        """Opens a pool for this search: an embedding folder, DataComp's, or an index folder if that will do.

        Raises:
            FlagError: without a folder, unless a service is to say what it has found (which will be in ``out``).
        """
        if folder is None:
            if self.backend != "service":
                raise FlagError("--pool is missing. Only a service's hits can do without: --backend service")
            return Replies(out, queries=queries)
        index = IndexFolder(folder)
        if list_files(folder / "img_emb", ".npy"):
            return Embeddings(folder)
        if DataComp.is_at(folder):
            return DataComp(folder, queries=queries)
        return index if index.path.exists() and self.backend != "exact" else Embeddings(folder)

    def check(self) -> None:
        """Finds out what would stop the search, long before there is anything to search.

        Raises:
            MissingDependencyError: without the library that the back end needs.
            PoolError: if the index that was named is not one.
            ServiceError: if no service answers, or not with the index that was named.
        """
        if self.service_url:
            self.client().check_index()
        elif self.index is not None:
            open_index(_index_file(self.index))

    def client(self) -> KnnClient:
        """A client of the service.

        Raises:
            MissingDependencyError: without requests.
        """
        try:
            from arf_plugin.pipeline.knn_service import KnnClient
        except ImportError as cause:
            name = cause.name or "requests"
            raise MissingDependencyError(name, "arf retrieve --backend service", "retrieval") from None
        limits = (self.service_threads, self.service_timeout, self.service_patience)
        return KnnClient(self.service_url or "", self.service_index, *limits)

    def open(self, pool: Embeddings, k: int) -> Backend:
        """Returns the back end for a pool and k neighbours per query, at most the pool's rows."""
        if isinstance(pool, Replies):
            return ReplyBackend(self, pool, k)
        return _BACKENDS[self.backend](self, pool, k)


class Backend(ABC):
    """A way to search a pool, as :meth:`Search.open` makes it.

    Attributes:
        queries_at_once: queries per call of :meth:`search`.
        queries_per_shard: queries after which hits are saved; None for a whole file.
    """

    queries_at_once: int = 1024
    queries_per_shard: int | None = None

    def __init__(self, how: Search, pool: Embeddings, k: int) -> None:
        self.how, self.pool, self.k = how, pool, k
        self.has_vectors = not isinstance(pool, IndexFolder)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns, as JSON, what determines the hits beside queries and pool."""

    @abstractmethod
    def prepare(self, probe: np.ndarray, execution: Execution) -> None:
        """Opens what is searched and checks it with one query [d]."""

    @abstractmethod
    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k nearest rows of the pool for unit vectors [n, d].

        Returns:
            Rows [n, k] int64 and cosines [n, k] fp32, best first.
        """

    def begin(self, probe: np.ndarray, execution: Execution) -> None:
        """Prepares for :meth:`attempt`."""
        self.prepare(probe, execution)

    def attempt(self, queries: np.ndarray) -> float:
        """Does a part of a search, to see how long one takes; returns how large a part."""
        self.search(queries)
        return 1.0

    def described(self, rows: np.ndarray) -> dict[str, Any]:
        """Columns, by name, of what the search itself has to say of rows [n], to be kept with the hits."""
        return {}


class ExactBackend(Backend):
    """Compares every query with every vector of the pool; see :func:`arf_plugin.pipeline.knn.exact_search`."""

    def __init__(self, how: Search, pool: Embeddings, k: int) -> None:
        super().__init__(how, pool, k)
        self.queries_at_once, self._pool_block = block_sizes(how.memory, pool.dimension, k)

    def config(self) -> dict[str, Any]:
        """The name alone."""
        return {"backend": "exact"}

    def prepare(self, probe: np.ndarray, execution: Execution) -> None:
        """Picks the device and checks all vectors of the pool."""
        self.begin(probe, execution)
        for file in self.pool.files:
            file.check_unit()

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """In blocks of the pool."""
        return exact_search(queries, self._blocks(), self.k, self._device)

    def begin(self, probe: np.ndarray, execution: Execution) -> None:
        """Picks the device."""
        self._device = execution.torch_device()

    def attempt(self, queries: np.ndarray) -> float:
        """Searches a few blocks of the pool."""
        blocks = list(itertools.islice(self._blocks(), 8))
        exact_search(queries, blocks, self.k, self._device)
        return sum(len(vectors) for _, vectors in blocks) / self.pool.rows

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        return (block for file in self.pool.files for block in file.blocks(self._pool_block))


class FaissBackend(Backend):
    """Searches a memory-mapped faiss index whose row i is row i of the pool.

    ``index`` is the index, or its folder; ``image.index`` of the pool if that is an index folder.
    ``search_parameters`` are written as faiss does, such as ``nprobe=64``. An approximate index is asked for
    ``candidates`` hits per query, four times k by default, which are ranked again on the pool's vectors if it has them.
    """

    def __init__(self, how: Search, pool: Embeddings, k: int) -> None:
        super().__init__(how, pool, k)
        self._path = _index_file(how.index or pool.folder, pool.modality)
        if not self._path.is_file():
            raise PoolError(
                f"{self._path} does not exist. Expected a faiss index; build one with: arf index --embeddings "
                f"{pool.folder} --out DIR, and name it with --index DIR."
            )

    def config(self) -> dict[str, Any]:
        """Index and settings."""
        return {
            "backend": "faiss",
            "index": content_digest([self._path]),
            "parameters": self.how.search_parameters,
            "candidates": self.how.candidates,
            "ranked_on_vectors": self.has_vectors,
        }

    def prepare(self, probe: np.ndarray, execution: Execution) -> None:
        """Opens the index and compares it with pool and query."""
        index = open_index(self._path, self.pool.rows, self.pool.folder)
        import faiss

        if index.d != len(probe):
            raise PoolError(
                f"{self._path} holds vectors of dimension {index.d}, the queries have {len(probe)}. Embed both with "
                "the same model."
            )
        if self.has_vectors:
            check_vectors(index, self._path, self.pool)
        if parameters := self.how.search_parameters:
            space: Any = faiss.ParameterSpace()
            try:
                space.set_index_parameters(index, parameters)
            except RuntimeError as cause:
                raise FlagError(
                    f"--search-parameters {parameters}: faiss cannot set that for this kind of index "
                    f"({type(index).__name__}); expected names such as nprobe=64 (IVF) or efSearch=200 (HNSW)."
                ) from cause
        self._index = index
        self._rerank = self.has_vectors and not isinstance(index, faiss.IndexFlat)

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See the base class."""
        queries, k, wanted = np.ascontiguousarray(queries, np.float32), self.k, self.k
        if self._rerank:
            wanted = min(max(k, self.how.candidates or CANDIDATES_PER_NEIGHBOUR * k), self.pool.rows)
        similarities, rows = self._index.search(queries, wanted)
        check_found(rows, similarities, self.pool.rows, self._path)
        found = (rows >= 0).sum(axis=1)
        if (found < k).any():
            raise PoolError(
                f"{self._path} found {found.min()} neighbours for a query, {k} were asked for: it looks at too few of "
                "its vectors. Let it look at more, with --search-parameters nprobe=64 (IVF) or efSearch=200 (HNSW), or "
                "ask for fewer with --k."
            )
        if self._rerank:
            similarities = _cosines(self.pool, queries, rows)
        return _in_order(rows, similarities, k)


class ServiceBackend(Backend):
    """Asks a clip-retrieval service, whose index was built from the pool, and finds its hits there by their keys."""

    queries_per_shard = 1024  # some tens of seconds

    def __init__(self, how: Search, pool: Embeddings, k: int) -> None:
        super().__init__(how, pool, k)
        self._client = how.client()
        self.queries_at_once = self.queries_per_shard

    def config(self) -> dict[str, Any]:
        """The index's name; the service may move, but its index must not change."""
        return {"backend": "service", "index": self.how.service_index, "ranked_on_vectors": self.has_vectors}

    def prepare(self, probe: np.ndarray, execution: Execution) -> None:
        """Checks the service, and that it holds this pool's vectors."""
        self._read_keys()
        hits = self._client.check(probe, self.k)
        rows = self._rows([hit.key for hit in hits])
        if not self.has_vectors:
            return
        stored = self.pool.vectors(rows).astype(np.float32) @ probe.astype(np.float32)
        said = np.array([hit.similarity for hit in hits], np.float32)
        if np.abs(stored - said).mean() > 0.1:  # compressed indexes are off by less
            raise ServiceError(
                f"The service gives a pair the similarity {said[0]:.3f} ({hits[0].key!r}), the vectors of "
                f"{self.pool.folder} give {stored[0]:.3f}: its index holds other vectors. Was it built with another "
                "model, or from texts? Serve an index of this folder: arf index"
            )

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See the base class."""
        answers = self._client.search(queries, self.k)
        rows = self._rows([hit.key for hits in answers for hit in hits]).reshape(len(queries), self.k)
        if self.has_vectors:
            similarities = _cosines(self.pool, queries, rows)
        else:
            similarities = np.array([[hit.similarity for hit in hits] for hits in answers], np.float32)
        return _in_order(rows, similarities, self.k)

    def _read_keys(self) -> None:
        """Reads the pool's keys, which must differ: which of two rows is meant could not be told."""
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = [self.pool.columns(file, ["image_path"])["image_path"] for file in self.pool.files]
        # One Arrow array takes a few bytes per key beyond its characters; a dict takes a hundred.
        keys = pa.chunked_array([c.cast(pa.large_string()) for c in columns]).combine_chunks()
        if keys.null_count:
            raise PoolError(
                f"{self._where(pc.index(keys.is_null(), True).as_py())} has no 'image_path' (the sample's key), so a "
                "hit cannot be found in the pool. Embed the pool again, with: arf embed, or clip-retrieval inference"
            )
        if pc.count_distinct(keys).as_py() < len(keys):
            counts = pc.value_counts(keys)
            key = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
            one, two = pc.indices_nonzero(pc.equal(keys, key)).to_pylist()[:2]
            raise PoolError(
                f"The key {key.as_py()!r} occurs twice in the pool ({self._where(one)} and {self._where(two)}), and "
                "the service names pairs by their key alone. Search without the service (--backend exact or faiss), "
                "which goes by row, or give the pool's samples unique keys."
            )
        self._keys = keys

    def _where(self, row: int) -> str:
        file = next(file for file in self.pool.files if row < file.first + file.rows)
        return f"{file.metadata}, row {row - file.first}"

    def _rows(self, keys: Sequence[str]) -> np.ndarray:
        """The pool's rows [n] of keys."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = pc.index_in(pa.array(keys, pa.large_string()), value_set=self._keys)
        if found.null_count:
            key = keys[pc.index(found.is_null(), True).as_py()]
            raise ServiceError(
                f"The service names the pair {key!r}, which is not among the {len(self._keys)} keys of "
                f"{self.pool.folder} (the first being {self._keys[0].as_py()!r}). Give the folder that its index was "
                "built from with --pool, or choose another index with --service-index."
            )
        rows: np.ndarray = found.to_numpy().astype(np.int64)
        return rows


class ReplyBackend(Backend):
    """Asks a clip-retrieval service whose pool is not at hand: its hits say what they are, and where."""

    queries_per_shard = queries_at_once = ServiceBackend.queries_per_shard

    def config(self) -> dict[str, Any]:
        """The index's name; the service may move, but its index must not change."""
        return {"backend": "service", "index": self.how.service_index, "replies": True}

    def prepare(self, probe: np.ndarray, execution: Execution) -> None:
        """Checks the service."""
        self._client = self.how.client()
        self._client.wants = "url"
        self._client.check(probe, self.k)
        self._seen: dict[int, Any] = {}

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See the base class."""
        answers = self._client.search(queries, self.k)
        self._seen = {hit.row: hit for hits in answers for hit in hits}
        rows = np.array([[hit.row for hit in hits] for hits in answers], np.int64)
        return _in_order(rows, np.array([[hit.similarity for hit in hits] for hits in answers]), self.k)

    def described(self, rows: np.ndarray) -> dict[str, Any]:
        """What the latest search's hits said."""
        said = [self._seen[row]._asdict() for row in rows.tolist()]
        return {column: [one[name] for one in said] for column, name in REPLY_COLUMNS.items()}


_BACKENDS: dict[str, type[Backend]] = {
    "exact": ExactBackend,
    "faiss": FaissBackend,
    "service": ServiceBackend,
}


def _index_file(path: Path, modality: str = "image") -> Path:
    """The index that a path names: a file, or that of a modality in an index folder."""
    return path / f"{modality}.index" if path.is_dir() else path


def _in_order(rows: np.ndarray, similarities: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts hits [n, m] to the k best, ties by ascending row."""
    order = np.lexsort((rows, -similarities), axis=1)[:, :k]
    return (
        np.take_along_axis(rows, order, axis=1).astype(np.int64),
        np.take_along_axis(similarities, order, axis=1).astype(np.float32),
    )


def _cosines(pool: Embeddings, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cosines [n, m] of queries [n, d] and candidate rows [n, m], -1 for none, from the pool's stored vectors."""
    similarities = np.full(rows.shape, -np.inf, np.float32)
    for start in range(0, len(queries), _RANKED_AT_ONCE):
        part = slice(start, start + _RANKED_AT_ONCE)
        needed, inverse = np.unique(np.maximum(rows[part], 0), return_inverse=True)
        vectors = pool.vectors(needed).astype(np.float32)[inverse.reshape(rows[part].shape)]
        found = np.einsum("nd,nmd->nm", queries[part].astype(np.float32), vectors)
        similarities[part] = np.where(rows[part] >= 0, found, -np.inf)
    return similarities
