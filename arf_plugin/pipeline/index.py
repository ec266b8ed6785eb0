"""faiss indexes: the stage that builds one of an embedding folder, and index folders as pools.

``image.index`` (or ``text.index``) holds the vectors, inner product, in the order of the embedding folder;
``metadata/*.parquet`` are the folder's own. That is clip-retrieval's layout: its service can serve the result as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arf_plugin.errors import FlagError, MissingDependencyError, PoolError
from arf_plugin.files import content_digest, digest, list_files, replacing, write_json
from arf_plugin.pipeline.embeddings import ORIGIN, EmbeddingFile, Embeddings
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.index_check import check_row_ids, reconstruct
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import count_rows
from arf_plugin.untrusted import printable, require_regular

BLOCK = 65536
TRAINING_ROWS = 1_000_000  # every n-th vector, so that there are no more


@dataclass
class IndexStage(Stage):
    """Builds one index.

    Attributes:
        embeddings: what to index.
        factory: faiss's description of the index, such as ``Flat``, ``HNSW32`` or ``OPQ64_128,IVF4096,PQ64x8``.
    """

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
    return index


def _faiss(what: str) -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingDependencyError("faiss", what, "retrieval") from None
    return faiss
