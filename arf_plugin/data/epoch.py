"""The current epoch, visible to loader workers that were started before it began."""

from __future__ import annotations

from multiprocessing import Value


class SharedEpoch:
    """An integer in shared memory; open_clip keeps the same for its own shuffling."""

    def __init__(self, epoch: int = 0) -> None:
        self._value = Value("i", epoch)

    def set(self, epoch: int) -> None:
        """Sets the epoch for this process and its workers."""
        self._value.value = epoch

    def get(self) -> int:
        """Returns the epoch that was set last."""
        return self._value.value
