"""Index folders (``image.index`` and ``metadata/*.parquet``) as pools, and faiss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arf_plugin.anchors.files import content_digest, list_files
from arf_plugin.errors import MissingDependencyError, PoolError
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
