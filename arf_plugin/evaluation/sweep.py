"""A sweep: models made of a start and fine-tuned runs are measured, and validation data choose one.

The models of :mod:`arf_plugin.evaluation.merging` are made in memory, straight into the models that are evaluated; no
checkpoint is written for that. As many of them as fit are evaluated together, so that images are decoded once for all;
with less memory, once per group.

The paper of WiSE-FT recommends alpha 0.5 where no validation data are at hand. Choosing on validation data is common
practice; what is done about ties is ours. The greedy soup is Algorithm 1 of arXiv 2203.05482.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from arf_plugin.console import text_table
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.candidates import Candidate
from arf_plugin.evaluation.checkpoints import open_checkpoint
from arf_plugin.evaluation.merging import Merge, align_all, check_moved, depths
from arf_plugin.evaluation.records import by_set
from arf_plugin.evaluation.run import evaluate
from arf_plugin.evaluation.sets import EvaluationSet
from arf_plugin.evaluation.suites import Suite, average

K = TypeVar("K", bound=Hashable)
TIES = {"wise": "nearer 0.5, then smaller", "lines": "smaller a, then smaller b"}  # which of equals is taken


def check_ends(how: Merge, original: Path, tuned: Sequence[Path]) -> int:
    """Raises an EvaluationError unless a method can be used on checkpoints; returns the size of one in bytes.

    Those after fine-tuning, `tuned`, are to be of one architecture, and not all the same.
    """
    how.check_count(len(tuned), least_of_soup=2)
    if twice := next((path for path in tuned if tuned.count(path) > 1), None):
        raise EvaluationError(f"{twice} is given twice. Name each fine-tuned checkpoint once.")
    start, runs = open_checkpoint(original), [open_checkpoint(path) for path in tuned]
    align_all(runs, start)
    if how.method == "lines":
        depths(runs[0].weights)
    if how.method != "wise":
        check_moved(start, runs)
    return runs[0].bytes


def made(how: Merge, original: Path, tuned: Sequence[Path], original_name: str | None = None) -> Candidate:
    """The model that a method makes of checkpoints; WiSE-FT's also at 0 and 1, where it equals an end."""
    first, *others = tuned
    if how.method == "soup":
        return soup(tuned)
    if how.method == "wise":
        return Candidate(first, original, how.numbers[0], original_name=original_name)
    return Candidate(first, original, original_name=original_name, merge=how, others=tuple(others))


def soup(runs: Sequence[Path]) -> Candidate:
    """The uniform soup of runs; of one, that itself."""
    first, *others = runs
    return Candidate(first, merge=Merge("soup"), others=tuple(others)) if others else Candidate(first)


class Scores(NamedTuple):
    """Headline scores of one model in percent, by set, and by average of the suite."""

    sets: dict[str, float]
    averages: dict[str, float]

    def value(self, by: str) -> float:
        """An average or, if none is called so, a set."""
        return self.averages[by] if by in self.averages else self.sets[by]

    def rank(self, by: str) -> float:
        """The value to choose by, rounded, so that what is equal but for sums in another order is equal."""
        return round(self.value(by), 9)


def measure(
    candidates: Mapping[K, Candidate],
    model: str,
    sets: Sequence[EvaluationSet],
    suite: Suite | None = None,
    **settings: Any,
) -> dict[K, Scores]:
    """Measures models on sets; scores by the models' keys.

    Args:
        candidates: the models by any keys.
        model: open_clip's name for the architecture.
        sets: opened sets.
        suite: gives the averages.
        **settings: of :func:`arf_plugin.evaluation.run.evaluate`, such as ``out`` and ``models_at_once``.
    """
    asked = list(dict.fromkeys(candidates.values()))
    records = evaluate(asked, model, sets, suite=suite.name if suite else None, **settings)
    per = len(sets)
    scores = {each: by_set(records[i * per : (i + 1) * per]) for i, each in enumerate(asked)}
    return {
        key: Scores(scores[each], average(suite, scores[each]) if suite else {})
        for key, each in candidates.items()
    }


def greedy_soup(
    tuned: Sequence[Path], by: str, measure: Callable[[Mapping[str, Candidate]], Mapping[str, Scores]]
) -> tuple[tuple[Path, ...], dict[str, Any], dict[str, Scores]]:
    """Makes a soup of runs, taking each in turn, best first, that does not lower the score of those taken before.

    Of runs with equal scores the earlier one is tried first.

    Args:
        tuned: the runs.
        by: a set or an average of the validation data.
        measure: measures models on the validation data.

    Returns:
        The runs that are kept, by falling score. The same for a JSON file: ``runs``, ``by``, the soup's ``value`` and
        ``steps``, every ``run`` in the order they were tried: its own ``value``, the score of the soup ``with_it``, and
        whether it was ``kept``. And the runs' own scores by path.
    """
    alone = dict(measure({str(path): Candidate(path) for path in tuned}))
    kept: tuple[Path, ...] = ()
    best, steps = -math.inf, []
    for path in sorted(tuned, key=lambda path: -alone[str(path)].rank(by)):
        own = value = alone[str(path)].rank(by)
        if kept:
            value = measure({"soup": soup((*kept, path))})["soup"].rank(by)
        better = value >= best
        if better:
            kept, best = (*kept, path), value
        steps.append({"run": str(path), "value": own, "with_it": value, "kept": better})
    return kept, {"runs": list(map(str, kept)), "by": by, "value": best, "steps": steps}, alone


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
        folded = {name.lower(): name for name in reversed(known)}
        close = difflib.get_close_matches(by.lower(), folded, n=1)
        hint = f" Did you mean {folded[close[0]]!r}?" if close else ""
        raise EvaluationError(
            f"--choose-by {by}: the validation data have no such set or average.{hint} Expected one of "
            f"{', '.join(known)}."
        )
    return by


def choose(scores: Mapping[Merge, Scores], by: str) -> list[Merge]:
    """The models with the highest score: first the one that is chosen, then those that tie with it.

    Of equal alphas it is that nearer 0.5, because that is what WiSE-FT's authors advise without data, then the smaller,
    because it is nearer the original, whose robustness is to be kept; that is also why LiNeS takes the smaller a and b.
    """

    def preferred(how: Merge) -> tuple[float, ...]:
        first = how.numbers[0]
        return how.numbers if how.method == "lines" else (round(abs(first - 0.5), 9), first)

    highest = max(found.rank(by) for found in scores.values())
    ties = [how for how, found in scores.items() if found.rank(by) == highest]
    best = min(ties, key=preferred)
    return [best, *(other for other in ties if other != best)]


def table(scores: Mapping[str, Scores], chosen: str | None = None, title: str = "alpha") -> str:
    """Lays scores out as text, one line per model: averages if there are any, else sets; a star at the chosen one."""
    first = next(iter(scores.values()))
    columns = list(first.averages or first.sets)
    lines = [
        [f"{name}{'*' if name == chosen else ''}", *(f"{each.value(column):.2f}" for column in columns)]
        for name, each in scores.items()
    ]
    return text_table([title, *columns], lines)
