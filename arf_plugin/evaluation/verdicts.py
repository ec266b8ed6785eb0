"""Whether one arm is ahead of another: paired by image and by seed.

Two arms that see the same images make many of the same mistakes, so that their difference is known far better than
either score. Records keep which images were right (:func:`arf_plugin.evaluation.records.right_images`), in the order
of the set, whose digest they have.

One seed each, one set
    McNemar's exact test (McNemar, Psychometrika 1947): of the images that one arm alone has right, is it half?
Several seeds, or several sets
    The variance of the mean difference over the images plus that over the seeds. Images are resampled (bootstrap),
    jointly for both arms and all seeds, each set by itself. Resampling the seeds, S - 1 of S, gives the mean a
    variance of ``s^2 / S``, s being the deviation of the seeds' differences (Rao and Wu, JASA 1988), so that nothing
    needs to be drawn. The interval is Student's, with Satterthwaite's degrees of freedom: two where the noise of three
    seeds is all there is, as many as images where it is not.

    Percentiles of one bootstrap over images and seeds are what is found more often. With two or three seeds that
    differ they cover the truth in 69 to 92 % of simulations in place of 95, this in 88 to 99; see
    ``tests/unit/evaluation/test_verdicts.py``.
Several grids, as of several pretrained models
    The same with the means over each grid's seeds in the place of the seeds: what a pretrained model is good for is
    common to its runs, so that its seeds say nothing about another one.

No p is below what the exact test could give for as many images as the arms differ on, whatever the bootstrap says of
five images. p values of one table are corrected by Holm (Scand. J. Statist. 1979): those of its sets together, those
of its averages together, averages by class, which mix the same scores anew, apart. Intervals are not corrected.
"""

from __future__ import annotations

import fnmatch
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from arf_plugin.errors import EvaluationError, MissingDependencyError
from arf_plugin.evaluation.records import EvalRecord, arm_and_seed, right_images, run_name
from arf_plugin.evaluation.suites import Average
from arf_plugin.untrusted import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEVEL = 0.05  # of corrected p values
REPLICATES = 2000
MEAN = "mean"  # of a table's averages, those by class left out
SIGNS = {"ahead": "▲", "level": "≈", "behind": "▼"}
_SEED = 0  # of the bootstrap: the same records give the same verdict
_BLOCK = 1 << 22  # numbers in memory at once


class Joined(NamedTuple):
    """Names a pair of runs of one of several grids."""

    grid: int
    one: Any  # seeds
    other: Any


ByRun = Mapping[Any, Mapping[str, EvalRecord]]  # an arm: by seed and set; None for what has no seed


@dataclass(frozen=True)
class Verdict:
    """One arm less another, on a set or an average; scores are means over seeds, in percent."""

    one: float
    other: float  # of the arm it is compared with
    low: float  # low and high: 95 % interval of the difference, in points
    high: float
    p: float  # two-sided
    corrected: float  # p after Holm's correction over the table
    images: int  # how many are behind it
    differ: int  # those that the arms differ on, in any seed
    seeds: int  # how many pairs of runs

    @property
    def difference(self) -> float:
        """In points."""
        return self.one - self.other

    @property
    def word(self) -> str:
        """``ahead``, ``behind`` or ``level``, by the corrected p."""
        if self.corrected >= LEVEL or self.difference == 0:
            return "level"
        return "ahead" if self.difference > 0 else "behind"

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            **{name: round(getattr(self, name), 4) for name in ("one", "other", "difference")},
            "interval95": [round(self.low, 4), round(self.high, 4)],
            **{name: float(f"{getattr(self, name):.4g}") for name in ("p", "corrected")},
            **{name: getattr(self, name) for name in ("images", "differ", "seeds")},
            "verdict": self.word,
        }


def as_cell(verdict: Mapping[str, Any]) -> str:
    """A verdict, as JSON has it, for a table: ``+6.3 ± 2.2 ▲``, with half of the interval."""
    low, high = verdict["interval95"]
    return f"{verdict['difference']:+.1f} ± {(high - low) / 2:.1f} {SIGNS[verdict['verdict']]}"


