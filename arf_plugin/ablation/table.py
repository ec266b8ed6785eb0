"""The grid's results: mean and standard deviation over seeds, for people and for programs."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arf_plugin.ablation.choose import Choices
from arf_plugin.ablation.config import Arm, Grid
from arf_plugin.ablation.plan import Run, before
from arf_plugin.anchors.files import replacing, write_json

Averages = dict[str, float]
# run (arm, seed) -> alpha (None: the run itself) -> averages
Figures = dict[tuple[str, int], dict[float | None, Averages]]


def figures(grid: Grid, folder: Path, runs: Sequence[Run], rows: Path) -> Figures:
    """Reads rows and reduces them to the suite's averages.

    Args:
        grid: the grid.
        folder: GRID.
        runs: the runs to look for; that of the model before may be among them.
        rows: file of rows.

    Returns:
        Averages in percent; what has not been evaluated is left out.
    """
    from arf_plugin.evaluation.records import by_set, read_records
    from arf_plugin.evaluation.suites import average, load_suite

    suite = load_suite(grid.evaluation.suite)
    grouped: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in read_records(rows) if rows.is_file() else ():
        grouped.setdefault((row["checkpoint"], row.get("alpha")), []).append(row)
    found: Figures = {}
    for run in runs:
        name = str(run.weights.relative_to(folder))
        for (checkpoint, alpha), group in grouped.items():
            if checkpoint == name and (averages := average(suite, by_set(group))):
                found.setdefault((run.arm.name, run.seed), {})[alpha] = averages
    return found


def drop_rows(path: Path, gone: re.Pattern[str]) -> None:
    """Removes the rows of checkpoints whose paths begin like this."""
    from arf_plugin.evaluation.records import read_records

    if not path.is_file():
        return
    kept = [row for row in read_records(path, whole=False) if not gone.match(str(row["checkpoint"]))]
    with replacing(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8"
        )


def choose_alphas(grid: Grid, choices: Choices, arms: Sequence[Arm], validation: Figures) -> dict[str, float]:
    """Chooses every arm's alpha by the mean over seeds of an average of the validation sets."""
    chosen = {}
    for arm in arms:
        of_seeds = [found for (name, _), found in validation.items() if name == arm.name]
        alphas = [alpha for alpha in grid.wise if of_seeds and all(alpha in found for found in of_seeds)]
        if alphas and grid.wise_by is not None:
            means = {
                alpha: statistics.fmean(found[alpha].get(grid.wise_by, 0.0) for found in of_seeds)
                for alpha in alphas
            }
            chosen[arm.name] = choices.decide_alpha(arm, grid.wise_by, means)
    return chosen


def summarize(
    grid: Grid,
    folder: Path,
    arms: Mapping[str, Arm],
    runs: Sequence[Run],
    test: Figures,
    alphas: Mapping[str, float],
) -> dict[str, Any]:
    """Builds the content of results.json.

    Args:
        grid: the grid.
        folder: GRID.
        arms: arms with their chosen flags, by name.
        runs: the finished runs.
        test: figures on the test sets.
        alphas: chosen alpha by arm.

    Returns:
        ``rows``: one per line of the table (arm, alpha, mean, std, per_seed; percent). ``against_reference``: the
        difference to the reference arm, paired by seed. All figures are of the test sets.
    """
    lines: list[dict[str, Any]] = []
    for arm in grid.arms:
        wanted: list[float | None] = [None]
        if arm.name in alphas:
            wanted.append(alphas[arm.name])
        lines += [line for alpha in wanted if (line := _line(arm, alpha, test)) is not None]
    of_arm = {run.arm.name: run for run in runs}
    reference = of_arm.get(grid.reference or "")
    cost = {
        name: {
            "steps": run.steps(),
            "images": run.images(),
            "relative": _ratio(run.images(), reference.images() if reference else None),
        }
        for name, run in of_arm.items()
    }
    return {
        "grid": grid.name,
        "seeds": sorted({run.seed for run in runs if run.arm.is_trained}),
        "suite": grid.evaluation.suite,
        "reference": grid.reference,
        "rows": lines,
        "against_reference": _against(grid.reference, test),
        "wise": {
            arm.name: {
                f"{alpha:g}": line for alpha in grid.wise if (line := _line(arm, alpha, test)) is not None
            }
            for arm in grid.arms
            if arm.is_trained
        },
        "cost": cost,
    }


