"""A sweep: models made of a start and fine-tuned runs are measured, and validation data choose one.

The models are WiSE-FT's along the line between two checkpoints, or those of :mod:`arf_plugin.evaluation.merging`. They
are made in memory, straight into the models that are evaluated; no checkpoint is written for that. As many of them as
fit are evaluated together, so that images are decoded once for all; with less memory, once per group.

The paper of WiSE-FT recommends alpha 0.5 where no validation data are at hand. Choosing on validation data is common
practice; what is done about ties is ours. The greedy soup is Algorithm 1 of arXiv 2203.05482.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from arf_plugin.console import text_table
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.candidates import Candidate
from arf_plugin.evaluation.checkpoints import open_checkpoint
from arf_plugin.evaluation.merging import Merge, check_moved, check_runs, depths
from arf_plugin.evaluation.records import by_set
from arf_plugin.evaluation.run import evaluate
from arf_plugin.evaluation.sets import EvaluationSet
from arf_plugin.evaluation.suites import Suite, average

WISE = "wise"
# What tells the models of one method apart: WiSE-FT's alpha, LiNeS's a and b, or a word.
Point: TypeAlias = float | tuple[float, float] | str
K = TypeVar("K", bound=Point)


def text(point: Point) -> str:
    """A point for tables, JSON keys and names of files."""
    if isinstance(point, tuple):
        return " ".join(f"{number:g}" for number in point)
    return point if isinstance(point, str) else f"{point:g}"


@dataclass(frozen=True)
class Family:
    """The models that a method makes.

    Attributes:
        method: "wise", or one of :data:`arf_plugin.evaluation.merging.METHODS`.
        original: checkpoint before fine-tuning.
        tuned: checkpoints after it; one for "wise" and "lines".
        original_name: what records call the original; its path if None.
    """

    method: str
    original: Path
    tuned: tuple[Path, ...]
    original_name: str | None = None

    def check(self) -> int:
        """Raises an EvaluationError unless all are weights of one architecture; returns their size in bytes.

        Raises:
            EvaluationError: also for a method that takes another number of checkpoints, and where all hold the same.
        """
        if self.method == WISE and len(self.tuned) > 1:
            raise EvaluationError(
                f"WiSE-FT mixes one fine-tuned checkpoint with the original, {len(self.tuned)} were given. Several are "
                "merged with --method stock or --method soup."
            )
        if twice := next((path for path in self.tuned if self.tuned.count(path) > 1), None):
            raise EvaluationError(f"{twice} is given twice. Name each fine-tuned checkpoint once.")
        if self.method in ("stock", "soup") and len(self.tuned) < 2:
            raise EvaluationError(
                f"--method {self.method} merges two fine-tuned checkpoints or more; 1 given."
            )
        if self.method == "lines":
            Merge("lines", (0.0, 1.0)).check_count(len(self.tuned))
        original, runs = open_checkpoint(self.original), [open_checkpoint(path) for path in self.tuned]
        check_runs(runs, original)
        if self.method == "lines":
            depths(runs[0].weights)
        if self.method != WISE:
            check_moved(original, runs)
        return runs[0].bytes

    def at(self, point: Point) -> Candidate:
        """The model at a point; WiSE-FT's also at 0 and 1, where it equals an end."""
        first, *others = self.tuned
        if isinstance(point, float | int):
            return Candidate(first, self.original, point, original_name=self.original_name)
        if self.method == "soup":
            return soup(self.tuned)
        how = Merge(self.method, point if isinstance(point, tuple) else None)
        named = self.original_name
        return Candidate(first, self.original, original_name=named, merge=how, others=tuple(others))


def soup(runs: Sequence[Path]) -> Candidate:
    """The uniform soup of runs; of one, that itself."""
    first, *others = runs
    return Candidate(first, merge=Merge("soup"), others=tuple(others)) if others else Candidate(first)


@dataclass(frozen=True)
class Scores:
    """Headline scores of one model in percent.

    Attributes:
        sets: by set.
        averages: by average of the suite.
    """

    sets: dict[str, float]
    averages: dict[str, float]

    def value(self, by: str) -> float:
        """An average or, if none is called so, a set."""
        return self.averages[by] if by in self.averages else self.sets[by]


@dataclass(frozen=True)
class Choice:
    """The point that validation data chose.

    Attributes:
        point: the chosen one.
        by: the set or average that chose.
        value: its score in percent.
        tied: other points with the same score.
    """

    point: float | tuple[float, float]
    by: str
    value: float
    tied: tuple[float | tuple[float, float], ...]

    @property
    def name(self) -> str:
        """What the point is."""
        return "lines" if isinstance(self.point, tuple) else "alpha"

    @property
    def ties(self) -> str:
        """Of points with equal scores, the one that is taken."""
        return "smaller a, then smaller b" if self.name == "lines" else "nearer 0.5, then smaller"

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            **{self.name: self.point, "by": self.by, "value": self.value},
            **{"tied": list(self.tied), "ties": self.ties},
        }


