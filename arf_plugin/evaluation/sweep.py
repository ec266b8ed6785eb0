"""A WiSE-FT sweep: models along the line between two checkpoints are measured, and validation data choose one.

Mixtures are made in memory, straight into the models that are evaluated; no checkpoint is written for that. As many of
them as fit are evaluated together, so that images are decoded once for all; with less memory, once per group.

The paper of WiSE-FT recommends alpha 0.5 where no validation data are at hand. Choosing on validation data is common
practice; what is done about ties is ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arf_plugin.console import text_table
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.candidates import Candidate
from arf_plugin.evaluation.checkpoints import open_checkpoint
from arf_plugin.evaluation.interpolation import check_alpha, check_pair
from arf_plugin.evaluation.records import by_set
from arf_plugin.evaluation.run import evaluate
from arf_plugin.evaluation.sets import EvaluationSet
from arf_plugin.evaluation.suites import Suite, average

TIES = "nearer 0.5, then smaller"  # of alphas with equal scores, the one to take


@dataclass(frozen=True)
class Line:
    """The two ends of a sweep.

    Attributes:
        original: checkpoint before fine-tuning.
        tuned: checkpoint after it.
        original_name: what records call the original; its path if None.
    """

    original: Path
    tuned: Path
    original_name: str | None = None

    def check(self) -> int:
        """Raises an EvaluationError unless both are weights of one architecture; returns their size in bytes."""
        original, tuned = open_checkpoint(self.original), open_checkpoint(self.tuned)
        check_pair(original, tuned)
        return tuned.bytes

    def at(self, alpha: float) -> Candidate:
        """The mixture at an alpha; also at 0 and 1, where it equals an end."""
        return Candidate(self.tuned, self.original, alpha, original_name=self.original_name)


@dataclass(frozen=True)
class Scores:
    """Headline scores of one mixture in percent.

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
    """The alpha that validation data chose.

    Attributes:
        alpha: the chosen one.
        by: the set or average that chose.
        value: its score in percent.
        tied: other alphas with the same score.
    """

    alpha: float
    by: str
    value: float
    tied: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "tied": list(self.tied), "ties": TIES}


def measure(
    line: Line,
    alphas: Sequence[float],
    model: str,
    sets: Sequence[EvaluationSet],
    suite: Suite | None = None,
    **settings: Any,
) -> dict[float, Scores]:
    """Measures mixtures on sets.

    Args:
        line: the two ends.
        alphas: which mixtures.
        model: open_clip's name for the architecture.
        sets: opened sets.
        suite: gives the averages.
        **settings: of :func:`arf_plugin.evaluation.run.evaluate`, such as ``out`` and ``models_at_once``.

    Returns:
        Scores by alpha.

    Raises:
        EvaluationError: for checkpoints or sets that cannot be evaluated.
    """
    for alpha in alphas:
        check_alpha(alpha)
    candidates = [line.at(alpha) for alpha in alphas]
    records = evaluate(candidates, model, sets, suite=suite.name if suite else None, **settings)
    found = {}
    for alpha in alphas:
        scores = by_set(record for record in records if record["alpha"] == alpha)
        found[alpha] = Scores(scores, average(suite, scores) if suite else {})
    return found


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


def choose(scores: Mapping[float, Scores], by: str) -> Choice:
    """Chooses the alpha with the highest score; of equal ones that nearer 0.5, then the smaller.

    Nearer 0.5, because that is what WiSE-FT's authors advise without data; the smaller, because it is nearer the
    original, whose robustness is to be kept.
    """
    values = {alpha: round(found.value(by), 9) for alpha, found in scores.items()}
    alpha = max(values, key=lambda a: (values[a], -round(abs(a - 0.5), 9), -a))
    tied = tuple(other for other in values if other != alpha and values[other] == values[alpha])
    return Choice(alpha, by, values[alpha], tied)


def table(scores: Mapping[float, Scores], chosen: float | None = None) -> str:
    """Lays scores out as text, one line per alpha: averages if there are any, else sets; a star at the chosen one."""
    first = next(iter(scores.values()))
    columns = list(first.averages or first.sets)
    lines = [
        [f"{alpha:g}{'*' if alpha == chosen else ''}", *(f"{found.value(name):.2f}" for name in columns)]
        for alpha, found in scores.items()
    ]
    return text_table(["alpha", *columns], lines)
