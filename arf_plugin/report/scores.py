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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arf_plugin.errors import EvaluationError, ReportError
from arf_plugin.evaluation.suites import Average, Suite, average, load_suite
from arf_plugin.evaluation.verdicts import MEAN, Verdict, compare
from arf_plugin.report.sources import Measurement

OWN_SETS = ("val", "test")
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
    """One arm less another, in points of percent; `paired` is the verdict by image, where records allow one."""

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
    """One less the other over the seeds that both have, None if they share none.

    A model without a seed is compared with every seed of the other.
    """
    if set(other.seeds) == {None}:
        pairs = {seed: value - other.seeds[None] for seed, value in one.seeds.items()}
    elif set(one.seeds) == {None}:
        pairs = {seed: one.seeds[None] - value for seed, value in other.seeds.items()}
    else:
        pairs = {seed: value - other.seeds[seed] for seed, value in one.seeds.items() if seed in other.seeds}
    return Difference(pairs, math.hypot(one.image_error, other.image_error), paired) if pairs else None


def signed(value: float) -> str:
    """A difference with its sign and one decimal; the minus is a minus."""
    return f"{value:+.1f}".replace("-", "−")


class Averages:
    """The averages of one or several suites, and one for each set that no suite has.

    Names that several suites have are told apart by the suite's. Sets without a suite are own classes by their names,
    which are those of ``arf data``, and else what may be forgotten.
    """

    def __init__(self, suites: Sequence[Suite], sets: Iterable[str]) -> None:
        self.suites = suites
        rest = [name for name in sets if not any(name in suite.sets for suite in suites)]
        rest.sort(key=lambda name: name not in OWN_SETS)
        kinds = {name: "id" if name in OWN_SETS else "zero-shot" for name in rest}
        single = {name: Average.model_construct(kind=kinds[name], of=(name,)) for name in rest}
        named = [*((suite.name, suite.averages) for suite in suites), ("", single)]
        count = Counter(name for _, averages in named for name in averages)
        self.by_suite: list[dict[str, Average]] = []
        self.known: dict[str, Average] = {}
        for suite, averages in named:
            shown = {name: name if count[name] == 1 else f"{suite}: {name}" for name in averages}
            renamed = {
                shown[name]: entry.model_copy(
                    update={"harmonic": tuple(shown[part] for part in entry.harmonic)}
                )
                if entry.harmonic
                else entry
                for name, entry in averages.items()
            }
            self.by_suite.append(renamed)
            self.known |= renamed
        self._all = Suite.model_construct(averages=self.known)

    @property
    def main(self) -> list[str]:
        """Those to talk about and to draw; class splits mix the same scores anew, and stand in the table alone."""
        return [name for name, entry in self.known.items() if entry.kind != "class-split"] or list(self.known)

    def of_kind(self, kind: str) -> list[str]:
        """Names of the averages of a kind."""
        return [name for name, entry in self.known.items() if entry.kind == kind]

    def of(self, values: Mapping[str, float]) -> dict[str, float]:
        """Averages of scores by set; those that lack a set are left out."""
        return average(self._all, values)

    def sets(self, name: str) -> tuple[str, ...]:
        """The sets of an average, those of a harmonic mean's parts included."""
        entry = self.known[name]
        parts = (member for part in entry.harmonic or () for member in self.sets(part))
        return tuple(dict.fromkeys([*entry.of, *parts]))


