"""Reads embedding folders in clip-retrieval's layout: ours, or those of ``clip-retrieval inference``.

Row i of a folder is row i of its vector files in order of their names, and so is row i of its index. A vector file and
a metadata file belong together by the number in their names: ``img_emb_N.npy`` and ``metadata_N.parquet``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.errors import PoolError
from arf_plugin.files import content_digest, list_files
from arf_plugin.pipeline.tables import TEXT, WHOLE, count_rows, read_columns
from arf_plugin.untrusted import printable, read_json, require_regular

if TYPE_CHECKING:
    import pyarrow as pa

ORIGIN = "model.json"  # written by arf embed beside the vectors
METADATA = {name: TEXT for name in ("image_path", "id", "tar", "ext")} | {"offset": WHOLE, "size": WHOLE}
METADATA |= {"caption": TEXT, "sha256": TEXT}
_KINDS = METADATA | {"url": TEXT}
_CHECKED_AT_ONCE = 65536
_NUMBER = re.compile(r"([0-9]+)\.[a-z]+$")


@dataclass(frozen=True)
class EmbeddingFile:
    """One vector file with its metadata; ``first`` is the folder's row number of its first vector."""

    vectors: Path
    metadata: Path
    first: int
    rows: int

    def load(self) -> np.ndarray:
        """The vectors [rows, d], memory-mapped."""
        vectors = read_vectors(self.vectors)
        if len(vectors) != self.rows:
            raise PoolError(f"{self.vectors} has {len(vectors)} rows, and had {self.rows} a moment ago.")
        return vectors

    def blocks(
        self, size: int, start: int = 0, stop: int | None = None, *, unit: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the file's vectors from start to stop as (the folder's row number of the first, vectors [m, d]).

        They are copied, and each block is mapped anew: what a process has mapped counts as its memory. With ``unit``
        they are checked; see :func:`check_unit`.
        """
        stop = self.rows if stop is None else stop
        for first in range(start, stop, size):
            vectors = np.array(self.load()[first : min(first + size, stop)])
            if unit:
                check_unit(vectors, self.vectors, self.first, first)
            yield self.first + first, vectors

    def check_unit(self) -> None:
        """Checks all vectors; see :func:`check_unit`."""
        for _ in self.blocks(_CHECKED_AT_ONCE, unit=True):
            pass


@dataclass(frozen=True)
class Embeddings:
    """An embedding folder, checked when it is first read; the modality is ``image`` or ``text``."""

    folder: Path
    modality: str = "image"

    @cached_property
    def files(self) -> list[EmbeddingFile]:
        """The files that hold at least one row.

        Raises:
            PoolError: if files are missing, damaged, of different lengths or dimensions, or not all written yet.
        """
        work = self.folder / "work" / "embed"
        if (work / "config.json").exists() and not (work / "finished.json").exists():
            raise PoolError(
                f"{self.folder} is not finished: arf embed was interrupted, or other ranks are still at work. Wait for "
                "them, or run it again to the end."
            )
        name = "img_emb" if self.modality == "image" else "text_emb"
        vectors = list_files(self.folder / name, ".npy")
        metadata = list_files(self.folder / "metadata", ".parquet")
        if not vectors:
            raise PoolError(
                f"{self.folder} has no {name}/*.npy. Expected an embedding folder, as written by: arf embed, "
                "or clip-retrieval inference."
            )
        files, first, dimensions = [], 0, set()
        for vector_path, metadata_path in _by_number(self.folder, vectors, metadata):
            shape = read_vectors(vector_path).shape
            rows = count_rows(metadata_path, PoolError)
            if shape[0] != rows:
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

    @cached_property
    def dimension(self) -> int:
        """Length of the vectors."""
        return int(self.files[0].load().shape[1])

    @cached_property
    def _dtype(self) -> np.dtype:
        """The type that holds the vectors of all files."""
        return np.result_type(*{file.load().dtype for file in self.files})

    @cached_property
    def model(self) -> dict[str, Any] | None:
        """The model's identity, if the folder was written by ``arf embed``.

        Raises:
            PoolError: for a note of the model that is damaged.
        """
        path = self.folder / ORIGIN
        if not path.exists():
            return None
        advice = "Embed this folder again, or copy it again."
        model = read_json(path, PoolError, advice=advice).get("model")
        if not isinstance(model, dict | None) or not all(isinstance(v, str) for v in (model or {}).values()):
            raise PoolError(f"{path}: 'model' is {printable(repr(model))[:80]}, expected names. {advice}")
        return model

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Reads vectors [n, d] of the folder's rows [n], in any order."""
        found = np.empty((len(rows), self.dimension), self._dtype)
        for file in self.files:
            inside = (rows >= file.first) & (rows < file.first + file.rows)
            if inside.any():
                found[inside] = file.load()[rows[inside] - file.first]
        return found

    def columns(self, file: EmbeddingFile, names: list[str]) -> pa.Table:
        """Reads columns of METADATA, or ``url``, of a file; those it lacks are filled with nulls.

        Raises:
            PoolError: for columns of other types or with impossible values.
        """
        table = read_columns(file.metadata, {name: _KINDS[name] for name in names}, PoolError)
        if table.num_rows != file.rows:
            raise PoolError(f"{file.metadata} has {table.num_rows} rows, and had {file.rows} a moment ago.")
        return table

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
        """What changes when the vectors or their metadata do, as JSON: their contents, in order."""
        paths = [path for file in self.files for path in (file.vectors, file.metadata)]
        return [self.model, *([path.name, content_digest([path])] for path in paths)]


