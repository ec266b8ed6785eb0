"""Scores per arm, alpha and average; what differs from what, and what is within noise.

Two kinds of noise are kept apart. The spread over seeds is measured. The error of the test images is what new images of
the same kind would change: binomial, ``sqrt(p (1 - p) / n)`` per set, carried through the suite's averages. It is an
upper bound, for it takes a seed's mistakes for independent of another seed's.

A difference is taken seed by seed (both arms share the seed), so what a seed does to both drops out. Where records say
which images were right, it is taken image by image, too: interval and verdict are those of
:mod:`arf_plugin.evaluation.verdicts`, and hold for new images and new seeds.

Otherwise the 95 % interval is Student's, with one degree of freedom less than seeds. The test images leave an error of
their own, which more seeds do not lower; its bound here takes the two arms' mistakes for independent, though both see
the same images, so the true one is smaller. A verdict names the strictest claim that holds:

=============  =================================================================================================
``ahead``      the interval over seeds leaves out zero, and the mean exceeds 1.96 errors of the test images
``ahead here`` the interval over seeds leaves out zero: true of these test images, open for new ones
``level``      within noise, in either direction; so is every difference of a single seed below 1.96 image errors
``behind``, ``behind here``   likewise
=============  =================================================================================================

One seed alone gives no interval then; its verdict is ``here`` at most.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arf_plugin.errors import EvaluationError, ReportError
from arf_plugin.evaluation.suites import Average, Suite, average, load_suite
from arf_plugin.evaluation.verdicts import ByRun, Comparison, Verdict, compare, single
from arf_plugin.report.sources import Measurement

Seeds = dict[int | None, float]
Key = tuple[str, float | None]  # arm and alpha; None is the fine-tuned model itself

MEANINGS = {
    "ahead": "ahead, beyond both kinds of noise",
    "ahead here": "ahead over the seeds, within the error of the test images",
    "level": "level within noise",
    "behind here": "behind over the seeds, within the error of the test images",
    "behind": "behind, beyond both kinds of noise",
}


@dataclass(frozen=True)
class Score:
    """A score over seeds, in percent.

    Attributes:
        seeds: By seed; the model before fine-tuning has None for a seed.
        image_error: Standard error that the number of test images leaves, at most.
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

    def __str__(self) -> str:
        """``43.6 ± 0.9``, without a deviation where there is one seed."""
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


@dataclass(frozen=True)
class Difference(Score):
    """One arm less another, in points of percent.

    Attributes:
        paired: the verdict by image, where records say which images were right.
    """

    paired: Verdict | None = None

    @property
    def error(self) -> float | None:
        """Standard error of the mean over seeds; None for one seed."""
        return None if self.deviation is None else self.deviation / math.sqrt(len(self.seeds))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval: over images and seeds, if they are paired by image; else over seeds, None for one."""
        if self.paired is not None:
            return self.paired.low, self.paired.high
        if self.error is None:
            return None
        from scipy.special import stdtrit  # Student's quantiles; scipy.stats takes seconds to import

        half = float(stdtrit(len(self.seeds) - 1, 0.975)) * self.error
        return self.mean - half, self.mean + half

    @property
    def half(self) -> float | None:
        """Half of the interval."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    @property
    def every_seed(self) -> bool:
        """True if it has the same sign in every seed."""
        return len({value > 0 for value in self.seeds.values()}) == 1 and 0 not in self.seeds.values()

    @property
    def verdict(self) -> str:
        """See the module's docstring."""
        if self.paired is not None:
            return self.paired.word
        side = "ahead" if self.mean > 0 else "behind"
        beyond_images = abs(self.mean) > 1.96 * self.image_error
        if self.interval is None:
            return f"{side} here" if beyond_images and self.mean else "level"
        low, high = self.interval
        if low <= 0 <= high:
            return "level"
        return side if beyond_images else f"{side} here"


def difference(one: Score, other: Score, paired: Verdict | None = None) -> Difference | None:
    """One less the other over the seeds that both have; a model without a seed is compared with every seed.

    Args:
        one: an arm's score.
        other: the score of the arm it is compared with.
        paired: the verdict by image.

    Returns:
        None if they share no seed.
    """
    if set(other.seeds) == {None}:
        pairs = {seed: value - other.seeds[None] for seed, value in one.seeds.items()}
    elif set(one.seeds) == {None}:
        pairs = {seed: one.seeds[None] - value for seed, value in other.seeds.items()}
    else:
        pairs = {seed: value - other.seeds[seed] for seed, value in one.seeds.items() if seed in other.seeds}
    return Difference(pairs, math.hypot(one.image_error, other.image_error), paired) if pairs else None


