"""Progress of long work: a bar on a terminal, one line a minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts samples of a stage and shows rate and remaining time on standard error.

    Args:
        stage: name to show.
        total: expected samples, if known; :meth:`expect` corrects it as shards finish.
        unit: what is counted.
        interval: seconds between two lines when standard error is not a terminal.
        shown: False counts without showing anything, for all but one of several processes.
    """

    def __init__(
        self,
        stage: str,
        total: int | None = None,
        unit: str = "images",
        interval: float = 60,
        shown: bool = True,
    ) -> None:
        self.stage, self.unit, self.interval, self.shown = stage, unit, interval, shown
        terminal = sys.stderr.isatty()
        # Where nobody watches, tqdm only counts: carriage returns make logs unreadable.
        self._bar = tqdm(
            desc=stage,
            total=total,
            unit=f" {unit}",
            disable=not (terminal and shown),
            smoothing=0.1,
            dynamic_ncols=True,
        )
        self._total, self._done, self._terminal = total, 0, terminal
        self._started = self._printed = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Adds finished samples."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self.shown and not self._terminal and now - self._printed >= self.interval:
            self._printed = now
            print(self.line(), file=sys.stderr, flush=True)

    def expect(self, total: int) -> None:
        """Sets the expected number of samples."""
        self._total = self._bar.total = max(total, self._done)

    def line(self) -> str:
        """One line for a log, such as ``caption: 1200 of 5000 images, 98.1 images/s, 0:00:39 left``."""
        seconds = time.monotonic() - self._started
        rate = self._done / seconds if seconds > 0 else 0.0
        text = f"{self.stage}: {self._done}"
        text += f" of {self._total} {self.unit}" if self._total else f" {self.unit}"
        text += f", {rate:.1f} {self.unit}/s"
        if self._total and rate > 0 and self._done < self._total:
            left = int((self._total - self._done) / rate)
            text += f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        return text

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self.shown and not self._terminal and self._done and kind is None:
            print(self.line(), file=sys.stderr, flush=True)
