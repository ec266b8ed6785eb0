"""Opens files of an anchor set, which is a folder or any fsspec URL; what goes wrong is an AnchorSetError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from arf_plugin.errors import AnchorSetError
from arf_plugin.files import stat_key
from arf_plugin.untrusted import printable, require_regular


@contextmanager
def opened_set(anchors: Path | str, what: str = "") -> Iterator[tuple[Any, str]]:
    """The file system of a set, and its folder in it; ``what`` of it is read in the block, for messages.

    Raises:
        AnchorSetError: it cannot be opened, or a file system's error ends the block.
    """
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(str(anchors))
        yield fs, root.rstrip("/")
    except (OSError, ValueError, ImportError) as cause:
        where = f"{anchors}/{what}" if what else anchors
        raise AnchorSetError(f"{where} cannot be read: {printable(str(cause))[:200]}.") from cause


@contextmanager
def opened_parquet(fs: Any, path: str, short: str, advice: str) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file; what Arrow raises within the block is an error about this file.

    Raises:
        AnchorSetError: beginning with ``short``, ending with ``advice``.
    """
    if is_local(fs):
        require_regular(Path(path), AnchorSetError)
    try:
        with fs.open(path, "rb") as stream:
            yield pq.ParquetFile(stream)
    # pyarrow raises ValueError and KeyError of its own, and those of Python for names that are no UTF-8.
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as cause:
        reason = " ".join(printable(str(cause)).split())[:300] or type(cause).__name__
        raise AnchorSetError(f"{short} is no readable parquet file: {reason}\n{advice}") from cause


def is_local(fs: Any) -> bool:
    """Whether an fsspec file system is that of this machine."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def file_stamp(fs: Any, name: str) -> str:
    """What changes when a file is written again, with equal size and time, too."""
    return repr(stat_key(Path(name))) if is_local(fs) else str(fs.ukey(name))
