"""faiss indexes: the stage that builds one of an embedding folder, index folders as pools, and what is checked.

``image.index`` (or ``text.index``) holds the vectors, inner product, in the order of the embedding folder;
``metadata/*.parquet`` are the folder's own. That is clip-retrieval's layout: its service can serve the result as it is.

An index of others is believed as far as its ids are the rows of the pool, of which it says nothing itself. It may carry
ids of its own (IndexIDMap, ids in inverted lists), or hold the vectors in another order: both would give each query the
pairs of others, and ids beyond the pool would read memory that is not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arf_plugin.errors import FlagError, MissingDependencyError, PoolError
from arf_plugin.files import content_digest, digest, list_files, replacing, write_json
from arf_plugin.pipeline.embeddings import ORIGIN, EmbeddingFile, Embeddings
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import count_rows
from arf_plugin.untrusted import printable, require_regular

BLOCK = 65536
TRAINING_ROWS = 1_000_000  # every n-th vector, so that there are no more
SAMPLED = 2048  # rows that are compared; all of a pool that has no more
_WRAPPED = ("index", "base_index", "refine_index", "index_ivf", "storage")
_ROUNDING = 2e-3  # distance of unit vectors; fp16 rounds by less
_AGAIN = "Build the index of this folder again with: arf index"


@dataclass
class IndexStage(Stage):
    """Builds one index, of a kind in faiss's description, such as ``HNSW32`` or ``OPQ64_128,IVF4096,PQ64x8``."""

    embeddings: Embeddings
    factory: str = "Flat"
    name = "index"
    unit = "vectors"

    def config(self) -> dict[str, Any]:
        """Factory string and vectors."""
        return {
            "factory": self.factory,
            "modality": self.embeddings.modality,
            "embeddings": digest(self.embeddings.fingerprint()),
        }

    def plan(self) -> list[Shard]:
        """A single shard: faiss builds an index as a whole."""
        return [Shard.counted(0, None, self.embeddings.rows)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """The index, and the metadata of its rows."""
        metadata = [self.out / "metadata" / file.metadata.name for file in self.embeddings.files]
        return [self.out / f"{self.embeddings.modality}.index", *metadata]

    def disk(self, shards: list[Shard]) -> float | None:
        """The vectors in fp32, of an index that does not compress them."""
        return 4.0 * self.embeddings.dimension * self.embeddings.rows if self.factory == "Flat" else None

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Trains the index if its kind needs it, and adds all vectors."""
        faiss = _faiss("arf index")
        embeddings = self.embeddings
        try:
            index = faiss.index_factory(embeddings.dimension, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as cause:
            raise FlagError(f"--factory {self.factory}: faiss does not know it ({cause}).") from cause
        if not index.is_trained:
            step = -(-embeddings.rows // TRAINING_ROWS)
            parts = [file.load()[-file.first % step :: step].astype(np.float32) for file in embeddings.files]
            sample = np.concatenate(parts)
            try:
                index.train(sample)
            except RuntimeError as cause:
                raise PoolError(
                    f"faiss cannot train {self.factory!r} on {len(sample)} vectors: {cause}\n"
                    "Take a smaller index, or Flat."
                ) from cause
        for file in embeddings.files:
            for _, vectors in file.blocks(BLOCK, unit=True):
                try:
                    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
                except RuntimeError as cause:  # of an IDMap, which wants ids; these are to be the row numbers
                    raise FlagError(
                        f"--factory {self.factory}: faiss cannot add vectors to it ({cause})."
                    ) from cause
                advance(len(vectors))
            with replacing(self.out / "metadata" / file.metadata.name) as temporary:
                shutil.copyfile(file.metadata, temporary)
        if index.ntotal != embeddings.rows:
            raise PoolError(
                f"The index has {index.ntotal} vectors, {embeddings.folder} has {embeddings.rows} rows."
            )
        path = self.artifacts([shard])[0]
        with replacing(path) as temporary:
            try:
                faiss.write_index(index, str(temporary))
            except (RuntimeError, TypeError) as cause:  # a full disk; a name that is not UTF-8
                raise OSError(f"{path} cannot be written: {cause}") from cause
        return Outcome(samples=embeddings.rows, kept=embeddings.rows)

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Hands the model's identity on."""
        if self.embeddings.model:
            write_json(self.out / ORIGIN, {"model": self.embeddings.model})
        return {"factory": self.factory, "dimension": self.embeddings.dimension}


@dataclass(frozen=True)
class IndexFolder(Embeddings):
    """An index folder: its rows have metadata, and their vectors come out of the index.

    A compressed index gives them back with its own error. Its files are those of the metadata, with the index in the
    place of the vectors: they cannot be loaded.
    """

    @property
    def path(self) -> Path:
        """The faiss index."""
        return self.folder / f"{self.modality}.index"

    @cached_property
    def index(self) -> Any:
        """The faiss index; see :func:`open_index`."""
        return open_index(self.path, self.rows, self.folder / "metadata")

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return int(self.index.d)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Restores vectors [n, d] of the folder's rows [n], in any order."""
        if not len(rows):
            return np.zeros((0, self.dimension), np.float32)
        try:
            return reconstruct(self.index, rows)
        except RuntimeError as cause:
            raise PoolError(
                f"{self.path} cannot give its vectors back ({str(cause)[:200]}). Give the embedding folder that it was "
                "built from with --pool, and this folder with --index."
            ) from cause

    @cached_property
    def files(self) -> list[EmbeddingFile]:
        """The metadata files that hold at least one row.

        Raises:
            PoolError: if there are none.
        """
        files, first = [], 0
        for path in list_files(self.folder / "metadata", ".parquet"):
            rows = count_rows(path, PoolError)
            if rows:
                files.append(EmbeddingFile(self.path, path, first, rows))
                first += rows
        if not files:
            raise PoolError(
                f"{self.folder} has no metadata/*.parquet with rows. Expected an embedding folder (arf embed, "
                "clip-retrieval inference) or an index folder (arf index, clip-retrieval index)."
            )
        return files

    def fingerprint(self) -> list[Any]:
        """Contents of the index and of the metadata."""
        paths = [self.path, *(file.metadata for file in self.files)]
        return [[path.name, content_digest([path])] for path in paths]


def open_index(path: Path, rows: int | None = None, pool: Path | None = None) -> Any:
    """Maps a faiss index into memory.

    Args:
        path: the index.
        rows: how many its pool has; None does not ask whether its ids are theirs.
        pool: for messages.

    Raises:
        MissingDependencyError: without faiss.
        PoolError: if there is none, or one that measures something else than inner products, or of another pool.
    """
    faiss = _faiss("Searching an index")
    require_regular(path, PoolError)
    if not path.is_file():
        raise PoolError(f"{path} does not exist. Expected a faiss index, as written by: arf index")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except Exception as cause:  # of faiss's own, and of names that it cannot take
        raise PoolError(
            f"{path} is not a faiss index, or damaged: {printable(str(cause))[:200]}. Build it again with: arf index"
        ) from cause
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise PoolError(
            f"{path} measures distances (faiss metric {index.metric_type}); expected inner product. Build it again "
            "with: arf index, or clip-retrieval index"
        )
    if rows is not None:
        if index.ntotal != rows:
            raise PoolError(
                f"{path} has {index.ntotal} vectors, {pool} has {rows} rows; expected one for one. {_AGAIN}"
            )
        check_row_ids(index, path)
    return index


def _faiss(what: str) -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingDependencyError("faiss", what, "retrieval") from None
    return faiss


def check_row_ids(index: Any, path: Path) -> None:
    """Checks that the ids of an index, and of all that it wraps, are 0, 1, 2 and so on.

    Raises:
        PoolError: for other ids, and for parts of different lengths.
    """
    import faiss

    for layer in _layers(index):
        if layer.ntotal != index.ntotal:
            raise PoolError(
                f"{path} is damaged: it has {index.ntotal} vectors, a part of it {layer.ntotal}. {_AGAIN}"
            )
        if isinstance(layer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
            ids = faiss.vector_to_array(layer.id_map)
            if not np.array_equal(ids, np.arange(layer.ntotal)):
                raise _foreign(path, layer, ids)
        if isinstance(layer, faiss.IndexIVF):
            layer.make_direct_map(False)  # one that came with the file would be believed
            _check_lists(layer, path)


def check_vectors(index: Any, path: Path, pool: Embeddings) -> None:
    """Compares vectors of an index, whose ids have been checked, with those of its pool: all, or some of each file.

    A compressed index gives back what its compression made of a vector. That must be as near to the stored vector as
    the same compression of the stored vector is.

    Raises:
        PoolError: for an index of other vectors, or of these in another order.
    """
    rows = _sample(pool)
    stored = pool.vectors(rows).astype(np.float32)
    try:
        given = reconstruct(index, rows)
    except RuntimeError:  # of faiss: this kind of index cannot give its vectors back
        wrong = _not_found(index, stored, rows)
    else:
        wrong = _unlike(given, stored, _compressed(index, stored))
    if wrong.any():
        row = int(rows[np.flatnonzero(wrong)[0]])
        raise PoolError(
            f"{path} does not hold the vectors of {pool.folder} in its order: {wrong.sum()} of {len(rows)} rows that "
            f"were compared differ, row {row} first. {_AGAIN}"
        )


def check_found(rows: np.ndarray, similarities: np.ndarray, count: int, path: Path) -> None:
    """Checks what a search has returned: rows of the pool, or -1 for none, with similarities that are numbers.

    Raises:
        PoolError: for anything else.
    """
    if rows.size and (rows.min() < -1 or rows.max() >= count):
        bad = rows[(rows < -1) | (rows >= count)][0]
        raise PoolError(f"{path} found the id {bad}, which is no row of a pool of {count}. {_AGAIN}")
    if not np.isfinite(similarities[rows >= 0]).all():
        raise PoolError(f"{path} gives a similarity that is no finite number. {_AGAIN}")


def reconstruct(index: Any, rows: np.ndarray) -> np.ndarray:
    """Vectors [n, d] that an index gives back for rows [n]; its ids have been checked.

    Raises:
        RuntimeError: if this kind of index cannot.
    """
    import faiss

    index = _of_vectors(index, storage=False)
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        lists: Any = inverted.invlists
        # faiss reads through a null pointer for those (1.15.1)
        if type(faiss.downcast_InvertedLists(lists)).__name__ == "BlockInvertedLists":
            raise RuntimeError("its lists are packed for fast scans")
        inverted.make_direct_map()
    found: np.ndarray = index.reconstruct_batch(np.ascontiguousarray(rows, np.int64))
    return found


def _layers(index: Any) -> Iterator[Any]:
    import faiss

    pending = [index]
    while pending:
        layer = faiss.downcast_index(pending.pop())
        yield layer
        for name in _WRAPPED:
            inner = getattr(layer, name, None)
            if isinstance(inner, faiss.Index):
                pending.append(inner)


def _check_lists(layer: Any, path: Path) -> None:
    """Checks that the inverted lists hold each row once."""
    import faiss

    lists = layer.invlists
    seen, count = np.zeros(layer.ntotal, bool), 0
    for number in range(lists.nlist if lists is not None else 0):
        size = lists.list_size(number)
        if size == 0:
            continue
        pointer = lists.get_ids(number)
        ids = faiss.rev_swig_ptr(pointer, size).copy()
        lists.release_ids(number, pointer)
        if ids.min() < 0 or ids.max() >= layer.ntotal:
            raise _foreign(path, layer, ids)
        seen[ids] = True
        count += size
    merged = type(layer).__name__ == "IndexIVFFlatDedup"  # equal vectors are kept once
    if seen.sum() != count or (count != layer.ntotal and not merged):
        raise PoolError(
            f"{path} holds {count} of {layer.ntotal} rows, {count - seen.sum()} of them twice. {_AGAIN}"
        )


def _foreign(path: Path, layer: Any, ids: np.ndarray) -> PoolError:
    shown = ", ".join(map(str, ids[:4].tolist()))
    return PoolError(
        f"{path} has ids of its own ({type(layer).__name__}: {shown}, ...); expected the row numbers of the embedding "
        f"folder, from 0. {_AGAIN}"
    )


def _of_vectors(index: Any, *, storage: bool) -> Any:
    """The part of an index that has the vectors, whose ids are the same; with `storage` also below a graph."""
    import faiss

    layer: Any = faiss.downcast_index(index)
    while True:
        if isinstance(layer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
            inner = layer.index
        elif isinstance(layer, faiss.IndexRefine):
            inner = layer.refine_index
        elif storage and isinstance(getattr(layer, "storage", None), faiss.Index):
            inner = layer.storage
        else:
            return layer
        layer = faiss.downcast_index(inner)


def _sample(pool: Embeddings) -> np.ndarray:
    """Rows in ascending order: all, or the first and last ones of files and others at random."""
    if pool.rows <= SAMPLED:
        return np.arange(pool.rows)
    generator = np.random.default_rng(0)
    ends = np.array([row for file in pool.files for row in (file.first, file.first + file.rows - 1)])
    others = generator.integers(0, pool.rows, SAMPLED // 2)
    return np.unique(np.concatenate([generator.permutation(ends)[: SAMPLED // 2], others]))


def _compressed(index: Any, stored: np.ndarray) -> np.ndarray | None:
    """What the compression of an index makes of vectors [n, d]; None if it cannot be asked."""
    part = _of_vectors(index, storage=True)
    try:
        decoded: np.ndarray = part.sa_decode(part.sa_encode(np.ascontiguousarray(stored)))
    except RuntimeError:
        return None
    return decoded


def _unlike(given: np.ndarray, stored: np.ndarray, expected: np.ndarray | None) -> np.ndarray:
    """Which of the vectors [n, d] that an index gives cannot be the stored ones of the same rows."""
    import faiss

    wrong: np.ndarray = ~np.isfinite(given).all(axis=1)
    given = np.where(wrong[:, None], np.float32(0), given)
    squares = faiss.pairwise_distances(given, stored if expected is None else expected)
    distances = np.sqrt(np.maximum(squares, 0))
    closer = (distances < np.diagonal(distances)[:, None] - _ROUNDING).mean(axis=1)
    if expected is None:  # coarse compression may bring a few vectors nearer to others
        doubtful = closer > 0.5
        if doubtful.mean() > 0.05:
            wrong |= doubtful
    else:
        error, usual = (np.linalg.norm(vectors - stored, axis=1) for vectors in (given, expected))
        wrong |= (error > 1.25 * usual + _ROUNDING) | (closer > 0.05)
    return wrong


def _not_found(index: Any, stored: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which rows [n] a search by their own vectors does not find, if that is half of them; else none."""
    k = min(1000, max(1, index.ntotal // 20))
    found = index.search(np.ascontiguousarray(stored), k)[1]
    missed = ~(found == rows[:, None]).any(axis=1)
    return missed if missed.mean() > 0.5 else np.zeros(len(rows), bool)
