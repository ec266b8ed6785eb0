"""Figures per arm, alpha and average: mean, spread over seeds, and the error that the number of test images leaves.

Two kinds of noise are kept apart. The spread over seeds is measured. The error of the test images is what new images of
the same kind would change: binomial, ``sqrt(p (1 - p) / n)`` per set, carried through the suite's averages. It is an
upper bound, for it takes a seed's mistakes for independent of another seed's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arf_plugin.errors import EvaluationError, ReportError
from arf_plugin.evaluation.suites import Average, Suite, average, load_suite
from arf_plugin.report.sources import Measurement

Seeds = dict[int | None, float]
Key = tuple[str, float | None]  # arm and alpha; None is the fine-tuned model itself


@dataclass(frozen=True)
class Figure:
    """A figure over seeds, in percent.

    Attributes:
        seeds: by seed; the model before fine-tuning has None for a seed.
        image_error: standard error that the number of test images leaves, at most.
    """

    seeds: Seeds
    image_error: float

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.seeds.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for one."""
        return statistics.stdev(self.seeds.values()) if len(self.seeds) > 1 else None


class Averages:
    """The averages of one or several suites; without any, one per set.

    Args:
        suites: names or paths.
        sets: names of the measured sets.
    """

    def __init__(self, suites: Sequence[str], sets: Sequence[str]) -> None:
        loaded = [load_suite(name) for name in suites] or [_plain(sets)]
        repeated = [name for suite in loaded for name in suite.averages]
        self.suites = loaded
        self.known: dict[str, Average] = {}
        self._names: dict[tuple[str, str], str] = {}
        for suite in loaded:
            for name, entry in suite.averages.items():
                shown = name if repeated.count(name) == 1 else f"{suite.name}: {name}"
                self.known[shown] = entry
                self._names[suite.name, name] = shown

    def of(self, values: Mapping[str, float]) -> dict[str, float]:
        """Averages of figures by set; those that lack a set are left out."""
        result = {}
        for suite in self.suites:
            for name, value in average(suite, values).items():
                result[self._names[suite.name, name]] = value
        return result

    def error(self, values: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
        """Standard errors of the averages from those of the sets, by the first derivatives."""
        start, step = self.of(values), 0.01
        squares = dict.fromkeys(start, 0.0)
        for name, error in errors.items():
            moved = self.of({**values, name: values[name] + step})
            for key in start:
                squares[key] += ((moved[key] - start[key]) / step * error) ** 2
        return {name: math.sqrt(square) for name, square in squares.items()}

    def kind(self, name: str) -> str:
        """The kind of an average."""
        return self.known[name].kind

    def sets(self, name: str) -> tuple[str, ...]:
        """The sets of an average, those of a harmonic mean's parts included."""
        entry = self.known[name]
        if entry.harmonic is None:
            return entry.of
        parts = [self.known[other] for other in entry.harmonic]
        return tuple(dict.fromkeys(member for part in parts for member in part.of))


class Results:
    """Everything measured on one split.

    Args:
        measured: measurements; of two of one thing, the later counts.
        averages: of the suites.
    """

    def __init__(self, measured: Iterable[Measurement], averages: Averages) -> None:
        self.averages = averages
        self.rows: dict[Key, dict[int | None, dict[str, Measurement]]] = {}
        for item in measured:
            self.rows.setdefault((item.arm, item.alpha), {}).setdefault(item.seed, {})[item.row["set"]] = item

    @property
    def sets(self) -> list[str]:
        """Names of the measured sets, in the suites' order."""
        found = {name for seeds in self.rows.values() for sets in seeds.values() for name in sets}
        known = [name for suite in self.averages.suites for name in suite.sets if name in found]
        return [*known, *sorted(found - set(known))]

    @property
    def unit(self) -> str:
        """What the figures are, for headings."""
        rows = [item.row for seeds in self.rows.values() for sets in seeds.values() for item in sets.values()]
        return "top-1 %" if {row["headline"] for row in rows} <= {"top1"} else "accuracy, %"

    def alphas(self) -> list[float]:
        """All alphas of mixtures."""
        return sorted({alpha for _, alpha in self.rows if alpha is not None})

    def images(self, name: str) -> int | None:
        """Images of a set; None if rows do not say."""
        counts = [
            sets[name].row.get("images")
            for seeds in self.rows.values()
            for sets in seeds.values()
            if name in sets
        ]
        return counts[0] if counts and isinstance(counts[0], int) else None

    def by_average(self, metric: str | None = None) -> dict[Key, dict[str, Figure]]:
        """Figures by arm, alpha and average.

        Args:
            metric: a metric's name; None for each set's headline.
        """
        result: dict[Key, dict[str, Figure]] = {}
        for key, seeds in self.rows.items():
            values = {seed: _values(sets, metric) for seed, sets in seeds.items()}
            per_seed = {seed: self.averages.of(found) for seed, found in values.items()}
            figures = {}
            for name in self.averages.known:
                complete = {seed: found[name] for seed, found in per_seed.items() if name in found}
                if complete:
                    figures[name] = Figure(
                        complete, self._error([values[seed] for seed in complete], seeds, name)
                    )
            result[key] = figures
        return result

    def by_set(self, metric: str | None = None) -> dict[Key, dict[str, Figure]]:
        """Figures by arm, alpha and set."""
        result: dict[Key, dict[str, Figure]] = {}
        for key, seeds in self.rows.items():
            figures = {}
            for name in self.sets:
                values = {seed: _values(sets, metric) for seed, sets in seeds.items() if name in sets}
                found = {seed: one[name] for seed, one in values.items() if name in one}
                if found:
                    figures[name] = Figure(
                        found, binomial(statistics.fmean(found.values()), self.images(name))
                    )
            result[key] = figures
        return result

    def _error(
        self,
        values: Sequence[Mapping[str, float]],
        seeds: Mapping[int | None, Mapping[str, Measurement]],
        name: str,
    ) -> float:
        members = self.averages.sets(name)
        means = {member: statistics.fmean(found[member] for found in values) for member in members}
        errors = {member: binomial(means[member], self.images(member)) for member in members}
        return self.averages.error(means, errors).get(name, 0.0)

    def truncated(self) -> list[str]:
        """Sets with fewer images than a whole copy has, each as a sentence."""
        notes = []
        for name in self.sets:
            rows = [sets[name].row for seeds in self.rows.values() for sets in seeds.values() if name in sets]
            expected, images = rows[0].get("expected_images"), rows[0].get("images")
            if isinstance(expected, int) and isinstance(images, int) and images != expected:
                notes.append(f"{name} has {images:,} images where a whole copy has {expected:,}.")
            if len({row.get("images") for row in rows}) > 1:
                notes.append(f"{name} was not measured on equally many images everywhere.")
        return notes


def suites_of(
    measured: Iterable[Measurement], given: Sequence[str] = (), known: Sequence[str] = ()
) -> list[str]:
    """The suites whose averages are shown, as names or files.

    Args:
        measured: rows, which name suites without saying where own ones are.
        given: what to take in place of them.
        known: names and files of suites that may be meant, as grids name them.

    Raises:
        ReportError: if a suite is not one that comes with the package, and its file is not known.
    """
    if given:
        names = list(given)
    else:
        files = {Path(name).stem: name for name in known}
        found = (item.row.get("suite") for item in measured)
        names = [files.get(name, name) for name in dict.fromkeys(found) if isinstance(name, str)]
        for name in names:
            if name not in files.values() and is_file_of_suite(
                name
            ):  # rows name suites, and no files to be opened
                raise ReportError(
                    f"The rows are of the suite '{name}', which is no name. Give --suite FILE.yaml."
                )
    for name in names:
        try:
            load_suite(name)
        except EvaluationError as cause:
            raise ReportError(
                f"The rows are of the suite '{name}', whose averages are needed: {cause}\n"
                "Name the suite's file with --suite FILE.yaml."
            ) from cause
    return names


def is_file_of_suite(name: str) -> bool:
    """Whether a suite is given by its file."""
    return Path(name).suffix in (".yaml", ".yml")


def binomial(percent: float, images: int | None) -> float:
    """Standard error of an accuracy in percent; 0 if the number of images is not known."""
    share = min(max(percent / 100.0, 0.0), 1.0)
    return 100.0 * math.sqrt(share * (1.0 - share) / images) if images else 0.0


def _values(sets: Mapping[str, Measurement], metric: str | None) -> dict[str, float]:
    found = {name: item.row["metrics"].get(metric or item.row["headline"]) for name, item in sets.items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


def _plain(sets: Sequence[str]) -> Suite:
    """What stands in for a suite: every set by itself."""
    averages = {name: Average.model_construct(kind="", of=(name,)) for name in sets}  # of no kind
    return Suite.model_construct(name="", description="", sets={}, averages=averages)
