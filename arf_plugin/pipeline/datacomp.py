"""Reads ready-made vectors as DataComp publishes them: ``NAME.parquet`` with ``NAME.npz`` beside it, row by row.

The parquet files have ``uid``, ``url``, ``text`` and ``sha256``; the archives ``l14_img`` and ``b32_img``, the vectors
of OpenAI's ViT-L-14 and ViT-B-32 (Gadre et al., 2023, https://arxiv.org/abs/2304.14108). The task is to be embedded
with one of these two. Vectors are made unit vectors here.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.errors import PoolError
from arf_plugin.pipeline.embeddings import EmbeddingFile, Embeddings
from arf_plugin.pipeline.tables import TEXT, count_rows, read_columns
from arf_plugin.untrusted import printable, require_regular

if TYPE_CHECKING:
    import pyarrow as pa

MODELS = {"l14_img": ("ViT-L-14", 768), "b32_img": ("ViT-B-32", 512)}
_COLUMNS = {"image_path": "uid", "id": "uid", "caption": "text", "url": "url", "sha256": "sha256"}


@dataclass(frozen=True)
class NpzFile(EmbeddingFile):
    """A file of vectors in an archive of numpy's; ``member`` is its name there."""

    member: str = ""

    def load(self) -> np.ndarray:
        """The vectors [rows, d], in memory."""
        vectors = _read(self.vectors, self.member)
        if len(vectors) != self.rows:
            raise PoolError(
                f"{self.vectors}, {self.member!r} has shape {vectors.shape}, but {self.metadata.name} has {self.rows} "
                "rows; expected one vector per row. Download both again."
            )
        return vectors


@dataclass(frozen=True)
class DataComp(Embeddings):
    """A folder of DataComp's metadata, or of one of its scales, for queries of one of its two models."""

    queries: Embeddings | None = None

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether a folder has archives of vectors, in its folders too (as the scale xlarge)."""
        return any(folder.glob("*.npz")) or any(folder.glob("*/*.npz"))

    @cached_property
    def member(self) -> str:
        """Name of the vectors that fit the queries.

        Raises:
            PoolError: none do.
        """
        assert self.queries is not None
        model = self.queries.model
        for member, (name, dimension) in MODELS.items():
            known = model is None or (model["name"].removesuffix("-quickgelu"), model["weights"]) == (
                name,
                "openai",
            )
            if known and self.queries.dimension == dimension:
                return member
        found = model or f"a model of dimension {self.queries.dimension}"
        raise PoolError(
            f"{self.folder} has vectors of OpenAI's ViT-L-14 and ViT-B-32, {self.queries.folder} those of {found}. "
            "Embed the task with one of the two: arf embed --model ViT-L-14-quickgelu --pretrained openai"
        )

    @cached_property
    def files(self) -> list[EmbeddingFile]:
        """The files with at least one row, by name.

        Raises:
            PoolError: one has no counterpart.
        """
        archives = sorted([*self.folder.glob("*.npz"), *self.folder.glob("*/*.npz")])
        tables = sorted([*self.folder.glob("*.parquet"), *self.folder.glob("*/*.parquet")])
        alone = {path.with_suffix("") for path in archives} ^ {path.with_suffix("") for path in tables}
        if alone:
            raise PoolError(
                f"{min(alone)} is there as .npz or as .parquet alone; expected both. Download the other, or move it."
            )
        files: list[EmbeddingFile] = []
        first = 0
        for archive, table in zip(archives, tables, strict=True):
            if rows := count_rows(table, PoolError):
                files.append(NpzFile(archive, table, first, rows, self.member))
                first += rows
        if not files:
            raise PoolError(
                f"{self.folder} holds no rows. Expected DataComp's metadata, with their .npz files."
            )
        return files

    @cached_property
    def model(self) -> dict[str, Any] | None:
        """That of the queries, which `member` has compared."""
        return self.queries.model if self.queries and self.member else None

    def columns(self, file: EmbeddingFile, names: list[str]) -> pa.Table:
        """Reads columns of a file by the names that embedding folders have for them."""
        import pyarrow as pa

        found = read_columns(file.metadata, dict.fromkeys(_COLUMNS.values(), TEXT), PoolError, ("uid", "url"))
        own = super().columns(file, [name for name in names if name not in _COLUMNS] or ["tar"])
        return pa.table({name: found[_COLUMNS[name]] if name in _COLUMNS else own[name] for name in names})


@lru_cache(maxsize=1)  # files are gone through one by one, each in many blocks
def _read(path: Path, member: str) -> np.ndarray:
    require_regular(path, PoolError)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as file:
            vectors: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as cause:  # numpy and zipfile raise many kinds
        reason = printable(str(cause))[:200] or type(cause).__name__
        raise PoolError(
            f"{path} has no vectors {member!r} that can be read: {reason}. Download it again."
        ) from cause
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise PoolError(
            f"{path}, {member!r} holds {vectors.dtype} of shape {vectors.shape}; expected a vector per row."
        )
    with np.errstate(
        over="ignore", invalid="ignore", divide="ignore"
    ):  # check_unit finds what is no unit vector
        exact = vectors.astype(np.float32)
        unit: np.ndarray = (exact / np.linalg.norm(exact, axis=1, keepdims=True)).astype(np.float16)
    return unit