@dataclass(frozen=True)
class Comparison:
    """Verdicts by set or average, and why there is none for the others."""

    verdicts: dict[str, Verdict]
    unpaired: dict[str, str]


def compare(one: ByRun, other: ByRun, averages: Mapping[str, Average], mean: bool = False) -> Comparison:
    """Compares two arms by image.

    Args:
        one: records of an arm by seed and set.
        other: those of another. An arm of one record without a seed is compared with every seed of the other.
        averages: what to compare; see :func:`single` for sets.
        mean: also the mean of them, called ``mean``, if there are several that are no class splits.

    Returns:
        Verdicts; p values are corrected over the averages, over those by class apart, and not for the mean. Averages
        that an arm has no records for are left out.

    Raises:
        EvaluationError: a record's bits do not belong to it.
    """
    import numpy as np

    seeds = matched(one, other) if one and other else []
    verdicts: dict[str, Verdict] = {}
    unpaired: dict[str, str] = {}
    reduced: dict[tuple[Any, ...], _Set] = {}
    sets = {name: _members(averages, name) for name in averages}
    main = [name for name, entry in averages.items() if entry.kind != "class-split"]
    if mean and len(main) > 1:
        sets[MEAN] = dict.fromkeys(member for name in main for member in sets[name])
    for name, members in sets.items():
        usable = [pair for pair in seeds if all(m in one[pair[0]] and m in other[pair[1]] for m in members)]
        if not usable or (name == MEAN and not set(main) <= verdicts.keys()):
            continue
        every = {m: [record for a, b in usable for record in (one[a][m], other[b][m])] for m in members}
        reasons = (obstacle(records[0], record) for records in every.values() for record in records)
        if reason := next(filter(None, reasons), None):
            unpaired[name] = reason
            continue
        for member in members:
            if (member, *usable) not in reduced:
                grids = [a.grid if isinstance(a, Joined) else None for a, _ in usable]
                first, second = (
                    np.stack([right_images(arm[seed][member]) for seed in seeds_of])
                    for arm, seeds_of in zip((one, other), zip(*usable, strict=True), strict=True)
                )
                reduced[(member, *usable)] = _of_set(member, first, second, grids)
        found = {member: reduced[(member, *usable)] for member in members}
        verdicts[name] = _judge(found, averages, main if name == MEAN else [name])
    for family in (main, [name for name in verdicts if name not in (*main, MEAN)]):
        for name, p in holm({name: verdicts[name].p for name in family if name in verdicts}).items():
            verdicts[name] = replace(verdicts[name], corrected=p)
    return Comparison(verdicts, unpaired)


def find_arm(records: Iterable[EvalRecord], name: str) -> dict[int | None, dict[str, EvalRecord]]:
    """Finds an arm among records.

    Args:
        records: of one grid, or of one command.
        name: a checkpoint as records name it, a pattern of such (``runs/arf-*``), or what its runs' folders are called
            without their seeds (``arf``); ``NAME+wise`` or ``NAME+wise@ALPHA`` for mixtures.

    Returns:
        Records by seed, which the runs' folders tell, and set. The model before fine-tuning has no seed.

    Raises:
        EvaluationError: there is no such arm, or its runs cannot be told apart by seed.
    """
    records = list(records)
    pattern, wise, at = name.partition("+wise")
    originals = {record.get("original_digest") for record in records} - {None}
    found: dict[int | None, dict[str, EvalRecord]] = {}
    for record in records:
        checkpoint, alpha = record["checkpoint"], record.get("alpha")
        arm, seed = arm_and_seed(run_name(checkpoint))
        if pattern not in (arm, checkpoint) and not fnmatch.fnmatchcase(checkpoint, pattern):
            continue
        if bool(wise) == (alpha is None) or (at and f"{alpha:g}" != at.lstrip("@")):
            continue
        if alpha is None and (arm == "before" or record.get("digest") in originals):
            seed = None
        run = found.setdefault(seed, {})
        for one in run.values():
            if (one.get("digest"), one.get("alpha")) != (record.get("digest"), alpha):
                raise EvaluationError(
                    f"'{printable(name)}' means both {_called(one)} and {_called(record)}, which are of one seed. Name "
                    "one of them; runs of several seeds are told apart by their folders (ARM-SEED)."
                )
        run[record["set"]] = record
    if not found:
        known = ", ".join(dict.fromkeys(map(_called, records)))
        raise EvaluationError(
            f"There are no records of '{printable(name)}' (found: {known[:400] or 'none'})."
        )
    return found