def differences(
    one: Mapping[str, Score], other: Mapping[str, Score], paired: Mapping[str, Verdict]
) -> dict[str, Difference]:
    """What two arms differ by, by average; see :func:`difference`."""
    found = {
        name: difference(score, other[name], paired.get(name)) for name, score in one.items() if name in other
    }
    return {name: item for name, item in found.items() if item is not None}


def signed(value: float) -> str:
    """A difference with its sign and one decimal; the minus is a minus."""
    return f"{value:+.1f}".replace("-", "−")


def sentence(one: str, other: str, found: Mapping[str, Difference]) -> str:
    """Says in words how one arm compares with another on every average; empty if nothing compares.

    Args:
        one: Label of the arm.
        other: Label of the arm that it is compared with.
        found: Their differences by average.
    """
    seeds = max((len(item.seeds) for item in found.values()), default=0)
    parts = []
    for verdict in MEANINGS:
        group = {name: item for name, item in found.items() if item.verdict == verdict}
        if not group:
            continue
        side = verdict.removesuffix(" here")
        *words, last = [f"{name} ({signed(item.mean)})" for name, item in group.items()]
        text = f"{side} within noise on " if side == "level" else f"{side} on "
        text += f"{', '.join(words)} and {last}" if words else last
        everywhere = all(item.every_seed and len(item.seeds) == seeds for item in group.values())
        if side != "level" and seeds > 1 and everywhere:
            text += ", in every seed"
        if side != verdict:
            text += f"{',' if 'every' in text else ''} but within the error of the test images"
        parts.append(text)
    if not parts:
        return ""
    return f"{one} against {other} ({'one seed' if seeds == 1 else f'{seeds} seeds'}): {'; '.join(parts)}."


class Averages:
    """The averages of one or several suites; without any, one per set.

    Args:
        suites: Names or paths.
        sets: Names of the measured sets.
    """

    def __init__(self, suites: Sequence[str], sets: Sequence[str]) -> None:
        by_set = Suite.model_construct(name="", description="", sets={}, averages=single(sets))
        self.suites = [load_suite(name) for name in suites] or [by_set]
        repeated = [name for suite in self.suites for name in suite.averages]
        self.known: dict[str, Average] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._sets: dict[str, tuple[str, ...]] = {}
        for suite in self.suites:
            for name, entry in suite.averages.items():
                shown = name if repeated.count(name) == 1 else f"{suite.name}: {name}"
                parts = (
                    [entry] if entry.harmonic is None else [suite.averages[part] for part in entry.harmonic]
                )
                self.known[shown], self._names[suite.name, name] = entry, shown
                self._sets[shown] = tuple(dict.fromkeys(member for part in parts for member in part.of))

    @property
    def main(self) -> list[str]:
        """Those to talk about and to draw; class splits mix the same scores anew, and stand in the table alone."""
        return [name for name in self.known if self.kind(name) != "class-split"] or list(self.known)

    def of(self, values: Mapping[str, float]) -> dict[str, float]:
        """Averages of scores by set; those that lack a set are left out."""
        return {
            self._names[suite.name, name]: value
            for suite in self.suites
            for name, value in average(suite, values).items()
        }

    def compare(self, one: ByRun, other: ByRun) -> Comparison:
        """Compares two arms' records by image, on all averages."""
        found = Comparison({}, {})
        for suite in self.suites:
            of_suite = compare(one, other, suite.averages)
            shown = {name: self._names[suite.name, name] for name in suite.averages}
            found.verdicts.update({shown[name]: verdict for name, verdict in of_suite.verdicts.items()})
            found.unpaired.update({shown[name]: reason for name, reason in of_suite.unpaired.items()})
        return found

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
        return self._sets[name]


