"""Caption anchors by sample id: one memory-mapped file per machine, shared by all its processes.

Parquet is the exchange format. The first process that needs it turns it into a table sorted by the ids' 64-bit
digests, in a cache folder; every loader worker of every process maps that file, so millions of captions exist in
memory once. A look-up is a binary search over the digests.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arf_plugin.anchors.files import cache_folder
from arf_plugin.errors import AnchorSetError

FORMAT = "arf-captions-1"
REBUILD = "rebuild the captions with: arf caption ..."


class CaptionStore:
    """Read-only captions, memory-mapped from the cache file at ``path``.

    Pickles as its path, so that loader workers started by any method map the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._digests = _only_chunk(table, "digest").to_numpy(zero_copy_only=True)
        self._ids = _only_chunk(table, "id")
        self._captions = _only_chunk(table, "caption")

    def __reduce__(self) -> tuple[type[CaptionStore], tuple[Path]]:
        return CaptionStore, (self.path,)

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, sample_id: str) -> bool:
        return next(self._rows(sample_id), None) is not None

    @property
    def example_id(self) -> str:
        """One of the ids, for messages."""
        return self._ids[0].as_py() if len(self) else ""

    def get(self, sample_id: str) -> list[str]:
        """All captions of a sample, in the order of the parquet files; empty if there are none."""
        return [self._captions[row].as_py() for row in self._rows(sample_id)]

    def _rows(self, sample_id: str) -> Iterator[int]:
        digest = _digest(sample_id)
        row = int(np.searchsorted(self._digests, digest))
        while row < len(self._digests) and self._digests[row] == digest:
            if self._ids[row].as_py() == sample_id:  # two ids may share a digest
                yield row
            row += 1


def open_captions(anchors: str) -> CaptionStore | None:
    """Opens the captions of an anchor set, building the cache file if it is not there yet.

    Args:
        anchors: Folder or fsspec URL of the anchor set.

    Returns:
        The captions; None if the set has no ``captions/*.parquet``.

    Raises:
        AnchorSetError: A parquet file that cannot be read, has no ``id`` or ``caption`` column, or holds a row that
            cannot be used.
    """
    fs, root = fsspec.core.url_to_fs(anchors)
    files = sorted(fs.glob(f"{root.rstrip('/')}/captions/*.parquet"))
    if not files:
        return None
    stamps = [[name.rsplit("/", 1)[-1], str(fs.ukey(name))] for name in files]
    key = hashlib.sha256(repr([FORMAT, str(fs.protocol), root, stamps]).encode()).hexdigest()[:32]
    path = cache_folder() / "captions" / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if not _is_intact(path):
            logging.info(f"ARF: sorting the captions of {anchors} into {path} (once per machine)")
            _write(_sorted_table(read_caption_files(fs, files)), path)
    return CaptionStore(path)


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


def _sorted_table(table: pa.Table) -> pa.Table:
    digests = np.fromiter((_digest(text) for text in table["id"].to_pylist()), np.uint64, len(table))
    # A stable sort keeps several captions of one sample in the order of the files.
    order = np.argsort(digests, kind="stable")
    return pa.table([pa.array(digests), table["id"], table["caption"]], ["digest", "id", "caption"]).take(
        order
    )


def _digest(sample_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big"))


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    checksum = path.with_suffix(".crc32")
    checksum.write_text(_crc32(temporary))
    temporary.replace(path)


def _is_intact(path: Path) -> bool:
    checksum = path.with_suffix(".crc32")
    if not (path.exists() and checksum.exists()):
        return False
    if checksum.read_text() == _crc32(path):
        return True
    logging.warning(f"ARF: {path} does not match its checksum; building it again")
    return False


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _only_chunk(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
