"""Accuracy against the cost of a step: a grid's results beside what its arms' steps cost, measured here.

    python scripts/emojinet/frontier.py runs/ablation/frontier --write docs/figures

Steps of all arms run in turn on one model, with batches ready in memory, so the ratios are compute alone and hold where
the grid's own runs were disturbed. Cost is in units of a plain open_clip step: class prompts alone, texts untrimmed.
The recommended arm is chosen on the validation sets: the cheapest one whose mean over ID, shift, mono and zero-shot is
no further below that of ARF with A = B than this varies over the seeds. Test figures are told, and decide nothing.

Files of GRID: cost.json (kept; --again measures anew), frontier.json and frontier.png; --write copies the last two into
a folder as emojinet-frontier[-...].json and .png, for scripts/tables.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(here), str(here / "bench")]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from emojinet.files import read_json, replacing, write_json

METRICS = ("ID", "shift", "mono", "zero-shot")
PLAIN, FULL = "plain", "arf"


def costs(grid: Mapping[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Times a step of every trained arm.

    Args:
        grid: GRID/grid.json.
        rounds: timed rounds; each runs every arm's step, or cycle of steps, once.

    Returns:
        Arm -> median, least and largest ratio of its step's time to the plain step's of the same round.
    """
    import torch
    from common import interleave
    from variants import StepBench, Variant

    from arf_plugin.hooks.model import freeze_batch_norm

    arms = [arm for arm in grid["arms"] if arm["kind"] != "before"]
    batch_size = int(arms[0]["flags"]["batch-size"])
    logging.disable(logging.INFO)
    torch.set_num_threads(1)  # as the grid's runs have it: several side by side
    bench = StepBench(grid["model"], batch_size, lengths=longest_texts(grid, batch_size))
    freeze_batch_norm(bench.core)
    variants = {PLAIN: Variant(PLAIN)}
    for arm in arms:
        flags = arm["flags"]
        variants[arm["name"]] = Variant(
            arm["name"],
            pairs=int(flags.get("arf-pair-batch-size", batch_size)) / batch_size if arm["anchors"] else None,
            trim=True,
            dropout=float(flags.get("arf-pair-patch-dropout", 0)),
            image_size=int(flags["arf-pair-image-size"]) if "arf-pair-image-size" in flags else None,
            every=int(flags.get("arf-every", 1)),
        )
    seconds = interleave({name: bench.step(variant) for name, variant in variants.items()}, rounds)
    found = {}
    for name, variant in variants.items():
        ratios = [a / b / variant.every for a, b in zip(seconds[name], seconds[PLAIN], strict=True)]
        found[name] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return found


def longest_texts(grid: Mapping[str, Any], batch_size: int) -> list[int]:
    """Tokens of the longest prompt, caption and pair text of a batch: medians over many drawn at random."""
    import random

    import open_clip
    import pyarrow.parquet as pq

    from arf_plugin.anchors.task import expand_urls
    from arf_plugin.data.trim import TextTrimmer

    tokenize = open_clip.get_tokenizer(grid["model"])
    anchors = Path(grid["anchors"])
    folder = Path(expand_urls(grid["data"]["task"])[0]).parents[1]
    classes, templates = (
        (folder / f"{name}.txt").read_text().splitlines() for name in ("classnames", "templates")
    )
    prompts = [template.replace("{c}", name) for name in classes for template in templates]
    captions = [
        text
        for path in anchors.glob("captions/*.parquet")
        for text in pq.read_table(path)["caption"].to_pylist()
    ]
    drawn, medians = random.Random(0), []
    for texts in (prompts, captions, list(pair_texts(anchors))):
        tokens = tokenize(texts)
        ends = (TextTrimmer(tokens.shape[1])._ends(tokens) + 1).tolist()
        medians.append(round(statistics.median(max(drawn.choices(ends, k=batch_size)) for _ in range(200))))
    return medians


def pair_texts(anchors: Path) -> list[str]:
    """Texts of an anchor set's pairs."""
    import tarfile

    texts = []
    for path in sorted(anchors.glob("pairs/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    content = tar.extractfile(member)
                    texts.append(content.read().decode() if content is not None else "")
    return texts


def summarize(folder: Path, cost: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Puts cost, test figures and validation figures of every arm together, and chooses.

    Returns:
        ``arms``: name, label, cost, mean, std and per_seed (test, percent), and ``validation``, the mean over the four
        averages by seed. ``recommended``: the arm that validation chose.
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
        "recommended": recommend(arms),
    }


def validation_means(folder: Path, grid: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm -> seed -> mean over the four averages of the validation sets."""
    from arf_plugin.evaluation.rows import by_set, read_rows
    from arf_plugin.evaluation.suites import average, load_suite

    suite, grouped = load_suite(grid["suite"]), {}
    for row in read_rows(folder / "validation.jsonl"):
        if row.get("alpha") is None:
            grouped.setdefault(row["checkpoint"], []).append(row)
    found: dict[str, dict[str, float]] = {}
    for checkpoint, rows in grouped.items():
        arm, _, seed = Path(checkpoint).parent.name.rpartition("-")
        averages = average(suite, by_set(rows))
        found.setdefault(arm, {})[seed] = round(statistics.fmean(averages[name] for name in METRICS), 3)
    return found


def recommend(arms: Sequence[Mapping[str, Any]]) -> str | None:
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

    figure, panels = plt.subplots(1, len(METRICS), figsize=(13, 4), dpi=150, sharex=True)
    for axes, metric in zip(panels, METRICS, strict=True):
        for number, arm in enumerate(result["arms"]):
            if arm["cost"] is None:
                axes.axhline(arm["mean"][metric], color="#9aa0a6", lw=0.8, ls=":", label=arm["label"])
                continue
            chosen = arm["arm"] == result["recommended"]
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
                label=arm["label"] + (" (recommended)" if chosen else ""),
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


def table(result: Mapping[str, Any]) -> str:
    """The figures as text, cheapest first."""
    lines = [f"{'':<32}{'cost':>7}" + "".join(f"{name:>14}" for name in METRICS) + f"{'validation':>12}"]
    for arm in by_cost(result):
        mean, std, means = arm["mean"], arm["std"], list(arm["validation"].values())
        cells = [f"{mean[name]:.1f}" + (f" ± {std[name]:.1f}" if std else "") for name in METRICS]
        cost = f"{arm['cost']['median']:.2f}" if arm["cost"] else ""
        line = f"{arm['label']:<32}{cost:>7}" + "".join(f"{cell:>14}" for cell in cells)
        line += f"{statistics.fmean(means):12.1f}" if means else ""
        lines.append(line + (" <- recommended" if arm["arm"] == result["recommended"] else ""))
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
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--again", action="store_true", help="time steps anew")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="also put figures and picture there")
    args = parser.parse_args()
    for name in ("grid.json", "results.json", "validation.jsonl"):
        if not (args.grid / name).is_file():
            parser.error(f"{args.grid} has no {name}; run scripts/emojinet/ablate.sh frontier first")
    cost = args.grid / "cost.json"
    if args.again or not cost.is_file():
        write_json(cost, costs(read_json(args.grid / "grid.json"), args.rounds))
    result = summarize(args.grid, read_json(cost))
    write_json(args.grid / "frontier.json", result)
    plot(result, args.grid / "frontier.png")
    if args.write:
        for suffix in (".json", ".png"):
            shutil.copyfile(args.grid / f"frontier{suffix}", args.write / f"{result['grid']}{suffix}")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