class Results:
    """Everything measured on one split.

    Args:
        measured: Measurements; of two of one thing, the later counts.
        averages: Of the suites.
    """

    def __init__(self, measured: Iterable[Measurement], averages: Averages) -> None:
        self.averages = averages
        latest = {(one.arm, one.alpha, one.seed, one.record["set"]): one.record for one in measured}
        self.records: dict[Key, dict[int | None, dict[str, dict[str, Any]]]] = {}  # by seed and set
        for (arm, alpha, seed, name), record in latest.items():
            self.records.setdefault((arm, alpha), {}).setdefault(seed, {})[name] = record
        self.unpaired: dict[str, str] = {}  # why averages could not be compared by image

    @property
    def sets(self) -> list[str]:
        """Names of the measured sets, in the suites' order."""
        found = {record["set"] for record in self._all()}
        known = [name for suite in self.averages.suites for name in suite.sets if name in found]
        return [*known, *sorted(found - set(known))]

    @property
    def unit(self) -> str:
        """What the scores are, for headings."""
        return "top-1 %" if {record["headline"] for record in self._all()} <= {"top1"} else "accuracy, %"

    def verdicts(self, one: Key, other: Key) -> dict[str, Verdict]:
        """Verdicts by image on one arm less another, by average; `unpaired` has why others are missing."""
        found = self.averages.compare(self.records[one], self.records[other])
        self.unpaired.update(found.unpaired)
        return found.verdicts

    def alphas(self) -> list[float]:
        """All alphas of mixtures."""
        return sorted({alpha for _, alpha in self.records if alpha is not None})

    def images(self, name: str) -> int | None:
        """Images of a set; None if records do not say."""
        count = next((record.get("images") for record in self._all() if record["set"] == name), None)
        return count if isinstance(count, int) else None

    def digests(self, arm: str, field: str = "digest", mixed: bool = False) -> set[str | None]:
        """Digests of an arm's own checkpoints, or of what they were mixed with."""
        return {
            record.get(field)
            for (name, alpha), seeds in self.records.items()
            if name == arm and (alpha is not None) == mixed
            for sets in seeds.values()
            for record in sets.values()
        }

    def by_average(self, metric: str | None = None) -> dict[Key, dict[str, Score]]:
        """Scores by arm, alpha and average.

        Args:
            metric: A metric's name; None for each set's headline.
        """
        result = {}
        for key, seeds in self._values(metric).items():
            averaged = {seed: self.averages.of(values) for seed, values in seeds.items()}
            result[key] = _over_seeds(averaged, self.averages.known, partial(self._error, seeds))
        return result

    def by_set(self, metric: str | None = None) -> dict[Key, dict[str, Score]]:
        """Scores by arm, alpha and set."""

        def error(name: str, found: Seeds) -> float:
            return binomial(statistics.fmean(found.values()), self.images(name))

        return {key: _over_seeds(seeds, self.sets, error) for key, seeds in self._values(metric).items()}

    def truncated(self) -> list[str]:
        """Sets with fewer images than a whole copy has, each as a sentence."""
        notes = []
        for name in self.sets:
            records = [record for record in self._all() if record["set"] == name]
            expected, images = records[0].get("expected_images"), records[0].get("images")
            if isinstance(expected, int) and isinstance(images, int) and images != expected:
                notes.append(f"{name} has {images:,} images where a whole copy has {expected:,}.")
            if len({record.get("images") for record in records}) > 1:
                notes.append(f"{name} was not measured on equally many images everywhere.")
        return notes

    def _all(self) -> list[dict[str, Any]]:
        return [
            record for seeds in self.records.values() for sets in seeds.values() for record in sets.values()
        ]

    def _values(self, metric: str | None) -> dict[Key, dict[int | None, dict[str, float]]]:
        return {
            key: {
                seed: {
                    name: float(value)
                    for name, record in sets.items()
                    if (value := record["metrics"].get(metric or record["headline"])) is not None
                }
                for seed, sets in seeds.items()
            }
            for key, seeds in self.records.items()
        }

    def _error(self, values: Mapping[int | None, Mapping[str, float]], name: str, found: Seeds) -> float:
        members = self.averages.sets(name)
        means = {member: statistics.fmean(values[seed][member] for seed in found) for member in members}
        errors = {member: binomial(means[member], self.images(member)) for member in members}
        return self.averages.error(means, errors).get(name, 0.0)


def _over_seeds(
    by_seed: Mapping[int | None, Mapping[str, float]],
    names: Iterable[str],
    error: Callable[[str, Seeds], float],
) -> dict[str, Score]:
    scores = {}
    for name in names:
        found = {seed: values[name] for seed, values in by_seed.items() if name in values}
        if found:
            scores[name] = Score(found, error(name, found))
    return scores


def suites_of(
    measured: Iterable[Measurement], given: Sequence[str] = (), known: Sequence[str] = ()
) -> list[str]:
    """The suites whose averages are shown, as names or files.

    Args:
        measured: Records, which name suites without saying where own ones are.
        given: What to take in place of them.
        known: Names and files of suites that may be meant, as grids name them.

    Raises:
        ReportError: If a suite is not one that comes with the package, and its file is not known.
    """
    names = list(given)
    if not given:
        files = {Path(name).stem: name for name in known}
        found = dict.fromkeys(one.record.get("suite") for one in measured)
        names = [files.get(name, name) for name in found if isinstance(name, str)]
        for name in names:
            if name not in known and Path(name).suffix in (
                ".yaml",
                ".yml",
            ):  # records name suites, and no files
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


def binomial(percent: float, images: int | None) -> float:
    """Standard error of an accuracy in percent; 0 if the number of images is not known."""
    share = min(max(percent / 100.0, 0.0), 1.0)
    return 100.0 * math.sqrt(share * (1.0 - share) / images) if images else 0.0
