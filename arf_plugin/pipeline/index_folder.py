"""Index folders (``image.index`` and ``metadata/*.parquet``) as pools, faiss, and the way from a key to its row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arf_plugin.anchors.files import content_digest, list_files
from arf_plugin.errors import MissingDependencyError, PoolError, ServiceError
from arf_plugin.pipeline.embeddings import EmbeddingFile, Embeddings
from arf_plugin.pipeline.index_check import check_row_ids, reconstruct
from arf_plugin.pipeline.tables import count_rows
from arf_plugin.untrusted import printable, require_regular


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
        """The faiss index, memory-mapped, checked to be as long as the metadata."""
        index = open_index(self.path)
        if index.ntotal != self.rows:
            raise PoolError(
                f"{self.path} has {index.ntotal} vectors, {self.folder}/metadata has {self.rows} rows; expected one "
                "for one. Build the index folder again with: arf index"
            )
        check_row_ids(index, self.path)
        return index

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


def open_pool(folder: Path, *, index_suffices: bool = False) -> Embeddings:
    """Opens a pool.

    Args:
        folder: an embedding folder, or an index folder.
        index_suffices: whether the search can do without the vectors.
    """
    pool = IndexFolder(folder)
    has_vectors = bool(list_files(folder / "img_emb", ".npy"))
    return pool if index_suffices and pool.path.exists() and not has_vectors else Embeddings(folder)


def index_file(path: Path, modality: str = "image") -> Path:
    """The index that a path names: a file, or that of a modality in an index folder."""
    return path / f"{modality}.index" if path.is_dir() else path


def open_index(path: Path) -> Any:
    """Maps a faiss index into memory.

    Raises:
        MissingDependencyError: without faiss.
        PoolError: if there is none, or one that measures something else than inner products.
    """
    try:
        import faiss
    except ImportError:
        raise MissingDependencyError("faiss", "Searching an index", "retrieval") from None
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
    return index


class KeyRows:
    """Finds the pool row of a key.

    Args:
        pool: its metadata need the column ``image_path``.

    Raises:
        PoolError: for a key that occurs twice: which of the two rows is meant could not be told.
    """

    def __init__(self, pool: Embeddings) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self._pool = pool
        columns = [pool.columns(file, ["image_path"])["image_path"] for file in pool.files]
        # One Arrow array takes a few bytes per key beyond its characters; a dict takes a hundred.
        self._keys = pa.chunked_array([c.cast(pa.large_string()) for c in columns]).combine_chunks()
        if self._keys.null_count:
            row = int(pc.index(self._keys.is_null(), True).as_py())
            raise PoolError(
                f"{self._where(row)} has no 'image_path' (the sample's key), so a hit cannot be found in the pool. "
                "Embed the pool again, with: arf embed, or clip-retrieval inference"
            )
        if pc.count_distinct(self._keys).as_py() < len(self._keys):
            counts = pc.value_counts(self._keys)
            key = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
            one, two = pc.indices_nonzero(pc.equal(self._keys, key)).to_pylist()[:2]
            raise PoolError(
                f"The key {key.as_py()!r} occurs twice in the pool ({self._where(one)} and {self._where(two)}), and "
                "the service names pairs by their key alone. Search without the service (--backend exact or faiss), "
                "which goes by row, or give the pool's samples unique keys."
            )

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Returns the rows of keys.

        Raises:
            ServiceError: for a key that the pool does not have.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        found = pc.index_in(pa.array(keys, pa.large_string()), value_set=self._keys)
        if found.null_count:
            key = keys[int(pc.index(found.is_null(), True).as_py())]
            raise ServiceError(
                f"The service names the pair {key!r}, which is not among the {len(self._keys)} keys of "
                f"{self._pool.folder} (the first being {self._keys[0].as_py()!r}). Give the folder that its index was "
                "built from with --pool, or choose another index with --service-index."
            )
        return found.to_numpy().astype(np.int64)

    def _where(self, row: int) -> str:
        file = next(file for file in self._pool.files if row < file.first + file.rows)
        return f"{file.metadata}, row {row - file.first}"
