"""Evaluates a grid's checkpoints, and their mixtures with the model before, on the sets of its suite."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.ablation.config import Grid
from arf_plugin.ablation.plan import Run
from arf_plugin.errors import GridError

if TYPE_CHECKING:
    from arf_plugin.evaluation.sets import EvaluationSet


def open_sets(grid: Grid, split: str) -> list[EvaluationSet]:
    """Opens the sets of the grid's suite.

    Args:
        grid: the grid.
        split: "test" or "validation".

    Returns:
        What is there; sets of the test half that are not are named on standard error.

    Raises:
        GridError: not one is there.
        EvaluationError: a set that is malformed.
    """
    from arf_plugin.evaluation.sources import find_suite, missing_text
    from arf_plugin.evaluation.suites import load_suite

    suite = load_suite(grid.evaluation.suite)
    if split == "test":
        found = find_suite(suite, Path(grid.evaluation.test), "test")
    else:
        found = find_suite(suite, Path(grid.evaluation.validation or ""), grid.evaluation.validation_split)
    if not found.sets:
        raise GridError(f"The {split} sets of the grid '{grid.name}': {missing_text(suite, found)}")
    if found.missing and split == "test":
        print(f"{missing_text(suite, found)}\nThe grid goes on without them.", file=sys.stderr)
    return found.sets


def measure(
    grid: Grid,
    folder: Path,
    runs: Sequence[Run],
    sets: Sequence[EvaluationSet],
    rows: Path,
    alphas: Sequence[float],
) -> None:
    """Measures what the rows do not hold yet; images are decoded once for all checkpoints.

    Args:
        grid: the grid.
        folder: GRID, which the rows' paths are relative to.
        runs: finished runs.
        sets: opened sets.
        rows: the file that rows are appended to.
        alphas: WiSE-FT: each run is also mixed with the weights it started from; 0 and 1 are these and the run itself.
    """
    from arf_plugin.evaluation.candidates import Candidate
    from arf_plugin.evaluation.run import evaluate

    candidates = []
    for run in runs:
        name = str(run.weights.relative_to(folder))
        candidates.append(Candidate(run.weights, name=name))
        if not run.arm.is_trained or run.arm.probe:  # a probe differs from the model before by its head alone
            continue
        original = str(run.original.relative_to(folder))
        candidates += [Candidate(run.weights, run.original, alpha, name, original) for alpha in alphas]
    if not candidates:
        return
    evaluate(
        candidates,
        grid.model,
        sets,
        suite=grid.evaluation.suite,
        pretrained=grid.pretrained,
        out=rows,
        batch_size=grid.evaluation.batch_size,
    )
