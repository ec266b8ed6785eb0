"""Records as text and as the compact JSON of ``arf evaluate --json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arf_plugin.console import text_table
from arf_plugin.evaluation.records import EvalRecord
from arf_plugin.evaluation.suites import Suite, average
from arf_plugin.evaluation.verdicts import Comparison
from arf_plugin.untrusted import printable

_HEADINGS = {
    **{"top1": "top-1", "top5": "top-5", "mean_per_class": "per class", "macro_f1": "macro F1", "ece": "ECE"}
}


def grouped(records: Sequence[EvalRecord]) -> dict[str, list[EvalRecord]]:
    """Records by checkpoint or mixture, in order; mixtures are called `CHECKPOINT+wise`, or `+wise@ALPHA`."""
    alphas = {record["alpha"] for record in records} - {None}
    groups: dict[str, list[EvalRecord]] = {}
    for record in records:
        at = f"@{record['alpha']:g}" if len(alphas) > 1 else ""
        name = record["checkpoint"] + ("" if record["alpha"] is None else f"+wise{at}")
        groups.setdefault(name, []).append(record)
    return groups


def summary(records: Sequence[EvalRecord], suite: Suite | None) -> dict[str, Any]:
    """Records reduced to scores in percent.

    Returns:
        `accuracy`: checkpoint -> set -> the set's headline metric; `averages`: checkpoint -> average -> score, by the
        suite; `metrics`: checkpoint -> set -> all metrics; `samples`: images by set.
    """
    groups = grouped(records)
    accuracy = {
        name: {record["set"]: record["metrics"][record["headline"]] for record in group}
        for name, group in groups.items()
    }
    return {
        "accuracy": accuracy,
        "averages": {name: average(suite, sets) if suite else {} for name, sets in accuracy.items()},
        "metrics": {
            name: {record["set"]: record["metrics"] for record in group} for name, group in groups.items()
        },
        "samples": {record["set"]: record["images"] for record in records},
    }


def table(records: Sequence[EvalRecord], suite: Suite | None) -> str:
    """Lays records out for a console.

    Of one checkpoint all metrics of each set are shown; of several, a column each of headline metrics.
    """
    found = summary(records, suite)
    names = list(found["accuracy"])
    one = len(names) == 1
    metrics = [metric for metric in _HEADINGS if any(metric in record["metrics"] for record in records)]
    lines: list[list[str]] = []
    for record in {record["set"]: record for record in records}.values():
        name, headline = record["set"], record["headline"]
        title = name if headline == "top1" else f"{name} ({_HEADINGS.get(headline, headline)})"
        if one:
            scores = [record["metrics"].get(metric) for metric in metrics]
        else:
            scores = [found["accuracy"][checkpoint].get(name) for checkpoint in names]
        lines.append([title, str(record["images"]), *("" if s is None else f"{s:.1f}" for s in scores)])
    for name in found["averages"][names[0]] if names else ():
        scores = [found["averages"][checkpoint].get(name) for checkpoint in names]
        lines.append(
            [name, "", *("" if s is None else f"{s:.1f}" for s in scores), *[""] * (one and len(metrics) - 1)]
        )
    columns = [_HEADINGS[m] for m in metrics] if one else [f"[{n}]" for n in range(1, len(names) + 1)]
    shown = text_table(["percent", "images", *columns], lines)
    keys = [f"{column} {name}" for column, name in zip(columns, names, strict=True)] if not one else []
    return printable("\n".join([*names[:one], shown, *keys]))


def comparison_table(before: str, after: str, *found: Comparison) -> str:
    """Lays verdicts on one arm less another out for a console."""
    lines = [
        [name, each.images, each.differ, f"{each.other:.1f}", f"{each.one:.1f}", f"{each.difference:+.1f}",
         f"{each.low:+.1f} to {each.high:+.1f}", f"{each.p:.2g}", f"{each.corrected:.2g}", each.word]
        for one in found
        for name, each in one.verdicts.items()
    ]  # fmt: skip
    seeds = max(each.seeds for one in found for each in one.verdicts.values())
    columns = [
        "",
        "images",
        "differ",
        "before",
        "after",
        "after - before",
        "95 % interval",
        "p",
        "p (Holm)",
        "verdict",
    ]
    return "\n".join(
        [
            f"before: {printable(before)}; after: {printable(after)}",
            f"top-1 in percent, paired by image, {seeds} {'run' if seeds == 1 else 'runs'} each",
            text_table(columns, lines),
            *(
                f"not compared: {printable(name)}: {why}"
                for one in found
                for name, why in one.unpaired.items()
            ),
        ]
    )
