"""Turns accuracies into the table, the JSON and the picture that the quickstart ends with."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import replacing, write_json

from emojinet.split import MONO_VENDORS

# key -> heading, in the table's order
METRICS = {
    "id": "ID",
    "shift": "shift",
    "mono": "mono",
    "zero_shot": "zero-shot",
    "zero_shot_fine": "zero-shot fine",
}
ARMS = {
    "before": "before",
    "flyp": "FLYP",
    "arf": "ARF",
    "flyp+wise": "FLYP + WiSE-FT",
    "arf+wise": "ARF + WiSE-FT",
}
COLOURS = {
    "before": "#9aa0a6",
    "flyp": "#e07a5f",
    "arf": "#1f6f8b",
    "flyp+wise": "#f0b8a8",
    "arf+wise": "#86bccb",
}

Scores = dict[str, float]


def metrics(by_set: Mapping[str, float]) -> Scores:
    """Reduces accuracies by set to the five reported metrics.

    Args:
        by_set: percent by set name, such as "id", "shift/twemoji", "zero_shot".

    Returns:
        "shift" is the mean over the nine domains, "mono" over the two monochrome ones among them.
    """
    domains = {
        name.removeprefix("shift/"): value for name, value in by_set.items() if name.startswith("shift/")
    }
    return {
        "id": by_set["id"],
        "shift": statistics.fmean(domains.values()),
        "mono": statistics.fmean(domains[vendor] for vendor in MONO_VENDORS),
        "zero_shot": by_set["zero_shot"],
        "zero_shot_fine": by_set["zero_shot_fine"],
    }


def summarize(
    per_seed: Mapping[str, Mapping[int, Mapping[str, float]]], samples: Mapping[str, int]
) -> dict[str, Any]:
    """Builds the content of results.json.

    Args:
        per_seed: arm -> seed -> accuracies by set. "before" has one entry: it has no seed of its own.
        samples: images in each set.

    Returns:
        `arms` holds means over seeds, `std` their standard deviations, `per_seed` each seed, all in percent;
        `domains` has the shift domains one by one; `wins` says where ARF beats FLYP in every seed.
    """
    seeds = sorted(per_seed["flyp"])
    reduced = {arm: {seed: metrics(sets) for seed, sets in runs.items()} for arm, runs in per_seed.items()}

    def over_seeds(function: Any, arm: str) -> Scores:
        return {name: round(function([run[name] for run in reduced[arm].values()]), 2) for name in METRICS}

    def domain_means(arm: str) -> Scores:
        names = [name for name in samples if name.startswith("shift/")]
        return {
            name.removeprefix("shift/"): round(
                statistics.fmean(sets[name] for sets in per_seed[arm].values()), 2
            )
            for name in names
        }

    def margins(arf: str, flyp: str) -> dict[str, list[float]]:
        return {
            name: [round(reduced[arf][s][name] - reduced[flyp][s][name], 2) for s in seeds]
            for name in METRICS
        }

    return {
        "seeds": seeds,
        "arms": {arm: over_seeds(statistics.fmean, arm) for arm in reduced},
        "std": {
            arm: over_seeds(lambda x: statistics.stdev(x) if len(x) > 1 else 0.0, arm) for arm in reduced
        },
        "per_seed": {
            arm: {str(seed): {k: round(v, 2) for k, v in run.items()} for seed, run in runs.items()}
            for arm, runs in reduced.items()
        },
        "arf_minus_flyp": {"plain": margins("arf", "flyp"), "wise": margins("arf+wise", "flyp+wise")},
        "domains": {arm: domain_means(arm) for arm in reduced},
        "samples": dict(samples),
    }


def table(result: Mapping[str, Any]) -> str:
    """The results as text: mean and standard deviation over seeds, and in which seeds ARF is ahead of FLYP."""
    seeds = result["seeds"]
    lines = [
        f"top-1 %, mean ± standard deviation over {len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
        f"{'':<16}" + "".join(f"{heading:>16}" for heading in METRICS.values()),
    ]
    for arm, label in ARMS.items():
        mean, std = result["arms"][arm], result["std"][arm]
        cells = [f"{mean[m]:.1f}" + ("" if arm == "before" else f" ± {std[m]:.1f}") for m in METRICS]
        lines.append(f"{label:<16}" + "".join(f"{cell:>16}" for cell in cells))
    for kind, label in (("plain", "ARF > FLYP"), ("wise", "  with WiSE-FT")):
        margins = result["arf_minus_flyp"][kind]
        cells = [f"{sum(d > 0 for d in margins[m])} of {len(seeds)}" for m in METRICS]
        lines.append(f"{label:<16}" + "".join(f"{cell:>16}" for cell in cells))
    samples = result["samples"]
    shift = sum(count for name, count in samples.items() if name.startswith("shift/"))
    mono = sum(samples[f"shift/{vendor}"] for vendor in MONO_VENDORS)
    counts = (samples["id"], shift, mono, samples["zero_shot"], samples["zero_shot_fine"])
    lines.append(f"{'test images':<16}" + "".join(f"{count:>16}" for count in counts))
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws grouped bars: one group per metric, one bar per arm, whiskers of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), dpi=150)
    width = 0.16
    for index, (arm, label) in enumerate(ARMS.items()):
        heights = [result["arms"][arm][metric] for metric in METRICS]
        spread = [result["std"][arm][metric] for metric in METRICS]
        places = [group + (index - (len(ARMS) - 1) / 2) * width for group in range(len(METRICS))]
        whiskers = None if arm == "before" else spread
        axes.bar(
            places,
            heights,
            width * 0.92,
            yerr=whiskers,
            color=COLOURS[arm],
            label=label,
            error_kw={"lw": 0.8},
        )
        for place, height, std in zip(places, heights, spread, strict=True):
            axes.text(place, height + std, f"{height:.0f}", ha="center", va="bottom", fontsize=7)
    tallest = max(result["arms"][arm][m] + result["std"][arm][m] for arm in ARMS for m in METRICS)
    axes.set_ylim(0, 1.1 * tallest + 1)
    axes.set_xticks(range(len(METRICS)), METRICS.values())
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(
        f"EmojiNet: a tiny CLIP fine-tuned with and without anchors ({len(result['seeds'])} seeds)", pad=28
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(ncols=len(ARMS), frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)


def write(folder: Path, evaluation: Mapping[str, Any], names: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """Writes results.json and results.png from what `arf evaluate --json` wrote.

    Args:
        folder: where to.
        evaluation: `{"accuracy": {checkpoint: {set: percent}}, "samples": {set: count}}`.
        names: checkpoint -> (arm, seeds it stands for).

    Returns:
        The table.
    """
    per_seed: dict[str, dict[int, Mapping[str, float]]] = {}
    for checkpoint, sets in evaluation["accuracy"].items():
        arm, seeds = names[checkpoint]
        for seed in seeds:
            per_seed.setdefault(arm, {})[seed] = sets
    result = summarize(per_seed, evaluation["samples"])
    write_json(folder / "results.json", result)
    plot(result, folder / "results.png")
    return table(result)
