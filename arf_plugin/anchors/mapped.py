"""Tables by sample id, one memory-mapped file per machine, shared by all its processes.

Parquet is the exchange format. The first process that needs a table turns it into a file in a cache folder: two Arrow
streams, of the rows as they are in the parquet files, and of an index of them that is sorted by the ids' 64-bit
digests. Every loader worker of every process maps that file, so millions of rows exist in memory once. A look-up is a
binary search over the digests. Writing and checking take the rows batch by batch, beside 16 bytes a row of the index.

Where the user has named no folder for caches (``ARF_CACHE_DIR``) and the usual one cannot be used (no home, not
writable, full), a private folder below the system's temporary one takes its place: all processes of the user on this
machine find the same one, and training does not depend on a home folder. A folder that the user has named is used, or
refused.

The file is believed only if nobody else can have put it there, if it was made from these very parquet files, and if it
is sound in every respect that reading it relies on; otherwise it is made again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import filelock
import numpy as np
import pyarrow as pa

from arf_plugin.anchors.text_columns import digest, digests
from arf_plugin.errors import CacheError
from arf_plugin.files import cache_folder, remove_incomplete, replacing
from arf_plugin.untrusted import utf8

_INDEX = pa.schema([("digest", pa.uint64()), ("row", pa.int64())])
_AT_ONCE = 1 << 16  # ids that are looked for at once
_SAMPLE = 1000  # rows whose digests are computed again when a file is opened
_PATIENCE = 30 * 60  # seconds for another process to sort the table


class MappedTable:
    """Read-only rows by sample id, memory-mapped from the cache file at ``path``.

    Pickles as its path, so that loader workers started by any method map the same file.
    """

    kind: ClassVar[str]  # what it holds, which is its folder in the cache
    column: ClassVar[str]  # the column beside ``id``

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            table, index = _mapped(path)
            self._digests, self._places = (index[name].to_numpy() for name in _INDEX.names)
            self._ids, self._values = table["id"], table[self.column]
        except (pa.ArrowException, OSError, ValueError, KeyError, StopIteration) as cause:
            raise CacheError(
                f"{path} is no readable cache of {self.kind}: {cause}. Delete it; it is made again from the anchor set."
            ) from cause

    def __reduce__(self) -> tuple[type[MappedTable], tuple[Path]]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, sample_id: str) -> bool:
        return next(self._rows(sample_id), None) is not None

    @property
    def ids(self) -> pa.ChunkedArray:
        """The ids of all rows, in the order of the parquet files."""
        return self._ids

    @property
    def example_id(self) -> str:
        """One of the ids, for messages."""
        return self._ids[0].as_py() if len(self) else ""

    @cached_property
    def samples(self) -> int:
        """The number of different ids, by their digests."""
        return int(np.count_nonzero(self._digests[1:] != self._digests[:-1])) + (len(self) > 0)

    def covers(self, ids: list[str]) -> np.ndarray:
        """Which of some ids have a row [n], by their digests."""
        covered = np.zeros(len(ids), bool)
        for start in range(0, len(ids) if len(self) else 0, _AT_ONCE):
            wanted = digests(pa.array(ids[start : start + _AT_ONCE], pa.large_string()))
            place = np.minimum(np.searchsorted(self._digests, wanted), len(self) - 1)
            covered[start : start + _AT_ONCE] = self._digests[place] == wanted
        return covered

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in batches, read: what a process has mapped counts as its memory until the system wants it back."""
        with pa.OSFile(str(self.path)) as source:
            yield from pa.ipc.open_stream(source)

    def _rows(self, sample_id: str) -> Iterator[int]:
        sample_id = utf8(sample_id)
        wanted = np.uint64(digest(sample_id))
        for place in range(int(self._digests.searchsorted(wanted)), len(self)):
            if self._digests[place] != wanted:
                return
            row = int(self._places[place])
            if self._ids[row].as_py() == sample_id:  # two ids may share a digest
                yield row


def mapped_file(kind: str, key: str, value: pa.Field, read: Callable[[], Iterable[pa.Table]]) -> Path:
    """Finds the cache file of a table, or makes it.

    Args:
        kind: what it holds, for messages; its folder in the cache.
        key: changes when the table does.
        value: the column beside ``id``.
        read: reads the table in parts, with the columns ``id`` (large_string) and `value`.

    Raises:
        CacheError: there is no place for it.
    """
    schema = pa.schema([("id", pa.large_string()), value])
    problems: list[str] = []
    for folder in _folders(problems):
        path = folder / kind / f"{key[:32]}.arrow"
        try:
            _make(path, read, schema)
            return path
        except OSError as cause:
            problems.append(f"{path.parent} ({cause.strerror or cause})")
            logging.warning(f"ARF: no {kind} can be kept in {problems[-1]}")
    raise CacheError(
        f"There is no place for the sorted {kind}: {', '.join(problems)}. "
        "Set ARF_CACHE_DIR to a folder with room that this user can write to."
    )


def _folders(problems: list[str]) -> Iterator[Path]:
    """The places for the cache file: the user's choice, or the usual one and then a private temporary one."""
    if os.environ.get("ARF_CACHE_DIR"):
        yield cache_folder()
        return
    try:
        yield cache_folder()
    except CacheError:
        problems.append("the home folder (this user has none)")
    private = Path(tempfile.gettempdir()) / f"arf-plugin-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            private.mkdir(mode=0o700)
        found = private.lstat()
    except OSError as cause:
        problems.append(f"{private} ({cause.strerror or cause})")
        return
    # Anyone can make a folder of that name before us, or a link to another one.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        problems.append(f"{private} (it is not this user's alone)")
        return
    yield private


