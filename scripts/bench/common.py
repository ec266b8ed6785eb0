"""What every benchmark shares: interleaved timing, one table, one line per bar, JSON, and the exit status."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm


@dataclasses.dataclass
class Bar:
    """A promise that is measured.

    Attributes:
        claim: What is promised, in words.
        measured: The figure that was measured.
        bound: The figure that is promised.
        at_most: Whether the bound is an upper one.
        of: What it was measured on, where the same is promised of several things.
        error: Standard error of the figure, where it is known.
    """

    claim: str
    measured: float
    bound: float
    at_most: bool = True
    of: str = ""
    error: float = 0.0

    @property
    def met(self) -> bool:
        """Whether the figure is within the bound."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def missed(self) -> bool:
        """Whether it is outside by more than the noise of the measurement: two standard errors."""
        return not self.met and abs(self.measured - self.bound) > 2 * self.error

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        name = f"{self.of}: {self.claim}" if self.of else self.claim
        word = "met   " if self.met else "MISSED" if self.missed else "noise "
        error = f" ± {self.error:.2g}" if self.error else ""
        return f"{word} {name}: {self.measured:.4g}{error} {sign} {self.bound:.4g}"


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help="timed rounds; each runs every variant once")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    return made


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Times the variants in turn, round by round, so that drift of the machine hits all alike.

    Returns:
        Seconds per call, by variant.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in tqdm(range(-warmup, rounds), desc="rounds", disable=not sys.stderr.isatty()):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bracket(
    variants: Mapping[str, Callable[[], object]], reference: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Times each variant between two runs of the reference, so that drift within a round, too, hits both alike.

    Returns:
        Seconds per call, by variant; and of the other variants, their time by the mean of the two runs beside them, by
        round.
    """
    others = [name for name in variants if name != reference]
    runs = [f"{reference}, run {number}" for number in range(len(others) + 1)]
    calls = {runs[0]: variants[reference]}
    for name, run in zip(others, runs[1:], strict=True):
        calls |= {name: variants[name], run: variants[reference]}
    taken = interleave(calls, rounds)
    seconds = {reference: [value for run in runs for value in taken[run]]}
    ratios = {}
    for name, before, after in zip(others, runs, runs[1:], strict=False):
        beside = [(one + two) / 2 for one, two in zip(taken[before], taken[after], strict=True)]
        seconds[name] = taken[name]
        ratios[name] = [one / other for one, other in zip(taken[name], beside, strict=True)]
    return seconds, ratios


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of one variant's time by another's in the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def median(values: Sequence[float]) -> tuple[float, float]:
    """Median, and its standard error: that of a mean times sqrt(pi / 2), as for normal noise."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.median(values), spread * math.sqrt(math.pi / 2 / len(values))


def report(
    title: str,
    seconds: Mapping[str, Sequence[float]],
    bars: Sequence[Bar],
    out: Path | None,
    data: object = None,
    **facts: object,
) -> int:
    """Prints the table and the bars, writes JSON; `data` goes into the JSON alone.

    Returns:
        The exit status: 1 when a bar is missed by more than noise.
    """
    print(f"\n{title}")
    for name, value in facts.items():
        print(f"  {name}: {value}")
    if seconds:
        width = max(map(len, seconds))
        print(f"  {'':{width}} {'median':>10} {'min':>10} {'max':>10} {'n':>4}   (seconds)")
        for name, values in seconds.items():
            row = (statistics.median(values), min(values), max(values))
            print(f"  {name:{width}} {row[0]:10.4g} {row[1]:10.4g} {row[2]:10.4g} {len(values):4d}")
    for bar in bars:
        print(f"  {bar}")
    if out is not None:
        content = {
            "title": title,
            "command": _command(),
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "facts": facts,
            **({"data": data} if data is not None else {}),
            "seconds": {name: list(values) for name, values in seconds.items()},
            "bars": [{**dataclasses.asdict(bar), "met": bar.met} for bar in bars],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2, default=str) + "\n")
    return int(any(bar.missed for bar in bars))


def _command() -> str:
    """The command that runs, without where its JSON goes."""
    given = sys.argv[1:]
    if "--json" in given:
        where = given.index("--json")
        del given[where : where + 2]
    return " ".join(["python", f"scripts/bench/{Path(sys.argv[0]).name}", *given])
