"""Reads embedding folders in clip-retrieval's layout: ours, or those of ``clip-retrieval inference``.

Row i of a folder is row i of its vector files in order of their names, and of its metadata files likewise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.errors import PoolError

if TYPE_CHECKING:
    import pyarrow as pa

ORIGIN = "model.json"  # written by arf embed beside the vectors
_CHECKED_AT_ONCE = 65536


@dataclass(frozen=True)
class EmbeddingFile:
    """One vector file with its metadata; ``first`` is the folder's row number of its first vector."""

    vectors: Path
    metadata: Path
    first: int
    rows: int

    def load(self) -> np.ndarray:
        """The vectors [rows, d], memory-mapped."""
        return np.load(self.vectors, mmap_mode="r", allow_pickle=False)

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the file's vectors from start to stop as (the folder's row number of the first, vectors [m, d]).

        They are read, not mapped: what a process has mapped counts as its memory until the system wants it back.
        """
        mapped = self.load()
        stop = self.rows if stop is None else stop
        if not (isinstance(mapped, np.memmap) and mapped.flags.c_contiguous):
            for first in range(start, stop, size):
                yield self.first + first, mapped[first : min(first + size, stop)]
            return
        with self.vectors.open("rb") as file:
            file.seek(mapped.offset + start * mapped.strides[0])
            for first in range(start, stop, size):
                shape = (min(size, stop - first), mapped.shape[1])
                vectors = np.fromfile(file, mapped.dtype, shape[0] * shape[1])
                yield self.first + first, vectors.reshape(shape)

    def check_unit(self) -> None:
        """Checks all vectors; see :func:`check_unit`."""
        for first, vectors in self.blocks(_CHECKED_AT_ONCE):
            check_unit(vectors, self.vectors, self.first, first - self.first)


@dataclass(frozen=True)
class Embeddings:
    """An embedding folder, checked when it is opened.

    Attributes:
        folder: the folder.
        modality: ``image`` or ``text``.
    """

    folder: Path
    modality: str = "image"

    @cached_property
    def files(self) -> list[EmbeddingFile]:
        """The files that hold at least one row.

        Raises:
            PoolError: if files are missing, damaged, of different lengths or dimensions, or not all written yet.
        """
        import pyarrow.parquet as pq

        work = self.folder / "work" / "embed"
        if (work / "config.json").exists() and not (work / "finished.json").exists():
            raise PoolError(
                f"{self.folder} is not finished: arf embed was interrupted, or other ranks are still at work. Wait for "
                "them, or run it again to the end."
            )
        name = "img_emb" if self.modality == "image" else "text_emb"
        vectors = sorted((self.folder / name).glob("*.npy"))
        metadata = sorted((self.folder / "metadata").glob("*.parquet"))
        if not vectors:
            raise PoolError(
                f"{self.folder} has no {name}/*.npy. Expected an embedding folder, as written by: arf embed, "
                "or clip-retrieval inference."
            )
        if len(vectors) != len(metadata):
            raise PoolError(
                f"{self.folder} has {len(vectors)} files in {name} but {len(metadata)} in metadata; expected one for "
                "one. Was the embedding interrupted? Run it again to the end."
            )
        files, first, dimensions = [], 0, set()
        for vector_path, metadata_path in zip(vectors, metadata, strict=True):
            try:
                shape = np.load(vector_path, mmap_mode="r", allow_pickle=False).shape
                rows = pq.read_metadata(metadata_path).num_rows
            except (ValueError, OSError) as cause:  # pyarrow's ArrowInvalid is a ValueError
                raise PoolError(f"{vector_path} or {metadata_path.name} cannot be read: {cause}") from cause
            if len(shape) != 2 or shape[0] != rows:
                raise PoolError(
                    f"{vector_path} has shape {shape}, but {metadata_path.name} has {rows} rows; expected one vector "
                    "per row. Embed this folder again."
                )
            if rows:
                dimensions.add(shape[1])
                files.append(EmbeddingFile(vector_path, metadata_path, first, rows))
                first += rows
        if len(dimensions) > 1:
            raise PoolError(f"{self.folder}/{name} mixes vectors of dimensions {sorted(dimensions)}.")
        if not files:
            raise PoolError(
                f"{self.folder} holds no rows. Expected embedded samples; see its work/*/rejects.jsonl."
            )
        return files

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return self.files[-1].first + self.files[-1].rows

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return int(self.files[0].load().shape[1])

    @cached_property
    def model(self) -> dict[str, Any] | None:
        """The model's identity, if the folder was written by ``arf embed``."""
        return self._origin.get("model")

    @cached_property
    def _origin(self) -> dict[str, Any]:
        path = self.folder / ORIGIN
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Reads vectors [n, d] of the folder's rows [n], in any order."""
        found = np.empty((len(rows), self.dimension), self.files[0].load().dtype)
        for file in self.files:
            inside = (rows >= file.first) & (rows < file.first + file.rows)
            if inside.any():
                found[inside] = file.load()[rows[inside] - file.first]
        return found

    def columns(self, file: EmbeddingFile, names: list[str]) -> pa.Table:
        """Reads metadata columns of a file; those it lacks are filled with nulls."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        present = [name for name in names if name in pq.read_schema(file.metadata).names]
        table = pq.read_table(file.metadata, columns=present)
        for position, name in enumerate(names):
            if name not in present:
                table = table.add_column(position, name, pa.nulls(file.rows, pa.string()))
        return table.select(names)

    def take(self, rows: np.ndarray, names: list[str]) -> pa.Table:
        """Reads metadata columns of the folder's rows [n], which ascend."""
        import pyarrow as pa

        tables = []
        for file in self.files:
            low, high = np.searchsorted(rows, [file.first, file.first + file.rows])
            if low < high:
                tables.append(self.columns(file, names).take(rows[low:high] - file.first))
        return pa.concat_tables(
            tables or [self.columns(self.files[0], names)[:0]], promote_options="permissive"
        )

    def fingerprint(self) -> list[Any]:
        """What changes when the vectors do, as JSON: for our own folders what they were made of, else the files."""
        paths = [path for file in self.files for path in (file.vectors, file.metadata)]
        made_of = self._origin.get("config_digest")
        times = [None if made_of else path.stat().st_mtime_ns for path in paths]
        sizes = [
            [str(p.relative_to(self.folder)), p.stat().st_size, t] for p, t in zip(paths, times, strict=True)
        ]
        return [made_of, *sizes]


