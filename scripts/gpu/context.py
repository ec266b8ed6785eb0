"""What a check is given, and what it returns."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import Bar, interleave


class Skipped(Exception):
    """What a check needs is not there; the message says what."""


@dataclasses.dataclass
class Context:
    """What a check is given.

    Attributes:
        device: ``cuda`` or ``cpu``.
        tiny: Whether sizes are as small as can be, for a look at the script itself.
        folder: Its own.
        jobs: Trainers that it may start at once.
        seconds: Time that it has.
    """

    device: str
    tiny: bool
    folder: Path
    jobs: int
    seconds: float

    def __post_init__(self) -> None:
        self._until = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds left, at least one."""
        return max(1.0, self._until - time.monotonic())

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def wait(self) -> None:
        """Waits until the device has done all that was asked of it."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def timed(
        self, calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
    ) -> dict[str, list[float]]:
        """Seconds of calls, run in turn, each waited for."""

        def waited(call: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                call()
                self.wait()

            return run

        self.wait()
        return interleave({name: waited(call) for name, call in calls.items()}, rounds, warmup)

    def of(self, name: str) -> dict[str, Any]:
        """Figures of a check that has run before; nothing if it has not."""
        path = self.folder.parent / name / "result.json"
        return json.loads(path.read_text()).get("figures", {}) if path.is_file() else {}


@dataclasses.dataclass
class Outcome:
    """What a check returns.

    Attributes:
        figures: What was measured, raw.
        bars: What was promised of it.
        summary: The most important of it in a few words.
        notes: What a reader has to know beside the figures.
    """

    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    bars: list[Bar] = dataclasses.field(default_factory=list)
    summary: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    def holds(self, claim: str, fact: bool) -> None:
        """Adds a promise that is kept or not."""
        self.bars.append(Bar(claim, float(fact), 1.0, at_most=False))

    def at_most(self, claim: str, measured: float, bound: float) -> None:
        """Adds an upper bound; what is not a number does not meet it."""
        self.bars.append(Bar(claim, float(measured), bound))

    def at_least(self, claim: str, measured: float, bound: float) -> None:
        """Adds a lower bound."""
        self.bars.append(Bar(claim, float(measured), bound, at_most=False))


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)