def _called(record: EvalRecord) -> str:
    alpha = record.get("alpha")
    return printable(record["checkpoint"]) + ("" if alpha is None else f"+wise@{alpha:g}")


def _members(averages: Mapping[str, Average], name: str) -> dict[str, None]:
    """The sets of an average, those of a harmonic mean's parts included."""
    parts = [_members(averages, part) for part in averages[name].harmonic or ()]
    return dict.fromkeys(itertools.chain(averages[name].of, *parts))


def single(sets: Iterable[str]) -> dict[str, Average]:
    """Sets as averages of one set each."""
    return {name: Average.model_construct(kind="", of=(name,)) for name in sets}  # of no kind


def matched(one: ByRun, other: ByRun) -> list[tuple[Any, Any]]:
    """Which seed is compared with which: equal ones, or what has no seed with every seed."""
    if set(other) == {None} or set(one) == {None}:
        return [(a, b) for a in one for b in other]
    return [(seed, seed) for seed in one if seed in other]


def joined(one: Sequence[ByRun], other: Sequence[ByRun]) -> tuple[ByRun, ByRun]:
    """Two arms' runs of several grids, as of several pretrained models, with those that are compared under one key."""
    first: dict[Any, Mapping[str, EvalRecord]] = {}
    second: dict[Any, Mapping[str, EvalRecord]] = {}
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        alone = [(x, y) for x in a for y in b] if len(a) == len(b) == 1 else None  # whatever their seeds
        for x, y in alone or matched(a, b):
            key = Joined(number, x, y)
            first[key], second[key] = a[x], b[y]
    return first, second


def obstacle(one: EvalRecord, other: EvalRecord) -> str | None:
    """Why two records of a set cannot be paired by image; None if they can."""
    for record in (one, other):
        if record["headline"] != "top1":
            return f"its score is {record['headline']}, and no top-1"
        if record.get("right") is None:
            return "a record does not say which images were right: it was made by an earlier version; measure it again"
    digests = [printable(str(record.get("data"))) for record in (one, other)]
    if digests[0] != digests[1]:
        return (
            f"the arms were measured on different images (digests {digests[0][:12]} and {digests[1][:12]}); measure "
            "both on one copy of the set"
        )
    return None


