"""Reads and validates the caption files of an anchor set."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arf_plugin.errors import AnchorSetError

REBUILD = "rebuild the captions with: arf caption ..."


def read_caption_files(fs: Any, files: list[str]) -> pa.Table:
    """Reads and validates caption files.

    Args:
        fs: The fsspec file system of the files.
        files: Paths of parquet files, in order.

    Returns:
        A table with the columns ``id`` and ``caption``, both ``large_string``.

    Raises:
        AnchorSetError: See `open_captions`.
    """
    tables = []
    for name in files:
        short = "/".join(name.split("/")[-2:])
        try:
            with fs.open(name, "rb") as stream:
                file = pq.ParquetFile(stream)
                found = file.schema_arrow.names
                missing = [column for column in ("id", "caption") if column not in found]
                if missing:
                    raise AnchorSetError(
                        f"{short} has no column {' and no column '.join(map(repr, missing))} "
                        f"(found: {', '.join(found) or 'none'}). An anchor set's captions need 'id' and 'caption'; "
                        f"rename the columns or {REBUILD}"
                    )
                table = file.read(columns=["id", "caption"])
        except (pa.ArrowException, OSError) as error:
            raise AnchorSetError(
                f"{short} is no readable parquet file: {error}\nReplace it or {REBUILD}"
            ) from error
        tables.append(_validated(table, short))
    return pa.concat_tables(tables)


def _validated(table: pa.Table, short: str) -> pa.Table:
    columns = []
    for name in ("id", "caption"):
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            column = _decoded(column, short, name)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise AnchorSetError(
                f"{short}: column '{name}' holds {column.type}, expected string. Convert it or {REBUILD}"
            )
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            column = _decoded(column.cast(pa.large_binary()), short, name)
            raise AnchorSetError(f"{short}: column '{name}' is damaged: {error}. {REBUILD}") from error
        column = column.cast(pa.large_string())
        # NUL separates a prompt from its caption on the way to the tokenizer; tokenizers drop it at best.
        unusable = pc.fill_null(
            pc.or_(pc.equal(pc.utf8_trim_whitespace(column), ""), pc.match_substring(column, "\0")), True
        )
        row = pc.index(unusable, True).as_py()
        if row >= 0:
            raise AnchorSetError(
                f"{short}, row {row}: {name} is {column[row].as_py()!r}; expected non-empty text without NUL "
                f"characters. Remove the row or {REBUILD}"
            )
        columns.append(column)
    return pa.table(columns, names=["id", "caption"])


def _decoded(column: pa.ChunkedArray, short: str, name: str) -> pa.ChunkedArray:
    """Decodes bytes as UTF-8; parquet files by other writers may store text as bytes, or bytes as text."""
    texts = []
    for row, value in enumerate(column.to_pylist()):
        try:
            texts.append(None if value is None else value.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise AnchorSetError(
                f"{short}, row {row}: {name} is not UTF-8 ({error.reason} at byte {error.start}: {value[:40]!r}). "
                f"Re-encode the text as UTF-8 or {REBUILD}"
            ) from error
    return pa.chunked_array([pa.array(texts, pa.large_string())])
