"""Stage index: a faiss index of an embedding folder, in clip-retrieval's layout.

``image.index`` (or ``text.index``) holds the vectors, inner product, in the order of the embedding folder;
``metadata/*.parquet`` are the folder's own. clip-retrieval's service can serve the result as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arf_plugin.anchors.files import digest, replacing, write_json
from arf_plugin.errors import FlagError, MissingDependencyError, PoolError
from arf_plugin.pipeline.embeddings import ORIGIN, Embeddings, check_unit
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.stage import Outcome, Shard, Stage

BLOCK = 65536
TRAINING_ROWS = 1_000_000


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
        try:
            import faiss
        except ImportError:
            raise MissingDependencyError("faiss", "arf index", "retrieval") from None
        embeddings = self.embeddings
        try:
            index = faiss.index_factory(embeddings.dimension, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as cause:
            raise FlagError(f"--factory {self.factory}: faiss does not know it ({cause}).") from cause
        if not index.is_trained:
            sample = self._sample()
            try:
                index.train(sample)
            except RuntimeError as cause:
                raise PoolError(
                    f"faiss cannot train {self.factory!r} on {len(sample)} vectors: {cause}\n"
                    "Take a smaller index, or Flat."
                ) from cause
        for file in embeddings.files:
            vectors = file.load()
            check_unit(vectors, file.vectors, file.first)
            for start in range(0, file.rows, BLOCK):
                block = np.ascontiguousarray(vectors[start : start + BLOCK], dtype=np.float32)
                try:
                    index.add(block)
                except (
                    RuntimeError
                ) as cause:  # of an IDMap: it wants ids, but the ids are to be the row numbers
                    raise FlagError(
                        f"--factory {self.factory}: faiss cannot add vectors to it ({cause})."
                    ) from cause
                advance(len(block))
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

    def _sample(self) -> np.ndarray:
        """Every n-th vector [m, d] in fp32, at most a million."""
        step = -(-self.embeddings.rows // TRAINING_ROWS)
        parts = [
            np.asarray(file.load()[-file.first % step :: step], np.float32) for file in self.embeddings.files
        ]
        return np.concatenate(parts)
