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

import filelock
import fsspec
import numpy as np
import pyarrow as pa

from arf_plugin.anchors.captions import read_caption_files
from arf_plugin.anchors.files import cache_folder

FORMAT = "arf-captions-1"


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
    def ids(self) -> pa.Array:
        """The ids of all rows."""
        return self._ids

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
