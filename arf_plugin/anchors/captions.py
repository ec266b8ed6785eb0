r"""Reads and validates the caption files of an anchor set.

Columns are taken in every form that holds text without loss: strings of any layout, bytes that are UTF-8, dictionaries
of either. Ids are text: what is no UTF-8 in the name of a shard or file stands in them as ``\xNN``
(:func:`arf_plugin.untrusted.utf8`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arf_plugin.anchors.reading import opened_parquet, opened_set
from arf_plugin.anchors.text_columns import text_bytes
from arf_plugin.errors import AnchorSetError
from arf_plugin.files import list_files_of
from arf_plugin.untrusted import printable

REBUILD = "rebuild the captions with: arf caption ..."
COLUMNS = ("id", "caption")
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_BATCH = 1 << 16  # rows
# A file that says one thing a billion times is no set of captions. Real ones shrink to a tenth at most.
_LARGEST_RATIO, _ALWAYS_READ = 1000, 1 << 30


def list_caption_files(anchors: str) -> tuple[Any, list[str]]:
    """The set's file system, and its ``captions/*.parquet`` in it by name; hidden files are none.

    Raises:
        AnchorSetError: the folder cannot be listed.
    """
    with opened_set(anchors, "captions"):
        return list_files_of(anchors, "captions", ".parquet")


def caption_batches(fs: Any, name: str) -> Iterator[pa.Table]:
    """Reads and validates a caption file, some ten thousand rows at a time.

    Args:
        fs: the fsspec file system of the file.
        name: its path in it.

    Yields:
        Tables with the columns ``id`` and ``caption``, both ``large_string``.

    Raises:
        AnchorSetError: see `arf_plugin.data.captions.open_captions`.
    """
    short = "/".join(name.split("/")[-2:])
    row = size = 0
    with opened_parquet(fs, name, short, f"Replace it or {REBUILD}") as file:
        largest = _ALWAYS_READ + _LARGEST_RATIO * (fs.size(name) or 0)
        _check_columns(file.schema_arrow.names, short)
        for batch in file.iter_batches(_BATCH, columns=list(COLUMNS)):
            table = _validated(pa.Table.from_batches([batch]), short, row)
            size += table.nbytes
            if size > largest:
                raise AnchorSetError(
                    f"{short} unpacks to more than {_LARGEST_RATIO} times its size: these are no captions. "
                    f"Replace it or {REBUILD}"
                )
            yield table
            row += batch.num_rows


def _check_columns(found: list[str], short: str) -> None:
    shown = (", ".join(found) or "none")[:300]
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        raise AnchorSetError(
            f"{short} has no column {' and no column '.join(map(repr, missing))} (found: {shown}). An anchor set's "
            f"captions need 'id' and 'caption'; rename the columns or {REBUILD}"
        )
    for column in COLUMNS:
        if found.count(column) > 1:
            raise AnchorSetError(
                f"{short} has {found.count(column)} columns '{column}' (found: {shown}). Keep one of them or {REBUILD}"
            )


def _validated(table: pa.Table, short: str, first: int) -> pa.Table:
    columns = []
    for name in COLUMNS:
        column = _as_text(table[name], short, name, first).combine_chunks()
        row = _first_unusable(column)
        if row >= 0:
            text = column[row].as_py()
            raise AnchorSetError(
                f"{short}, row {first + row}: {name} is {text if text is None else repr(text[:80])}; expected "
                f"non-empty text without NUL characters. Remove the row or {REBUILD}"
            )
        columns.append(column)
    return pa.table(columns, names=list(COLUMNS))


def _first_unusable(column: pa.Array) -> int:
    """The first row that is null, blank or holds a NUL character, which tokenizers drop at best; -1 if none is."""
    offsets, data = text_bytes(column)
    if not column.null_count and data.all():
        # Nearly all texts begin with a printable ASCII character, and are not blank; only the others are looked at.
        begin = (
            data[np.minimum(offsets[:-1], len(data) - 1)] if len(data) else np.zeros(len(column), np.uint8)
        )
        rows = np.flatnonzero((offsets[1:] == offsets[:-1]) | (begin <= 0x20) | (begin >= 0x7F))
    else:
        rows = np.arange(len(column))
    texts = column.take(pa.array(rows))
    # A byte-order mark by itself is as good as nothing.
    bare = pc.utf8_trim_whitespace(pc.utf8_trim(texts, "\ufeff"))
    unusable = pc.fill_null(pc.or_(pc.equal(bare, ""), pc.match_substring(texts, "\0")), True)
    found: int = pc.index(unusable, True).as_py()
    return int(rows[found]) if found >= 0 else -1


def _as_text(column: pa.ChunkedArray, short: str, name: str, first: int) -> pa.ChunkedArray:
    """The column as ``large_string``, whatever form of text it has."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType) and kind.storage_type in _TEXTS:
        kind = kind.storage_type
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], kind)
    if pa.types.is_dictionary(kind):
        column.validate(full=True)
        kind = kind.value_type
        column = column.cast(kind)
    if kind not in (*_TEXTS, *_BYTES) and not pa.types.is_fixed_size_binary(kind):
        raise AnchorSetError(
            f"{short}: column '{name}' holds {printable(str(kind))[:120]}, expected string. Convert it or {REBUILD}"
        )
    # By way of bytes: a file may call bytes a string that are none.
    content = column.cast(pa.large_binary())
    try:
        return content.cast(pa.large_string())
    except pa.ArrowInvalid:
        for row, value in enumerate(content.to_pylist()):
            try:
                (value or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise AnchorSetError(
                    f"{short}, row {first + row}: {name} is not UTF-8 ({error.reason} at byte {error.start}: "
                    f"{value[:40]!r}). Re-encode the text as UTF-8 or {REBUILD}"
                ) from error
        raise