def same_model(one: Embeddings, other: Embeddings) -> None:
    """Checks that two folders can be compared.

    Raises:
        PoolError: for vectors of different dimensions or, where both folders name their model, of different models.
    """
    if one.dimension != other.dimension:
        raise PoolError(
            f"{one.folder} has vectors of dimension {one.dimension}, {other.folder} of {other.dimension}. "
            "Embed both with the same model."
        )
    if one.model and other.model and one.model != other.model:
        raise PoolError(
            f"{one.folder} was embedded with {one.model}, {other.folder} with {other.model}. "
            "Embed both with the same model and weights."
        )


def check_unit(vectors: np.ndarray, path: Path, first: int, skipped: int = 0) -> None:
    """Checks that vectors [n, d] are finite and of unit norm, to the precision of fp16.

    Args:
        vectors: some or all vectors of a file.
        path: the file.
        first: the folder's row number of the file's first vector.
        skipped: vectors of the file before these.

    Raises:
        PoolError: naming the first bad row.
    """
    starts = range(0, len(vectors), _CHECKED_AT_ONCE)
    blocks = (vectors[start : start + _CHECKED_AT_ONCE].astype(np.float32) for start in starts)
    squares = np.concatenate([np.einsum("nd,nd->n", block, block) for block in blocks] or [np.ones(0)])
    norms = np.sqrt(squares)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 0.01))  # a comparison with NaN is false
    if len(bad):
        row = skipped + bad[0]
        raise PoolError(
            f"{path}, row {row} (row {first + row} of the folder) has norm {norms[bad[0]]:g}; expected finite vectors "
            f"of unit norm ({len(bad)} of {len(norms)} vectors looked at are not). Embed this folder again."
        )
