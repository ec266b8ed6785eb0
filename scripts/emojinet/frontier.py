"""Accuracy against the cost of a step: a grid's results beside what scripts/emojinet/step_cost.py measured.

    python scripts/emojinet/frontier.py runs/ablation/frontier --write docs/figures

One arm is chosen on the validation sets: the cheapest one whose mean over ID, shift, mono and zero-shot is
no further below that of ARF with A = B than this varies over the seeds. Test figures are told, and decide nothing.

Writes GRID/frontier.json and frontier.png; --write copies them into a folder as emojinet-frontier[-...].json and .png,
for scripts/tables.py.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.files import read_json, replacing, write_json

CHOSEN_BY = ("ID", "shift", "mono", "zero-shot")
METRICS = (*CHOSEN_BY, "zero-shot fine")
FULL = "arf"  # the arm that the others are measured by


def summarize(folder: Path, cost: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Puts cost, test figures and validation figures of every arm together, and chooses.

    Returns:
        ``arms``: name, label, cost, mean, std and per_seed (test, percent), and ``validation``, the mean over the four
        averages by seed. ``chosen``: the arm that validation chose.
    """
    grid, results = read_json(folder / "grid.json"), read_json(folder / "results.json")
    validation = validation_means(folder, grid)
    arms = []
    for row in results["rows"]:
        if row["alpha"] is not None:
            continue
        own = {key: row[key] for key in ("arm", "label", "mean", "std", "per_seed")}
        arms.append(own | {"cost": cost.get(row["arm"]), "validation": validation.get(row["arm"], {})})
    return {
        "grid": grid["name"],
        "seeds": results["seeds"],
        "metrics": list(METRICS),
        "arms": arms,
        "chosen": choose(arms),
    }


def validation_means(folder: Path, grid: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm -> seed -> mean over the four averages of the validation sets."""
    from arf_plugin.evaluation.records import by_set, read_records
    from arf_plugin.evaluation.suites import average, load_suite

    suite, grouped = load_suite(grid["suite"]), {}
    for row in read_records(folder / "validation.jsonl"):
        if row.get("alpha") is None:
            grouped.setdefault(row["checkpoint"], []).append(row)
    found: dict[str, dict[str, float]] = {}
    for checkpoint, rows in grouped.items():
        arm, _, seed = Path(checkpoint).parent.name.rpartition("-")
        averages = average(suite, by_set(rows))
        found.setdefault(arm, {})[seed] = round(statistics.fmean(averages[name] for name in CHOSEN_BY), 3)
    return found


def choose(arms: Sequence[Mapping[str, Any]]) -> str | None:
    """The cheapest arm with anchors that validation cannot tell from ARF with A = B; None before there are figures."""
    full = next((arm for arm in arms if arm["arm"] == FULL), None)
    if full is None or not full["validation"]:
        return None
    values = list(full["validation"].values())
    floor = statistics.fmean(values) - (statistics.stdev(values) if len(values) > 1 else 0.0)
    good = [
        arm
        for arm in arms
        if arm["cost"]
        and arm["validation"]
        and arm["arm"] != "flyp"
        and statistics.fmean(arm["validation"].values()) >= floor
    ]
    return str(min(good, key=lambda arm: arm["cost"]["median"])["arm"])


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws a panel per average: accuracy over cost, whiskers of one standard deviation over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(METRICS), figsize=(15, 4), dpi=150, sharex=True)
    for axes, metric in zip(panels, METRICS, strict=True):
        for number, arm in enumerate(result["arms"]):
            if arm["cost"] is None:
                axes.axhline(arm["mean"][metric], color="#9aa0a6", lw=0.8, ls=":", label=arm["label"])
                continue
            chosen = arm["arm"] == result["chosen"]
            axes.errorbar(
                arm["cost"]["median"],
                arm["mean"][metric],
                yerr=arm["std"][metric] if arm["std"] else None,
                fmt="*" if chosen else "o",
                ms=12 if chosen else 6,
                color=f"C{number % 10}",
                mfc=None if number < 10 else "white",
                lw=0.9,
                capsize=2,
                label=arm["label"] + (" (chosen)" if chosen else ""),
            )
        axes.set_title(metric)
        axes.set_xlabel("step, times a plain one")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("top-1 accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, frameon=False, fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.06 * (1 + len(labels) // 5), 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)


def cells(arm: Mapping[str, Any]) -> list[str]:
    """An arm's figures for a table: cost, the averages of the test sets, and the mean of validation."""
    mean, std, means = arm["mean"], arm["std"], arm["validation"].values()
    return [
        f"{arm['cost']['median']:.2f}" if arm["cost"] else "",
        *(f"{mean[name]:.1f}" + (f" ± {std[name]:.1f}" if std else "") for name in METRICS),
        f"{statistics.fmean(means):.1f}" if means else "",
    ]


def table(result: Mapping[str, Any]) -> str:
    """The figures as text, cheapest first."""
    lines = [f"{'':<32}{'cost':>7}" + "".join(f"{name:>16}" for name in METRICS) + f"{'validation':>12}"]
    for arm in by_cost(result):
        cost, *averages, validation = cells(arm)
        line = f"{arm['label']:<32}{cost:>7}" + "".join(f"{each:>16}" for each in averages)
        lines.append(f"{line}{validation:>12}" + (" <- chosen" if arm["arm"] == result["chosen"] else ""))
    return "\n".join(lines)


def by_cost(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arms, cheapest first; what was not trained comes before."""
    return sorted(result["arms"], key=lambda arm: arm["cost"]["median"] if arm["cost"] else 0.0)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="folder of a finished `arf ablate emojinet-frontier[-vit]`")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="also put figures and picture there")
    args = parser.parse_args()
    for command, names in (
        (f"scripts/emojinet/ablate.sh {args.grid.name}", ("grid.json", "results.json", "validation.jsonl")),
        (f"python scripts/emojinet/step_cost.py {args.grid}", ("cost.json",)),
    ):
        for name in names:
            if not (args.grid / name).is_file():
                parser.error(f"{args.grid} has no {name}; run first: {command}")
    result = summarize(args.grid, read_json(args.grid / "cost.json"))
    write_json(args.grid / "frontier.json", result)
    plot(result, args.grid / "frontier.png")
    if args.write:
        for suffix in (".json", ".png"):
            with replacing(args.write / f"{result['grid']}{suffix}") as temporary:
                shutil.copyfile(args.grid / f"frontier{suffix}", temporary)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
