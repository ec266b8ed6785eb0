"""Tables by sample id, one memory-mapped file per machine, shared by all its processes.

Parquet is the exchange format. The first process that needs a table turns it into one that is sorted by the ids'
64-bit digests, in a cache folder; every loader worker of every process maps that file, so millions of rows exist in
memory once. A look-up is a binary search over the digests.

Where the user has named no folder for caches (``ARF_CACHE_DIR``) and the usual one cannot be used (no home, not
writable, full), a private folder below the system's temporary one takes its place: all processes of the user on this
machine find the same one, and training does not depend on a home folder. A folder that the user has named is used, or
refused.

The file is believed only if nobody else can have put it there, if it was made from these very parquet files, and if it
is sound in every respect that reading it relies on; otherwise it is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import filelock
import numpy as np
import pyarrow as pa

from arf_plugin.anchors.captions import is_local
from arf_plugin.errors import CacheError
from arf_plugin.files import cache_folder, remove_incomplete, replacing, stat_key
from arf_plugin.untrusted import utf8

_SAMPLE = 1000  # rows whose digests are computed again when a file is opened
_PATIENCE = 30 * 60  # seconds for another process to sort the table


class MappedTable:
    """Read-only rows by sample id, memory-mapped from the cache file at ``path``.

    Pickles as its path, so that loader workers started by any method map the same file.

    Attributes:
        path: the file.
        kind: what it holds, which is its folder in the cache.
        column: the column beside ``digest`` and ``id``.
    """

    kind: ClassVar[str]
    column: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            table = _mapped(path)
        except (pa.ArrowException, OSError, ValueError) as cause:
            raise CacheError(
                f"{path} is no readable cache of {self.kind}: {cause}. Delete it; it is made again from the anchor set."
            ) from cause
        self._digests = _only_chunk(table, "digest").to_numpy(zero_copy_only=True)
        self._ids = _only_chunk(table, "id")
        self._values = _only_chunk(table, self.column)

    def __reduce__(self) -> tuple[type[MappedTable], tuple[Path]]:
        return type(self), (self.path,)

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

    def _rows(self, sample_id: str) -> Iterator[int]:
        sample_id = utf8(sample_id)
        digest = _digest(sample_id)
        row = int(np.searchsorted(self._digests, digest))
        while row < len(self._digests) and self._digests[row] == digest:
            if self._ids[row].as_py() == sample_id:  # two ids may share a digest
                yield row
            row += 1


def mapped_file(kind: str, key: str, value: pa.Field, read: Callable[[], pa.Table]) -> Path:
    """Finds the cache file of a table, or makes it.

    Args:
        kind: what it holds, for messages; its folder in the cache.
        key: changes when the table does.
        value: the column beside ``id``.
        read: reads the table, with the columns ``id`` (large_string) and `value`.

    Raises:
        CacheError: there is no place for it.
    """
    schema = pa.schema([("digest", pa.uint64()), ("id", pa.large_string()), value])
    tables: list[pa.Table] = []

    def sort(path: Path) -> pa.Table:
        if not tables:
            logging.info(f"ARF: sorting the {kind} into {path} (once per machine)")
            tables.append(_sorted_table(read(), schema))
        return tables[0]

    problems: list[str] = []
    for folder in _folders(problems):
        path = folder / kind / f"{key[:32]}.arrow"
        try:
            _make(path, sort, schema)
            return path
        except OSError as cause:
            problems.append(f"{path.parent} ({cause.strerror or cause})")
            logging.warning(f"ARF: no {kind} can be kept in {problems[-1]}")
    raise CacheError(
        f"There is no place for the sorted {kind}: {', '.join(problems)}. "
        "Set ARF_CACHE_DIR to a folder with room that this user can write to."
    )


def file_stamp(fs: Any, name: str) -> str:
    """What changes when a file is written again, with equal size and time, too."""
    return repr(stat_key(Path(name))) if is_local(fs) else str(fs.ukey(name))


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


def _make(path: Path, sort: Callable[[Path], pa.Table], schema: pa.Schema) -> None:
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
            _write(sort(path), path)


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


def _sorted_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    digests = np.fromiter((_digest(text) for text in table["id"].to_pylist()), np.uint64, len(table))
    # A stable sort keeps several rows of one sample in the order of the files.
    order = np.argsort(digests, kind="stable")
    return pa.table([pa.array(digests), table["id"], table[schema.names[-1]]], schema.names).take(order)


def _digest(sample_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big"))


def _write(table: pa.Table, path: Path) -> None:
    """Writes the file, its checksum first: whatever moment a kill comes at, the two do not match or both are whole."""
    schema = table.schema.with_metadata({"arf": path.stem})
    with replacing(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(table.combine_chunks().replace_schema_metadata(schema.metadata))
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
        problem = problem or _problem(_mapped(path), path.stem, schema)
    except FileNotFoundError:
        return False
    except PermissionError:
        return False  # another user's
    except (pa.ArrowException, OSError, ValueError, KeyError) as cause:
        problem = f"cannot be read ({' '.join(str(cause).split())[:200]})"
    if problem is not None:
        logging.warning(f"ARF: {path} {problem}; building it again")
    return problem is None


def _is_own(path: Path) -> bool:
    """Whether it is a file of this user's, the administrator's, or of who owns the folder and can change all in it."""
    found = path.lstat()
    trusted = (os.getuid(), 0, path.parent.stat().st_uid)
    return stat.S_ISREG(found.st_mode) and found.st_uid in trusted


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _problem(table: pa.Table, key: str, schema: pa.Schema) -> str | None:
    """Says what look-ups must not be done in; a file may be damaged or planted and match its checksum nevertheless."""
    if not table.schema.remove_metadata().equals(schema) or any(c.num_chunks > 1 for c in table.columns):
        return "is another table"
    if (table.schema.metadata or {}).get(b"arf") != key.encode():
        return "was made from other files"
    table.validate(full=True)  # offsets that lead out of the file, text that is no UTF-8
    if any(column.null_count for column in table.columns):
        return "has gaps"
    digests, ids = _only_chunk(table, "digest").to_numpy(), _only_chunk(table, "id")
    if np.any(digests[1:] < digests[:-1]):
        return "is not sorted"
    for row in np.linspace(0, len(ids) - 1, min(len(ids), _SAMPLE)).astype(np.int64).tolist():
        if digests[row] != _digest(ids[row].as_py()):
            return "is not sorted by its ids"
    return None


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _only_chunk(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