def mcnemar(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Two-sided p of McNemar's exact test of two arms' answers [N], right or wrong, on the same images."""
    return _sign_test(int((one & ~other).sum()), int((other & ~one).sum()))


def _sign_test(more: int, less: int) -> float:
    """Equals ``scipy.stats.binomtest(more, more + less).pvalue``; scipy.stats takes seconds to import."""
    return min(1.0, 2.0 * float(_special().bdtr(min(more, less), more + less, 0.5)))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Corrects p values of several tests, by name: the k-th smallest of m times ``m - k + 1``, never decreasing."""
    corrected, highest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = highest
    return corrected


class _Set(NamedTuple):
    """What one set says of two arms: p of the exact test, for one seed; scores in percent, also of resampled images."""

    images: int
    differ: int
    exact: float | None
    runs: int  # pairs of them
    scores: NDArray[np.float64]  # [2, S], of seeds or of grids
    drawn: NDArray[np.float64]  # [2, REPLICATES, S]


def _of_set(name: str, one: NDArray[np.bool_], other: NDArray[np.bool_], grids: Sequence[int | None]) -> _Set:
    """Reduces answers [runs, N] of two arms, whose runs are of these grids."""
    import numpy as np

    # Averages the seeds of each grid, if there are several grids: [runs, S].
    units = np.array(grids if len(set(grids)) > 1 else range(len(grids)))
    _, place, counts = np.unique(units, return_inverse=True, return_counts=True)
    weights = np.eye(len(counts))[place] / counts

    swapped = other.tobytes() < one.tobytes()  # exchanged arms are to give exactly the opposite
    both = np.concatenate([other, one] if swapped else [one, other])
    drawn = _resampled(both, np.random.default_rng([_SEED, zlib.crc32(name.encode())]))
    drawn = 100.0 * drawn.reshape(REPLICATES, 2, -1).swapaxes(0, 1)
    return _Set(
        images=one.shape[1],
        differ=int((one != other).any(axis=0).sum()),
        exact=mcnemar(one[0], other[0]) if len(one) == 1 else None,
        runs=len(one),
        scores=100.0 * np.stack([one.mean(axis=1), other.mean(axis=1)]) @ weights,
        drawn=(drawn[::-1] if swapped else drawn) @ weights,
    )


def _resampled(right: NDArray[np.bool_], generator: np.random.Generator) -> NDArray[np.float64]:
    """Shares of right images when images are drawn anew, [REPLICATES, runs], of answers [runs, images].

    Images that the same runs have right are alike, so that how many there are of each kind is all that is drawn.
    """
    import numpy as np

    images = right.shape[1]
    kinds, counts = np.unique(np.packbits(right, axis=0), axis=1, return_counts=True)
    answers = np.unpackbits(kinds, axis=0, count=len(right)).T.astype(float)
    size = max(1, _BLOCK // len(counts))
    blocks = [min(size, REPLICATES - start) for start in range(0, REPLICATES, size)]
    return np.concatenate(
        [generator.multinomial(images, counts / images, size=block) @ answers / images for block in blocks]
    )


def _judge(found: Mapping[str, _Set], averages: Mapping[str, Average], names: Sequence[str]) -> Verdict:
    """The verdict on the mean of some averages, before correction."""
    import numpy as np

    def mean_of(values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.mean([_average(values, averages, name) for name in names], axis=0)
        return found

    one, other = mean_of({name: of_set.scores for name, of_set in found.items()})
    drawn = mean_of({name: of_set.drawn for name, of_set in found.items()})
    images, differ = (sum(counts) for counts in zip(*(of_set[:2] for of_set in found.values()), strict=True))
    seeds, mean = len(one), float((one - other).mean())  # or grids
    of_images = float((drawn[0] - drawn[1]).mean(axis=1).var())
    of_seeds = float((one - other).var(ddof=1)) / seeds if seeds > 1 else 0.0
    half, p, error = 0.0, float(mean == 0), (of_images + of_seeds) ** 0.5
    if error > 0:
        freedom = error**4 / (of_images**2 / max(1, images - len(found)) + of_seeds**2 / max(1, seeds - 1))
        half = float(_special().stdtrit(freedom, 0.975)) * error
        p = 2.0 * float(_special().stdtr(freedom, -abs(mean) / error))
    exact, runs = next((of_set.exact, of_set.runs) for of_set in found.values())
    p = exact if exact is not None and len(found) == 1 else max(p, _sign_test(differ, 0))
    return Verdict(
        float(one.mean()), float(other.mean()), mean - half, mean + half, p, p, images, differ, runs
    )


def _average(values: Mapping[str, NDArray[np.float64]], averages: Mapping[str, Average], name: str) -> Any:
    """As :func:`arf_plugin.evaluation.suites.average`, of arrays."""
    import numpy as np

    entry = averages[name]
    if not entry.harmonic:
        return np.mean([values[member] for member in entry.of], axis=0)
    one, other = (_average(values, averages, part) for part in entry.harmonic)
    return 2 * one * other / np.maximum(one + other, 1e-300)  # of two zeros, zero


def _special() -> Any:
    try:
        from scipy import special
    except ImportError:
        raise MissingDependencyError("scipy", "A comparison", "evaluation") from None
    return special
