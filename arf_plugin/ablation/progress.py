"""Progress of several runs side by side: a bar for each and one over all; lines where nobody watches."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

from arf_plugin.ablation.launch import Step


class Board:
    """Bars, or lines, of the runs that are under way.

    Args:
        title: what the overall bar is called.
        runs: how many runs there are.
        jobs: how many run side by side.
        interval: seconds between two lines of a run when standard error is not a terminal.
    """

    def __init__(self, title: str, runs: int, jobs: int, interval: float = 60) -> None:
        self.interval, self.terminal = interval, sys.stderr.isatty()
        self.runs, self.done = runs, 0
        self._free = list(range(1, jobs + 1))  # lines below the overall bar
        self._lock = threading.Lock()
        self._overall = tqdm(
            total=runs, desc=title, unit=" runs", position=0, disable=not self.terminal, dynamic_ncols=True
        )

    def say(self, text: str) -> None:
        """Prints a line beside the bars."""
        with self._lock:
            if self.terminal:
                tqdm.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def begin(self, name: str, epochs: int) -> RunProgress:
        """Begins a run of so many epochs."""
        with self._lock:
            line = self._free.pop(0) if self._free else None
        return RunProgress(self, name, epochs, line)

    def end(self, line: int | None) -> None:
        """Takes a run's line back; one run fewer is left."""
        with self._lock:
            if line is not None:
                self._free = sorted([*self._free, line])
            self.done += 1
            self._overall.update(1)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._overall.close()


class RunProgress:
    """Progress of one run, in images as the trainer counts them; a context manager."""

    def __init__(self, board: Board, name: str, epochs: int, line: int | None) -> None:
        self.board, self.name, self.epochs, self.line = board, name, epochs, line
        self.started = self.printed = time.monotonic()
        self.images, self.first, self.total, self.loss = 0, 0, 0, float("nan")
        self._bar = tqdm(
            desc=f"  {name}",
            unit=" images",
            position=line,
            leave=False,
            disable=not board.terminal or line is None,
            dynamic_ncols=True,
        )

    def advance(self, step: Step) -> None:
        """Takes in a progress line of the trainer."""
        images = step.epoch * step.epoch_images + min(step.images, step.epoch_images)
        if not self.images and step.epoch:  # a run that goes on; its rate is that of this start
            self.first = step.epoch * step.epoch_images
        self.images, self.loss = images, step.loss
        self.total = self._bar.total = step.epoch_images * self.epochs
        if not self._bar.disable:
            self._bar.set_postfix_str(f"epoch {step.epoch + 1}, loss {step.loss:.3f}", refresh=False)
            self._bar.update(images - self._bar.n)
        now = time.monotonic()
        if not self.board.terminal and now - self.printed >= self.interval:
            self.printed = now
            self.board.say(self.text())

    @property
    def interval(self) -> float:
        """Seconds between two lines."""
        return self.board.interval

    def text(self) -> str:
        """One line, such as ``arf-0: 1200 of 13440 images, 98.1 images/s, loss 2.310``."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        total = f" of {self.total}" if self.total else ""
        rate = (self.images - self.first) / seconds
        return f"{self.name}: {self.images}{total} images, {rate:.1f} images/s, loss {self.loss:.3f}"

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self.board.end(self.line)
        if kind is None:
            seconds = time.monotonic() - self.started
            loss = "" if self.loss != self.loss else f", loss {self.loss:.3f}"
            self.board.say(
                f"{self.name}: done in {duration(seconds)}{loss} ({self.board.done} of {self.board.runs} runs)"
            )


def duration(seconds: float) -> str:
    """Seconds as ``0:05:12``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
