"""What a benchmark's grids say over all pretrained models: every method beside one of them, paired by image.

    python scripts/benchmarks/summary.py emojinet --write docs/figures
    python scripts/benchmarks/summary.py iconnet --one feature --grid lr --write docs/figures

Reads runs/BENCHMARK/TOWER-N/GRID, which scripts/benchmarks/grid.sh has filled, of every model that has finished, and
models that were finished elsewhere from docs/figures/grids (`grid.sh --keep`). Prints scores and differences; --write
leaves them in FOLDER/BENCHMARK-GRID.json for scripts/tables.py, and for the grid of learning rates a figure beside.
Lines of a table are arms, and arms with WiSE-FT at the alpha that each model's
validation sets chose, or with their seeds merged. Intervals count pretrained models, not runs, where there are several
(:mod:`arf_plugin.evaluation.verdicts`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arf_plugin.ablation.plan import MERGES
from arf_plugin.console import text_table
from arf_plugin.evaluation.records import EvalRecord, read_records
from arf_plugin.evaluation.suites import Suite, average, load_suite
from arf_plugin.evaluation.verdicts import MEAN, ByRun, as_cell, compare, find_arm, joined
from benchmarks.files import read_json, replacing, write_json, write_text

KEPT = Path("docs/figures/grids")  # results without their checkpoints, by benchmark, model and grid

# The averages that the mean is over; mono and solid are the looks that are furthest from the task.
FIVE = ("ID", "shift", "mono", "solid", "zero-shot", "zero-shot fine")
WISE = "WiSE-FT"


class Line(NamedTuple):
    """A line of the table: an arm as it was trained, or with one of `MERGES` or `WISE` after it."""

    arm: str
    after: str = ""

    def __str__(self) -> str:
        return f"{self.arm}+{self.after}" if self.after else self.arm


class Model:
    """One pretrained model's grid."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.parent.name
        results = read_json(folder / "results.json")
        self.suite: str = results["suite"]
        self.alphas = {row["arm"]: row["alpha"] for row in results["rows"] if row["alpha"] is not None}
        self.labels = {row["arm"]: row["label"] for row in results["rows"] if row["alpha"] is None}
        records = read_records(folder / "results.jsonl")
        self.lines: dict[Line, ByRun] = {}
        for name in self.labels:
            self.lines[Line(*name.split("+"))] = find_arm(records, name)
            if name in self.alphas:
                self.lines[Line(name, WISE)] = find_arm(records, f"{name}+wise@{self.alphas[name]:g}")

    def label(self, line: Line) -> str:
        """What tables call a line."""
        return self.labels[line.arm] + (f" + {MERGES.get(line.after, line.after)}" if line.after else "")