class Results:
    """Everything measured on one split; of two measurements of one thing, the later counts.

    Attributes:
        sets: Names of the measured sets, in the suites' order.
        images: By set; None if records do not say.
        unpaired: Why averages could not be compared by image.
    """

    def __init__(self, measured: Iterable[Measurement], averages: Averages) -> None:
        self.averages = averages
        latest = {(one.arm, one.alpha, one.seed, one.record["set"]): one for one in measured}
        self.measured = list(latest.values())
        self.by_run: dict[Key, dict[int | None, dict[str, dict[str, Any]]]] = {}  # by seed and set
        for one in self.measured:
            of_seed = self.by_run.setdefault((one.arm, one.alpha), {}).setdefault(one.seed, {})
            of_seed[one.record["set"]] = one.record
        counts = {one.record["set"]: one.record.get("images") for one in reversed(self.measured)}
        known = [name for suite in averages.suites for name in suite.sets if name in counts]
        self.sets = list(dict.fromkeys([*known, *sorted(counts)]))
        self.images: dict[str, int | None] = {name: counts[name] for name in self.sets}
        self.unpaired: dict[str, str] = {}

    @property
    def unit(self) -> str:
        """What the scores are, for headings."""
        return "top-1 %" if {one.record["headline"] for one in self.measured} <= {"top1"} else "accuracy, %"

    def verdicts(self, one: Key, other: Key) -> dict[str, Verdict]:
        """Verdicts by image on one arm less another, by average; `unpaired` has why others are missing."""
        verdicts: dict[str, Verdict] = {}
        for averages in self.averages.by_suite:
            found = compare(self.by_run[one], self.by_run[other], averages)
            verdicts |= found.verdicts
            self.unpaired |= found.unpaired
        return verdicts

    def together(self, one: Key, other: Key, names: Sequence[str]) -> tuple[Score, Difference] | None:
        """The mean of some averages of an arm, and less another's; None if not all are measured on both."""
        first, second = self.mean(one, names), self.mean(other, names)
        if first is None or second is None:
            return None
        averages = {name: self.averages.known[name] for name in names}
        verdicts = compare(self.by_run[one], self.by_run[other], averages, mean=True).verdicts
        less = difference(first, second, verdicts.get(MEAN if len(names) > 1 else names[0]))
        return None if less is None else (first, less)

    def mean(self, key: Key, names: Sequence[str]) -> Score | None:
        """The mean of some averages, over the seeds that have all; None if there is none."""
        found = self.by_average().get(key, {})
        scores = [found[name] for name in names if name in found]
        if not names or len(scores) < len(names):
            return None
        seeds = [seed for seed in scores[0].seeds if all(seed in score.seeds for score in scores)]
        means = {seed: statistics.fmean(score.seeds[seed] for score in scores) for seed in seeds}
        error = math.hypot(*(score.image_error for score in scores)) / len(scores)
        return Score(means, error) if means else None

    def alphas(self) -> list[float]:
        """All alphas of mixtures."""
        return sorted({alpha for _, alpha in self.by_run if alpha is not None})

    def is_mixed_with(self, arm: str, other: str) -> bool:
        """Whether an arm's mixtures are with another one's checkpoint, or nobody says with what."""
        mixed, own = (
            {
                one.record.get(field)
                for one in self.measured
                if one.arm == name and (one.alpha is None) == alone
            }
            for name, field, alone in ((arm, "original_digest", False), (other, "digest", True))
        )
        return mixed <= own | {None}

    def by_average(self, metric: str | None = None) -> dict[Key, dict[str, Score]]:
        """Scores by arm, alpha and average; of each set's headline, or of the metric that is named."""
        result: dict[Key, dict[str, Score]] = {}
        for key, runs in self.by_run.items():
            values = {
                seed: {
                    name: float(record["metrics"][wanted])
                    for name, record in sets.items()
                    if (wanted := metric or record["headline"]) in record["metrics"]
                }
                for seed, sets in runs.items()
            }
            averaged = {seed: self.averages.of(of_seed) for seed, of_seed in values.items()}
            result[key] = {}
            for name in self.averages.known:
                found = {seed: scores[name] for seed, scores in averaged.items() if name in scores}
                if found:
                    error = self._image_error(name, [values[seed] for seed in found])
                    result[key][name] = Score(found, error)
        return result

    def by_set(self) -> dict[Key, dict[str, Score]]:
        """Scores by arm, alpha and set."""
        return Results(self.measured, Averages([], self.sets)).by_average()

    def truncated(self) -> list[str]:
        """Sets with fewer images than a whole copy has, each as a sentence."""
        notes = []
        for name in self.sets:
            records = [one.record for one in self.measured if one.record["set"] == name]
            expected, images = records[0].get("expected_images"), records[0].get("images")
            if isinstance(expected, int) and isinstance(images, int) and images != expected:
                notes.append(f"{name} has {images:,} images where a whole copy has {expected:,}.")
            if len({record.get("images") for record in records}) > 1:
                notes.append(f"{name} was not measured on equally many images everywhere.")
        return notes

    def _image_error(self, name: str, seeds: Sequence[Mapping[str, float]]) -> float:
        """Error of an average from those of its sets, by the first derivatives."""
        means = {
            member: statistics.fmean(seed[member] for seed in seeds) for member in self.averages.sets(name)
        }
        start, step, square = self.averages.of(means)[name], 0.01, 0.0
        for member, mean in means.items():
            moved = self.averages.of({**means, member: mean + step})[name]
            square += ((moved - start) / step * binomial(mean, self.images[member])) ** 2
        return math.sqrt(square)


def suites_of(
    measured: Iterable[Measurement], given: Sequence[str] = (), known: Sequence[str] = ()
) -> list[Suite]:
    """The suites whose averages are shown.

    Args:
        measured: Records, which name suites without saying where own ones are.
        given: Names or files to take in place of them.
        known: Names and files of suites that may be meant, as grids name them.

    Raises:
        ReportError: If a suite is not one that comes with the package, and its file is not known.
    """
    files = {Path(name).stem: name for name in known}
    named = dict.fromkeys(one.record.get("suite") for one in measured)
    names = list(given) or [files.get(name, name) for name in named if isinstance(name, str)]
    suites = []
    for name in names:
        # Records name suites, and no files.
        if not given and name not in known and Path(name).suffix in (".yaml", ".yml"):
            raise ReportError(
                f"The rows are of the suite '{name}', which is no name. Give --suite FILE.yaml."
            )
        try:
            suites.append(load_suite(name))
        except EvaluationError as cause:
            raise ReportError(
                f"The rows are of the suite '{name}', whose averages are needed: {cause}\n"
                "Name the suite's file with --suite FILE.yaml."
            ) from cause
    return suites


def binomial(percent: float, images: int | None) -> float:
    """Standard error of an accuracy in percent; 0 if the number of images is not known."""
    share = min(max(percent / 100.0, 0.0), 1.0)
    return 100.0 * math.sqrt(share * (1.0 - share) / images) if images else 0.0