def read_vectors(path: Path) -> np.ndarray:
    """Maps the vectors [n, d] of a .npy file into memory.

    Raises:
        PoolError: for everything that is not a matrix of fp16, fp32 or fp64.
    """
    require_regular(path, PoolError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that an old Python has written
            # np.load would take archives and pickles, too.
            vectors: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except Exception as cause:  # numpy's parser of headers raises many kinds
        reason = printable(str(cause))[:200] or type(cause).__name__
        raise PoolError(f"{path} cannot be read as vectors: {reason}. Embed or copy it again.") from cause
    dtype = vectors.dtype
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8) or not dtype.isnative:
        raise PoolError(
            f"{path} holds values of type {printable(str(dtype))[:80]}; expected float16, float32 or float64 of this "
            "machine's byte order. Convert it with numpy, or embed again."
        )
    if vectors.ndim != 2 or (len(vectors) and not vectors.shape[1]):
        raise PoolError(
            f"{path} has shape {vectors.shape}; expected one vector per row. Embed this folder again."
        )
    return vectors


def _by_number(folder: Path, vectors: list[Path], metadata: list[Path]) -> list[tuple[Path, Path]]:
    """The pairs of files with one number at the end of their names, in order of the vectors' names: that of the rows.

    Raises:
        PoolError: for files without a number or with that of another; for files that are missing on one side or on
            both; if the metadata come in another order.
    """
    if len(vectors) == len(metadata) == 1 and not any(_NUMBER.search(p.name) for p in (*vectors, *metadata)):
        return [(vectors[0], metadata[0])]
    one: dict[int, Path] = {}
    other: dict[int, Path] = {}
    for paths, found in ((vectors, one), (metadata, other)):
        for path in paths:
            match = _NUMBER.search(path.name)
            if match is None:
                raise PoolError(
                    f"{path} has no number at the end of its name, so the file that belongs to it cannot be told. "
                    "Expected names such as img_emb_0.npy and metadata_0.parquet."
                )
            if found.setdefault(int(match[1]), path) is not path:
                raise PoolError(
                    f"{path} and {found[int(match[1])].name} have the same number; keep one of them."
                )
    name = vectors[0].parent.name
    alone = [one[n].name for n in one if n not in other] + [other[n].name for n in other if n not in one]
    if alone:
        raise PoolError(
            f"{folder} has {len(one)} files in {name} but {len(other)} in metadata; expected one for one, and "
            f"{', '.join(alone[:3])}{' and others' if len(alone) > 3 else ''} stand alone. Was the embedding or a copy "
            "interrupted? Run it again to the end."
        )
    missing = next((n for n, found in enumerate(sorted(one)) if n != found), None)
    if missing is not None:
        raise PoolError(
            f"{folder} has no {name} and no metadata of number {missing}, but of {max(one)}; expected all from 0. Was "
            "a copy interrupted? Copy the rest (or, to take a part on purpose, give the files numbers from 0)."
        )
    if list(one) != list(other):
        raise PoolError(
            f"The files of {folder}/{name} and of its metadata are not in the same order by name ({list(one)[:4]}, "
            f"{list(other)[:4]}), so the rows of an index could be either's. Write all numbers with as many digits."
        )
    return [(path, other[number]) for number, path in one.items()]


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
    """Checks that vectors [n, d] of a file are finite and of unit norm, to the precision of fp16.

    ``first`` is the folder's row number of the file's first vector; so many of the file's vectors are skipped.

    Raises:
        PoolError: naming the first bad row.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite or no number is found below
        exact = vectors.astype(np.float32)
        norms = np.sqrt(np.einsum("nd,nd->n", exact, exact))
    bad = np.flatnonzero(~(np.abs(norms - 1) < 0.01))  # a comparison with NaN is false
    if len(bad):
        row = skipped + bad[0]
        raise PoolError(
            f"{path}, row {row} (row {first + row} of the folder) has norm {norms[bad[0]]:g}; expected finite vectors "
            f"of unit norm ({len(bad)} of {len(norms)} vectors looked at are not). Embed this folder again."
        )
