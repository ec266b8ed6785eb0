"""Rows as text and as the compact JSON of ``arf evaluate --json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arf_plugin.evaluation.rows import Row
from arf_plugin.evaluation.suites import Suite, average
from arf_plugin.untrusted import printable

_HEADINGS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "per class",
    "macro_f1": "macro F1",
    "ece": "ECE",
}


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by checkpoint or mixture, in order; mixtures are called `CHECKPOINT+wise`, or `+wise@ALPHA`."""
    alphas = {row["alpha"] for row in rows} - {None}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        at = f"@{row['alpha']:g}" if len(alphas) > 1 else ""
        name = row["checkpoint"] + ("" if row["alpha"] is None else f"+wise{at}")
        groups.setdefault(name, []).append(row)
    return groups


def summary(rows: Sequence[Row], suite: Suite | None) -> dict[str, Any]:
    """Rows reduced to figures in percent.

    Returns:
        `accuracy`: checkpoint -> set -> the set's headline metric; `averages`: checkpoint -> average -> figure, by the
        suite; `metrics`: checkpoint -> set -> all metrics; `samples`: images by set.
    """
    groups = grouped(rows)
    accuracy = {
        name: {row["set"]: row["metrics"][row["headline"]] for row in group} for name, group in groups.items()
    }
    return {
        "accuracy": accuracy,
        "averages": {name: average(suite, sets) if suite else {} for name, sets in accuracy.items()},
        "metrics": {name: {row["set"]: row["metrics"] for row in group} for name, group in groups.items()},
        "samples": {row["set"]: row["images"] for row in rows},
    }


def table(rows: Sequence[Row], suite: Suite | None) -> str:
    """Lays rows out for a console.

    Of one checkpoint all metrics of each set are shown; of several, a column each of headline metrics.
    """
    return printable(_laid_out(rows, suite))


def _laid_out(rows: Sequence[Row], suite: Suite | None) -> str:
    result = summary(rows, suite)
    names = list(result["accuracy"])
    headline = {row["set"]: row["headline"] for row in rows}
    heading = {name: _HEADINGS.get(metric, metric) for name, metric in headline.items()}
    titles = [name + ("" if metric == "top1" else f" ({heading[name]})") for name, metric in headline.items()]
    averages = list(result["averages"][names[0]]) if names else []
    width = max(map(len, [*titles, *averages, "percent"]))
    if len(names) == 1:
        return _one(names[0], rows, titles, width, result["averages"][names[0]])
    columns = [f"[{number}]" for number in range(1, len(names) + 1)]
    lines = [f"{'percent':<{width}} {'images':>7} " + " ".join(f"{column:>6}" for column in columns)]
    for (name, count), title in zip(result["samples"].items(), titles, strict=True):
        figures = " ".join(f"{result['accuracy'][one][name]:6.1f}" for one in names)
        lines.append(f"{title:<{width}} {count:>7} {figures}")
    if averages:
        lines.append("-" * len(lines[0]))
    for name in averages:
        figures = " ".join(f"{result['averages'][one][name]:6.1f}" for one in names)
        lines.append(f"{name:<{width}} {'':>7} {figures}")
    return "\n".join([*lines, *(f"{column} {name}" for column, name in zip(columns, names, strict=True))])


def _one(
    name: str, rows: Sequence[Row], titles: Sequence[str], width: int, averages: dict[str, float]
) -> str:
    shown = [name for name in _HEADINGS if any(name in row["metrics"] for row in rows)]
    lines = [
        name,
        f"{'percent':<{width}} {'images':>7}" + "".join(f"{_HEADINGS[n]:>10}" for n in shown),
    ]
    for row, title in zip(rows, titles, strict=True):
        cells = [f"{row['metrics'][name]:10.1f}" if name in row["metrics"] else f"{'':>10}" for name in shown]
        lines.append(f"{title:<{width}} {row['images']:>7}" + "".join(cells))
    if averages:
        lines.append("-" * len(lines[1]))
    return "\n".join([*lines, *(f"{name:<{width}} {'':>7}{value:10.1f}" for name, value in averages.items())])
