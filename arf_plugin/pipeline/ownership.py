"""A folder has one owner: all processes at work in it have one configuration, and a new one waits until they are gone.

Each process holds a lock of the operating system on a file in the folder for as long as it is at work; those of one
configuration share it. Who wants to change the configuration, or to throw work away, must have it alone. The system
frees the locks of a process that is killed, in whatever way; Linux passes them on between the clients of an NFS server.
A file system without such locks still has the check that a stage makes before each file takes its name.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Ownership:
    """This process's hold on folders; a context manager, whose end gives them up.

    Args:
        locks: the lock files; they stay when nobody holds them.
    """

    def __init__(self, locks: Sequence[Path]) -> None:
        self._locks, self._held = sorted(set(locks)), ExitStack()
        self._files: list[int] = []

    def __enter__(self) -> Ownership:
        with ExitStack() as held:  # what is opened is closed again if the next one cannot be
            for path in self._locks:
                path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                self._files.append(os.open(path, flags, 0o666))
                held.callback(os.close, self._files[-1])
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def alone(self) -> bool:
        """Takes the folders for this process alone; False if another process is at work in one of them."""
        return all(self._lock(file, fcntl.LOCK_EX) for file in self._files)

    def share(self) -> bool:
        """Takes the folders together with others of the same configuration; False while one has them alone."""
        return all(self._lock(file, fcntl.LOCK_SH) for file in self._files)

    def names(self) -> set[str]:
        """What the folders' last owners were called; empty if there was none."""
        found = (os.pread(file, 100, 0) for file in self._files)
        return {name.decode("utf-8", "replace") for name in found if name}

    def sign(self, name: str) -> None:
        """Leaves a name for :meth:`names`; for a process that has the folders alone."""
        for file in self._files:
            os.ftruncate(file, 0)
            os.pwrite(file, name.encode(), 0)

    @staticmethod
    def _lock(file: int, kind: int) -> bool:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as cause:
            if cause.errno not in _NO_LOCKS:
                raise
        return True