def _make(path: Path, read: Callable[[], Iterable[pa.Table]], schema: pa.Schema) -> None:
    """Makes the cache file unless it is there and sound; one process of all does the work.

    Raises:
        OSError: there is no place for it.
    """
    if _is_intact(path, schema):  # nothing needs to be written, or to be waited for
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".arrow.lock")
    if lock.is_symlink() or (lock.exists() and not lock.is_file()):
        raise FileExistsError(None, "is in the way, remove it", str(lock))
    with _locked(lock):
        if not _is_intact(path, schema):
            remove_incomplete(path.parent, all_hosts=False)
            logging.info(f"ARF: sorting the {path.parent.name} into {path} (once per machine)")
            _write(read(), path, schema)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=10)
    except filelock.Timeout:
        logging.info(f"ARF: another process sorts the {path.parent.name}, and holds {path}")
        try:
            lock.acquire(timeout=_PATIENCE)
        except filelock.Timeout:
            raise CacheError(
                f"Another process has held {path} for {_PATIENCE // 60} minutes. End it, or set ARF_CACHE_DIR to a "
                "folder of your own."
            ) from None
    try:
        yield
    finally:
        lock.release()


def _write(parts: Iterable[pa.Table], path: Path, schema: pa.Schema) -> None:
    """Writes the file, its checksum first: whatever moment a kill comes at, the two do not match or both are whole."""
    key = {"arf": path.stem}
    with replacing(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink:
            found = [np.zeros(0, np.uint64)]
            with pa.ipc.new_stream(sink, schema.with_metadata(key)) as rows:
                for part in parts:
                    rows.write_table(part)
                    found += map(digests, part["id"].chunks)
            sorted_digests = np.concatenate(found)
            del found
            # A stable sort keeps several rows of one sample in the order of the files.
            order = np.argsort(sorted_digests, kind="stable")
            sorted_digests = sorted_digests[order]
            with pa.ipc.new_stream(sink, _INDEX.with_metadata(key)) as index:
                index.write_batch(pa.record_batch([sorted_digests, order], _INDEX))
        value = _crc32(temporary)
        with replacing(path.with_suffix(".crc32")) as checksum:
            checksum.write_text(value)


def _is_intact(path: Path, schema: pa.Schema) -> bool:
    """Whether the file is there, this user's, unchanged since it was written, and sound."""
    checksum = path.with_suffix(".crc32")
    try:
        if not (_is_own(path) and _is_own(checksum)):
            return False
        with checksum.open("rb") as file:
            expected = file.read(64)
        problem = None if expected == _crc32(path).encode() else "does not match its checksum"
        problem = problem or _problem(path, schema)
    except FileNotFoundError:
        return False
    except PermissionError:
        return False  # another user's
    except (pa.ArrowException, OSError, ValueError, KeyError, StopIteration) as cause:
        problem = f"cannot be read ({' '.join(str(cause).split())[:200]})"
    if problem is not None:
        logging.warning(f"ARF: {path} {problem}; building it again")
    return problem is None


def _is_own(path: Path) -> bool:
    """Whether it is a file of this user's, the administrator's, or of who owns the folder and can change all in it."""
    found = path.lstat()
    trusted = (os.getuid(), 0, path.parent.stat().st_uid)
    return stat.S_ISREG(found.st_mode) and found.st_uid in trusted


def _mapped(path: Path) -> tuple[pa.Table, pa.RecordBatch]:
    """The rows and the index, memory-mapped."""
    source = pa.memory_map(str(path))
    rows = pa.ipc.open_stream(source).read_all()
    return rows, pa.ipc.open_stream(source).read_next_batch()


def _problem(path: Path, schema: pa.Schema) -> str | None:
    """Says what look-ups must not be done in; a file may be damaged or planted and match its checksum nevertheless."""
    rows = 0
    with pa.OSFile(str(path)) as source:
        for part in (schema, _INDEX):
            stream = pa.ipc.open_stream(source)
            if not stream.schema.remove_metadata().equals(part):
                return "is another table"
            if (stream.schema.metadata or {}).get(b"arf") != path.stem.encode():
                return "was made from other files"
            found = 0
            for batch in stream:
                batch.validate(full=True)  # offsets that lead out of the file, text that is no UTF-8
                if any(column.null_count for column in batch.columns):
                    return "has gaps"
                if part is _INDEX and (found or batch.num_rows != rows or not _is_index(batch)):
                    return "is not sorted"
                found += batch.num_rows
            rows = found
    table, index = _mapped(path)
    found_digests, places = (index[name].to_numpy() for name in _INDEX.names)
    for place in np.linspace(0, rows - 1, min(rows, _SAMPLE)).astype(np.int64).tolist():
        if found_digests[place] != digest(table["id"][int(places[place])].as_py()):
            return "is not sorted by its ids"
    return None


def _is_index(batch: pa.RecordBatch) -> bool:
    """Whether digests ascend, and rows are rows."""
    found, rows = (batch[name].to_numpy() for name in _INDEX.names)
    return bool(np.all(found[1:] >= found[:-1]) and np.all((rows >= 0) & (rows < len(rows))))


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