@dataclass(frozen=True)
class Greedy:
    """The runs that a greedy soup keeps.

    Attributes:
        runs: the kept ones, by falling score.
        by: the set or average that chose.
        value: score of their soup in percent.
        steps: every run in the order they were tried: ``run``, its own ``value``, the score of the soup ``with_it``,
            and whether it was ``kept``.
    """

    runs: tuple[Path, ...]
    by: str
    value: float
    steps: tuple[dict[str, Any], ...]

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        kept = {"runs": [str(path) for path in self.runs], "by": self.by, "value": self.value}
        return {**kept, "steps": list(self.steps)}


def measure(
    candidates: Mapping[K, Candidate],
    model: str,
    sets: Sequence[EvaluationSet],
    suite: Suite | None = None,
    **settings: Any,
) -> dict[K, Scores]:
    """Measures models on sets.

    Args:
        candidates: the models by their points.
        model: open_clip's name for the architecture.
        sets: opened sets.
        suite: gives the averages.
        **settings: of :func:`arf_plugin.evaluation.run.evaluate`, such as ``out`` and ``models_at_once``.

    Returns:
        Scores by point.

    Raises:
        EvaluationError: for checkpoints or sets that cannot be evaluated.
    """
    asked = list(dict.fromkeys(candidates.values()))
    records = evaluate(asked, model, sets, suite=suite.name if suite else None, **settings)
    per = len(sets)
    of = {candidate: records[i * per : (i + 1) * per] for i, candidate in enumerate(asked)}
    found = {}
    for point, candidate in candidates.items():
        scores = by_set(of[candidate])
        found[point] = Scores(scores, average(suite, scores) if suite else {})
    return found


def greedy_soup(
    tuned: Sequence[Path], by: str, measure: Callable[[Mapping[str, Candidate]], Mapping[str, Scores]]
) -> tuple[Greedy, dict[str, Scores]]:
    """Makes a soup of runs, taking each in turn, best first, that does not lower the score of those taken before.

    Args:
        tuned: the runs.
        by: a set or an average of the validation data.
        measure: measures models on the validation data.

    Returns:
        What is kept, and the runs' own scores by path. Of runs with equal scores the earlier one is tried first.
    """
    alone = dict(measure({str(path): Candidate(path) for path in tuned}))
    values = {path: round(alone[str(path)].value(by), 9) for path in tuned}
    kept: tuple[Path, ...] = ()
    best, steps = -math.inf, []
    for path in sorted(values, key=lambda path: -values[path]):
        value = values[path]
        if kept:
            found = measure({"soup": soup((*kept, path))})["soup"]
            value = round(found.value(by), 9)
        better = value >= best
        if better:
            kept, best = (*kept, path), value
        steps.append({"run": str(path), "value": values[path], "with_it": value, "kept": better})
    return Greedy(kept, by, best, tuple(steps)), alone


def check_by(by: str | None, sets: Sequence[EvaluationSet], suite: Suite | None) -> str:
    """Says what chooses, before anything is measured.

    Args:
        by: a set or an average; None for the only set, or the suite's average of kind "id".
        sets: the validation sets.
        suite: gives the averages.

    Raises:
        EvaluationError: if there is none of that name, or no default.
    """
    names = [dataset.name for dataset in sets]
    averages = list(average(suite, dict.fromkeys(names, 1.0))) if suite else []
    known = list(dict.fromkeys([*averages, *names]))
    if by is None:
        first = [name for name in averages if suite and suite.averages[name].kind == "id"]
        if not first and len(known) > 1:
            raise EvaluationError(
                f"The validation data have several sets and nothing says which one chooses. Name one with --choose-by: "
                f"{', '.join(known)}."
            )
        return (first or known)[0]
    if by not in known:
        close = difflib.get_close_matches(by.lower(), [name.lower() for name in known], n=1)
        hint = next((f" Did you mean {name!r}?" for name in known if close and name.lower() == close[0]), "")
        raise EvaluationError(
            f"--choose-by {by}: the validation data have no such set or average.{hint} Expected one of "
            f"{', '.join(known)}."
        )
    return by


def choose(scores: Mapping[Any, Scores], by: str) -> Choice:
    """Chooses the point with the highest score.

    Of equal alphas that nearer 0.5, because that is what WiSE-FT's authors advise without data, then the smaller,
    because it is nearer the original, whose robustness is to be kept; that is also why LiNeS takes the smaller a and b.
    """

    def preferred(point: Any) -> tuple[float, ...]:
        return (-point[0], -point[1]) if isinstance(point, tuple) else (-round(abs(point - 0.5), 9), -point)

    values = {point: round(found.value(by), 9) for point, found in scores.items()}
    best = max(values, key=lambda point: (values[point], *preferred(point)))
    tied = tuple(other for other in values if other != best and values[other] == values[best])
    return Choice(best, by, values[best], tied)


def table(scores: Mapping[K, Scores], chosen: Point | None = None, title: str = "alpha") -> str:
    """Lays scores out as text, one line per point: averages if there are any, else sets; a star at the chosen one."""
    first = next(iter(scores.values()))
    columns = list(first.averages or first.sets)
    lines = [
        [f"{text(point)}{'*' if point == chosen else ''}", *(f"{found.value(name):.2f}" for name in columns)]
        for point, found in scores.items()
    ]
    return text_table([title, *columns], lines)