def keep(folder: Path, into: Path) -> None:
    """Copies what a summary reads of a model's grid, and what other models take over from it; no alphas but the chosen.

    Args:
        folder: The grid's, finished.
        into: Is made.
    """
    model = Model(folder)
    records = [record for runs in model.lines.values() for run in runs.values() for record in run.values()]
    into.mkdir(parents=True, exist_ok=True)
    write_text(into / "results.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    for name in ("choices.json", "results.json"):
        write_json(into / name, read_json(folder / name))


def finished(benchmark: str, grid: str, runs: Path | None = None) -> list[Path]:
    """Folders of the models whose grid has finished: here, or else among those that are kept."""
    found: dict[str, Path] = {}
    for parent in (KEPT / benchmark, runs or Path("runs") / benchmark):
        found |= {path.parents[1].name: path.parent for path in parent.glob(f"*/{grid}/results.json")}
    return [found[name] for name in sorted(found)]


def summarize(models: Sequence[Model], one: str) -> dict[str, Any]:
    """Scores of every line that all models have, and how far those of an arm are ahead of them.

    Returns:
        ``lines``: label, mean over models of the mean over seeds, and standard deviation over models, by average.
        ``against``: for each line of `one`, by other line, verdicts by average, and how many models it is ahead in.
    """
    suite = load_suite(models[0].suite)
    averages = {name: entry for name, entry in suite.averages.items() if name in FIVE}
    lines = [line for line in models[0].lines if all(line in model.lines for model in models)]
    scores = {line: [_means(suite, model.lines[line]) for model in models] for line in lines}
    against: dict[str, dict[str, Any]] = {}
    for first in [line for line in lines if line.arm == one]:
        for other in [line for line in lines if line.arm != one]:
            sides: list[list[ByRun]] = [[model.lines[line] for model in models] for line in (first, other)]
            found = compare(*joined(*sides), averages, mean=True)
            ahead = [a[MEAN] > b[MEAN] for a, b in zip(scores[first], scores[other], strict=True)]
            against.setdefault(str(first), {})[str(other)] = {
                "averages": {name: verdict.as_json() for name, verdict in found.verdicts.items()},
                "unpaired": found.unpaired,
                "models_ahead": sum(ahead),
            }
    return {
        "one": one,
        "models": [model.name for model in models],
        "seeds": max(len(by_seed) for model in models for by_seed in model.lines.values()),
        "lines": {
            str(line): {
                "label": models[0].label(line),
                "alphas": {m.name: m.alphas[line.arm] for m in models} if line.after == WISE else None,
                "mean": {n: round(statistics.fmean(m[n] for m in means), 3) for n in means[0]},
                "std": {n: round(statistics.stdev(m[n] for m in means), 3) for n in means[0]}
                if len(means) > 1
                else None,
                "per_model": [{name: round(value, 3) for name, value in m.items()} for m in means],
            }
            for line, means in scores.items()
        },
        "against": against,
    }


def _means(suite: Suite, runs: Mapping[Any, Mapping[str, EvalRecord]]) -> dict[str, float]:
    """Means over seeds of the five averages and of their mean."""
    found = [
        average(suite, {name: record["metrics"]["top1"] for name, record in run.items()})
        for run in runs.values()
    ]
    names = [name for name in FIVE if all(name in one for one in found)]
    means = {name: statistics.fmean(one[name] for one in found) for name in names}
    return {**means, MEAN: statistics.fmean(means.values())}


def as_tables(found: Mapping[str, Any], merges: bool = True) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows of tables: the scores of all lines, then how far those of one arm are ahead.

    Args:
        found: By :func:`summarize`.
        merges: With what becomes of an arm's seeds when they are merged.
    """
    told = [name for name in found["lines"] if merges or name.partition("+")[2] not in MERGES]
    lines, models = {name: found["lines"][name] for name in told}, len(found["models"])
    names = list(next(iter(lines.values()))["mean"])
    rows = []
    for line in lines.values():
        spread = line["std"] or {}
        cells = (f"{line['mean'][n]:.1f}" + (f" ± {spread[n]:.1f}" if n in spread else "") for n in names)
        rows.append([line["label"], *cells])
    many = f"{models} pretrained {'models' if models > 1 else 'model'}, {found['seeds']} seeds, %"
    tables = [([many, *names], rows)]
    for first, others in found["against"].items():
        if first not in lines:
            continue
        rows = [
            [
                lines[other]["label"],
                *(as_cell(entry["averages"][n]) if n in entry["averages"] else "" for n in names),
                f"{entry['models_ahead']} of {models}",
            ]
            for other, entry in others.items()
            if other in lines
        ]
        tables.append(([f"{lines[first]['label']} less", *names, "models"], rows))
    return tables


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The mean of the five averages over the learning rate, a line for each method (arms METHOD-xTIMES)."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    methods: dict[str, list[tuple[int, list[float], str]]] = {}
    for name, line in found["lines"].items():
        method, _, times = name.partition("-x")
        if times.isdecimal():
            values = [model[MEAN] for model in line["per_model"]]
            methods.setdefault(method, []).append((int(times), values, line["label"].split(",")[0]))
    with mpl.rc_context({"svg.hashsalt": "arf"}):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for colour, points in zip(("#9a6700", "#1f6feb", "#1a7f37"), methods.values(), strict=False):
            points.sort()
            times = [x for x, _, _ in points]
            means = [statistics.fmean(values) for _, values, _ in points]
            for number in range(len(points[0][1])):
                axes.plot(
                    times, [values[number] for _, values, _ in points], color=colour, lw=0.7, alpha=0.35
                )
            axes.plot(times, means, "o-", color=colour, lw=2, label=points[0][2])
        if "before" in found["lines"]:
            axes.axhline(found["lines"]["before"]["mean"][MEAN], color="#666", lw=1, ls=":", label="before")
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4], ["x 1", "x 2", "x 4"])
        axes.set_xlabel("learning rate")
        axes.set_ylabel("mean of the five, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", help="emojinet or iconnet")
    parser.add_argument("--grid", choices=("all", "lr"), default="all", help="which grid (default: all)")
    parser.add_argument(
        "--one", default="feature", metavar="ARM", help="what is compared with the others (default: feature)"
    )
    parser.add_argument("--runs", type=Path, help="folder of the models (default: runs/BENCHMARK)")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write BENCHMARK-GRID.json there")
    args = parser.parse_args()
    folders = finished(args.benchmark, args.grid, args.runs)
    if not folders:
        parser.error(f"there is no finished grid of {args.benchmark}: scripts/benchmarks/grid.sh runs it")
    found = summarize([Model(folder) for folder in folders], args.one)
    print("\n\n".join(text_table(*table) for table in as_tables(found)))
    if args.write:
        name = f"{args.benchmark}-{'remember' if args.grid == 'all' else args.grid}"
        write_json(args.write / f"{name}.json", found)
        if args.grid == "lr":
            draw(found, args.write / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
