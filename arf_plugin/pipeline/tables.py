"""Writes parquet files, and reads those of others: the columns that are wanted, in the types that are wanted.

A file is opened by its name and read as one file: Arrow's data set reader, which takes ``key=value`` folders of a path
for columns, has no part in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arf_plugin.errors import ArfError
from arf_plugin.files import replacing
from arf_plugin.untrusted import printable, require_regular

TEXT, WHOLE, NUMBER, TEXTS, NUMBERS = "a text", "a whole number from -1", "a number", "texts", "numbers"
_TEXT_TYPES = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}


def count_rows(path: Path, error: type[ArfError]) -> int:
    """Number of rows of a parquet file.

    Raises:
        error: it is missing, damaged, or something else.
    """
    with open_parquet(path, error) as file:
        return int(file.metadata.num_rows)


def read_columns(
    path: Path, kinds: dict[str, str], error: type[ArfError], required: Collection[str] = ()
) -> pa.Table:
    """Reads columns of a parquet file, in this order; those that it lacks are filled with nulls.

    Args:
        path: the file.
        kinds: the columns, each with TEXT (utf8), WHOLE (int64), NUMBER (as stored), TEXTS or NUMBERS (lists).
            Texts may be stored in any of Arrow's ways, bytes of UTF-8 and dictionaries among them.
        error: family of the errors.
        required: columns that must be there.

    Raises:
        error: the file is missing or damaged; a column is missing, there twice, or holds something else.
    """
    with open_parquet(path, error) as file:
        names = file.schema_arrow.names
        for name in kinds:
            if names.count(name) > 1:
                raise error(f"{path} has {names.count(name)} columns {name!r}; expected one. Write it again.")
            if name in required and name not in names:
                found = printable(", ".join(names))[:200]
                raise error(f"{path} has no column {name!r} (found: {found}). Write it again.")
        present = [name for name in kinds if name in names]
        table = file.read(columns=present)
        rows = int(file.metadata.num_rows)
        if table.num_rows != rows or sorted(table.column_names) != sorted(present):
            raise error(f"{path} holds other rows or columns than its footer says. Write it again.")
        columns = {}
        for name, kind in kinds.items():
            if name in present:
                columns[name] = _as(kind, table[name], f"{path}, column {name!r}", error)
            else:
                columns[name] = pa.chunked_array([pa.nulls(rows, _arrow_type(kind))])
        return pa.table(columns)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a parquet file; its name may be any that the file system takes, be it no UTF-8."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")


@contextmanager
def open_parquet(path: Path, error: type[ArfError]) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file; whatever Arrow raises within the block is an error about this file."""
    require_regular(path, error)
    try:
        with path.open("rb") as file:
            yield pq.ParquetFile(file)
    except ArfError:
        raise
    except Exception as cause:  # Arrow raises many kinds, OSError and MemoryError among them
        reason = printable(str(cause))[:200] or type(cause).__name__
        raise error(f"{path} cannot be read as a parquet file: {reason}. Write or copy it again.") from cause


def _arrow_type(kind: str) -> pa.DataType:
    types = {TEXT: pa.string(), WHOLE: pa.int64(), NUMBER: pa.float64()}
    types |= {TEXTS: pa.list_(pa.string()), NUMBERS: pa.list_(pa.float64())}
    return types[kind]


def _as(kind: str, column: pa.ChunkedArray, where: str, error: type[ArfError]) -> pa.ChunkedArray:
    """A column in the type of its kind, every value of it checked."""
    if not _fits(column.type, kind):
        raise error(f"{where} holds {printable(str(column.type))[:80]}; expected {kind} in each row.")
    try:
        if not (kind == NUMBER and pa.types.is_floating(column.type)):
            column = column.cast(_arrow_type(kind))
        column.validate(full=True)  # what is stored as a text need not be UTF-8
    except (pa.ArrowException, ValueError) as cause:
        raise error(f"{where} does not hold {kind} in each row: {printable(str(cause))[:200]}.") from cause
    if kind == WHOLE and len(column) > column.null_count and (least := pc.min(column).as_py()) < -1:
        raise error(f"{where} holds {least}; expected {kind}.")
    return column


def _fits(found: pa.DataType, kind: str) -> bool:
    if pa.types.is_null(found):
        return True
    if kind in (TEXTS, NUMBERS):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _fits(found.value_type, TEXT if kind == TEXTS else NUMBER)
    if kind == TEXT:
        found = found.value_type if pa.types.is_dictionary(found) else found
        return str(found) in _TEXT_TYPES or pa.types.is_fixed_size_binary(found)
    return pa.types.is_integer(found) or (kind == NUMBER and pa.types.is_floating(found))