def _line(arm: Arm, alpha: float | None, test: Figures) -> dict[str, Any] | None:
    per_seed = {
        seed: found[alpha] for (name, seed), found in test.items() if name == arm.name and alpha in found
    }
    if not per_seed:
        return None
    names = [
        name for name in next(iter(per_seed.values())) if all(name in found for found in per_seed.values())
    ]

    def over_seeds(function: Any) -> Averages:
        return {name: round(function([found[name] for found in per_seed.values()]), 3) for name in names}

    return {
        "arm": arm.name,
        "label": arm.label if alpha is None else f"{arm.label} + WiSE-FT {alpha:g}",
        "alpha": alpha,
        "mean": over_seeds(statistics.fmean),
        "std": over_seeds(statistics.stdev) if len(per_seed) > 1 else None,
        "per_seed": {
            str(seed): {name: round(value, 3) for name, value in found.items()}
            for seed, found in sorted(per_seed.items())
        },
    }


def _against(reference: str | None, test: Figures) -> dict[str, Any]:
    """Differences to the reference, seed by seed, for every arm that shares seeds with it."""
    result: dict[str, Any] = {}
    base = {seed: found[None] for (name, seed), found in test.items() if name == reference and None in found}
    for name in dict.fromkeys(name for name, _ in test):
        own = {seed: found[None] for (arm, seed), found in test.items() if arm == name and None in found}
        seeds = sorted(set(own) & set(base))
        if name == reference or not seeds:
            continue
        averages = [average for average in own[seeds[0]] if average in base[seeds[0]]]
        result[name] = {
            average: {
                "mean": round(statistics.fmean(own[s][average] - base[s][average] for s in seeds), 3),
                "per_seed": [round(own[s][average] - base[s][average], 3) for s in seeds],
            }
            for average in averages
        }
    return result


def _ratio(images: int | None, reference: int | None) -> float | None:
    return round(images / reference, 2) if images is not None and reference else None


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The table: a heading and a line per arm, the reference's multiple of compute last."""
    names = list(dict.fromkeys(name for line in result["rows"] for name in line["mean"]))
    table = [["", *names, "images forwarded"]]
    for line in result["rows"]:
        spread = line["std"]
        figures_of = [
            ""
            if name not in line["mean"]
            else f"{line['mean'][name]:.1f}" + (f" ± {spread[name]:.1f}" if spread else "")
            for name in names
        ]
        cost = result["cost"].get(line["arm"], {})
        relative = cost.get("relative")
        images = "" if line["alpha"] is not None or not cost.get("images") else f"{cost['images']:,}"
        table.append(
            [line["label"], *figures_of, images + (f" ({relative:g}x)" if images and relative else "")]
        )
    return table


def as_text(result: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    table = cells(result)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    count = len(result["seeds"])
    lines = [f"test sets, percent, mean ± standard deviation over {count} seed{'s' if count != 1 else ''}"]
    for line in table:
        head, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([head, *rest]).rstrip())
    return "\n".join(lines)


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table for a page of documentation."""
    head, *body = cells(result)
    lines = [["%", *head[1:]], ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes results.json and table.md."""
    write_json(folder / "results.json", result)
    with replacing(folder / "table.md") as temporary:
        temporary.write_text(as_markdown(result), encoding="utf-8")


def all_runs(
    grid: Grid, folder: Path, arms: Mapping[str, Arm], seeds: Sequence[int], processes: int
) -> list[Run]:
    """The runs of the whole grid whose flags are known, that of the model before first."""
    trained = [arm for arm in arms.values() if arm.is_trained]
    return [
        before(grid, folder),
        *(Run(grid, folder, arm, seed, None, processes) for arm in trained for seed in seeds),
    ]
