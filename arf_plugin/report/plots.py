"""The plots of the report: what each panel shows, and how it is drawn; panels side by side share limits and colours.

Each panel draws itself into one matplotlib axes with the colours it is given. Everything that a reader needs stands
beside the line or dot that it is about; no plot has a legend of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from arf_plugin.report.logs import Curves, term_name
from arf_plugin.report.scores import Averages, Key, Results, Score, signed
from arf_plugin.report.sources import Collected
from arf_plugin.report.style import Theme
from arf_plugin.report.tables import Slice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 340.0  # points; on the page one point is about one pixel
SMALL, NORMAL = 9.8, 11.0
NAMED = 6  # lines that one panel can name
BINS = 80  # points of a training curve

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One axes.

    Attributes:
        title: Stands above it.
        about: One sentence for readers who cannot see it.
        draw: Draws it, in a theme's colours.
        height: In points.
    """

    title: str
    about: str
    draw: Callable[[Axes, Theme], None]
    height: float = 265.0


@dataclass(frozen=True)
class Group:
    """Panels that belong together: one section of the page, one file beside it.

    Attributes:
        name: Of the files.
        title: Heads the file.
        panels: At least one.
    """

    name: str
    title: str
    panels: Sequence[Panel]


class Line(NamedTuple):
    """A path in weight space: points (alpha, x, y) of means, and (x, y) per seed of the fine-tuned model."""

    arm: str
    label: str
    points: Sequence[tuple[float, float, float]]
    ends: Sequence[tuple[float, float]]


class Series(NamedTuple):
    """A training curve: mean over seeds, and each seed by itself."""

    arm: str
    label: str
    mean: Curve
    seeds: Sequence[Curve]


def results_group(found: Collected, one: Slice, averages: Averages, unit: str) -> Group | None:
    """One panel per average: all arms as fine-tuned."""
    return _dots_group(found, one.scores, averages, "results", f"Results {one.title}, {unit}")


def calibration_group(found: Collected, averages: Averages, results: Results) -> Group | None:
    """One panel per average: expected calibration error of all arms."""
    by_key = results.by_average("ece")
    scores = {arm: by_key[arm, None] for arm in found.arms if by_key.get((arm, None))}
    title = "Expected calibration error, %"
    return _dots_group(found, scores, averages, "calibration", title, lowest_is_best=True)


def _dots_group(
    found: Collected,
    scores: Mapping[str, Mapping[str, Score]],
    averages: Averages,
    name: str,
    title: str,
    lowest_is_best: bool = False,
) -> Group | None:
    panels = []
    for average in averages.main:
        values = {arm: by[average] for arm, by in scores.items() if average in by}
        if values:
            labels = {arm: found.arms[arm].label for arm in values}
            told = "; ".join(f"{labels[arm]} {score.mean:.1f}" for arm, score in values.items())
            lines = [arm for arm in (found.before, found.reference) if arm in values]
            draw = _dots(labels, values, lines, lowest_is_best)
            panels.append(Panel(average, f"{title}, {average}: {told}.", draw, 36.0 + 22.0 * len(values)))
    return Group(name, title, panels) if panels else None


def _dots(
    labels: Mapping[str, str], scores: Mapping[str, Score], lines: Sequence[str], lowest_is_best: bool
) -> Callable[[Axes, Theme], None]:
    """One line per arm: a faint dot per seed, the mean with its deviation, and the mean in figures."""

    def draw(axes: Axes, theme: Theme) -> None:
        best = (min if lowest_is_best else max)(score.mean for score in scores.values())
        for arm in lines:
            axes.axvline(
                scores[arm].mean, color=theme.arms[arm], lw=0.9, ls=(0, (2, 2)), alpha=0.75, zorder=1
            )
        for place, (arm, score) in enumerate(scores.items()):
            colour = theme.arms[arm]
            if score.deviation is not None:
                seeds = list(score.seeds.values())
                axes.plot(
                    seeds, [place] * len(seeds), "o", ms=3.2, mfc=colour, mec="none", alpha=0.35, zorder=2
                )
                axes.errorbar(score.mean, place, xerr=score.deviation, color=colour, elinewidth=1.2, zorder=3)
            axes.plot(
                score.mean, place, theme.marks[arm], ms=6, mfc=colour, mec=theme.paper, mew=0.8, zorder=4
            )
            weight = "bold" if math.isclose(score.mean, best) else "normal"
            _at_right(axes, place, f"{score.mean:.1f}", color=theme.ink, fontsize=NORMAL, fontweight=weight)
        _name_lines(axes, list(labels.values()), [theme.arms[arm] for arm in scores], NORMAL)
        _pad(axes, "x", [value for score in scores.values() for value in score.seeds.values()])
        _plain_axes(axes, theme, grid="x")

    return draw


def curves_group(found: Collected, averages: Averages, results: Results) -> Group | None:
    """The ID-against-shift curves over alpha (Figure 4 of the paper), and the same for the other averages."""
    by_key = results.by_average()
    x_name = next((name for name in averages.known if averages.kind(name) == "id"), None)
    y_names = [name for name in averages.main if averages.kind(name) != "id"]
    if x_name is None:
        return None
    panels: list[Panel] = []
    single: list[Panel] = []
    for y_name in y_names:
        paths = (
            _path(found, results, by_key, arm, x_name, y_name) for arm in found.arms if arm != found.before
        )
        lines = [line for line in paths if line is not None]
        few = len(lines) <= NAMED
        special = [arm for arm in (found.reference, found.subject) if arm]
        if lines:
            strong = [line.arm for line in lines] if few else special
            panels.append(_paths_panel(y_name, lines, x_name, y_name, strong))
        if (
            not few and y_name == y_names[0]
        ):  # then each method by itself, before the reference and all others
            single += [
                _paths_panel(
                    f"{y_name}: {line.label}", lines, x_name, y_name, [found.reference or "", line.arm]
                )
                for line in lines
                if line.arm not in special
            ]
    title = f"{x_name} against shift, from before (α = 0) to fine-tuned (α = 1)"
    return Group("curves", title, [*panels, *single]) if panels else None


def _path(
    found: Collected,
    results: Results,
    by_key: Mapping[Key, dict[str, Score]],
    arm: str,
    x_name: str,
    y_name: str,
) -> Line | None:
    keys = {alpha: (name, alpha) for name, alpha in by_key if name == arm and alpha is not None}
    if not keys:
        return None
    measured: dict[float, Key] = {1.0: (arm, None), **keys}
    # An arm may have been mixed with another model than the one before, as LP-FT with the probed one.
    before = found.before or ""
    if found.before and results.digests(arm, "original_digest", mixed=True) <= results.digests(before) | {
        None
    }:
        measured.setdefault(0.0, (before, None))
    points, ends = [], []
    for alpha, key in sorted(measured.items()):
        x, y = by_key.get(key, {}).get(x_name), by_key.get(key, {}).get(y_name)
        if x is None or y is None:
            continue
        points.append((alpha, x.mean, y.mean))
        if alpha == 1.0 and len(x.seeds) > 1:
            ends = [(x.seeds[seed], y.seeds[seed]) for seed in x.seeds if seed in y.seeds]
    return Line(arm, found.arms[arm].label, points, ends) if len(points) > 1 else None


def _paths_panel(title: str, lines: Sequence[Line], x_name: str, y_name: str, strong: Sequence[str]) -> Panel:
    """One average over another along alpha, from the model before (alpha 0) to the fine-tuned one (alpha 1).

    Strong arms are drawn in colour and named; the others are grey.
    """
    ordered = sorted(lines, key=lambda line: line.arm in strong)
    told = "; ".join(
        f"{line.label} from {line.points[0][1]:.1f} and {line.points[0][2]:.1f} to {line.points[-1][1]:.1f} and "
        f"{line.points[-1][2]:.1f}"
        for line in lines
        if line.arm in strong
    )
    xs = [x for line in lines for x in [p[1] for p in line.points] + [e[0] for e in line.ends]]
    ys = [y for line in lines for y in [p[2] for p in line.points] + [e[1] for e in line.ends]]
    wide, high = max(max(xs) - min(xs), 1.0), max(max(ys) - min(ys), 1.0)

    def draw(axes: Axes, theme: Theme) -> None:
        axes.set_xlim(min(xs) - 0.06 * wide, max(xs) + 0.34 * wide)
        axes.set_ylim(min(ys) - 0.13 * high, max(ys) + 0.08 * high)
        labels = [_draw_path(axes, theme, line, line.arm in strong) for line in ordered]
        starts = [line.points[0] for line in ordered if line.points[0][0] == 0.0]
        if starts:
            _, x, y = starts[0]
            axes.plot(x, y, "o", ms=6.5, mfc=theme.paper, mec=theme.muted, mew=1.6, zorder=6)
            axes.annotate("before", (x, y), xytext=(0, -9), textcoords="offset points", ha="center", va="top",
                          fontsize=SMALL, color=theme.muted, zorder=6)  # fmt: skip
        _name_ends(axes, [label for label in labels if label is not None])
        axes.set_xlabel(f"{x_name}, %", fontsize=SMALL, color=theme.muted, labelpad=3)
        axes.set_ylabel(f"{y_name}, %", fontsize=SMALL, color=theme.muted, labelpad=4)
        _plain_axes(axes, theme, grid="both")

    return Panel(title, f"{x_name} and {y_name} along alpha: {told}.", draw)


def _draw_path(axes: Axes, theme: Theme, line: Line, strong: bool) -> tuple[float, float, str, str] | None:
    """Draws a path; returns what to name it by, and where, if it is to be named."""
    colour, mark = theme.arms[line.arm] if strong else theme.faint, theme.marks[line.arm]
    xs, ys = [x for _, x, _ in line.points], [y for _, _, y in line.points]
    axes.plot(
        xs, ys, color=colour, lw=1.8 if strong else 0.8, zorder=3 if strong else 1, solid_joinstyle="round"
    )
    if not strong:
        axes.plot(xs[-1], ys[-1], mark, ms=3.5, color=colour, mec="none", zorder=1)
        return None
    axes.plot(xs[1:-1], ys[1:-1], "o", ms=3, mfc=theme.paper, mec=colour, mew=1.1, zorder=4)
    for x, y in line.ends:
        axes.plot(x, y, mark, ms=3.4, mfc=colour, mec="none", alpha=0.4, zorder=2)
    axes.plot(xs[-1], ys[-1], mark, ms=7, mfc=colour, mec=theme.paper, mew=0.9, zorder=5)
    for alpha, x, y in line.points:
        if math.isclose(alpha, 0.5):
            axes.plot(x, y, "o", ms=5.2, mfc=colour, mec=theme.paper, mew=0.8, zorder=5)
    return xs[-1], ys[-1], line.label, colour


def domains_group(found: Collected, averages: Averages, results: Results) -> Group | None:
    """Accuracy per domain: one panel per arm, against the reference."""
    by_set = results.by_set()
    reference = by_set.get((found.reference or "", None), {})
    before = by_set.get((found.before or "", None), {})
    arms = [arm for arm in found.arms if arm not in (found.reference, found.before) and (arm, None) in by_set]
    arms.sort(key=lambda arm: arm != found.subject)  # first what the report is about
    names = domain_sets(averages, results)
    if not names or not arms or not reference or found.reference is None:
        return None
    start = {**reference, **before}
    names.sort(key=lambda name: -start[name].mean if name in start else 0.0)
    shown = [by_set[arm, None] for arm in arms] + [reference, before]
    values = [scores[name].mean for scores in shown for name in names if name in scores]
    room = 0.05 * (max(values) - min(values)) + 0.5
    limits = (min(values) - room, max(values) + room)
    base, panels = found.arms[found.reference].label, []
    for arm in arms:
        scores, label = by_set[arm, None], found.arms[arm].label
        both = [name for name in names if name in scores and name in reference]
        told = "; ".join(f"{name} {scores[name].mean - reference[name].mean:+.1f}" for name in both)
        draw = _steps(names, (found.reference, reference), (arm, scores), before, limits)
        about = f"Accuracy per domain, {label} less {base}: {told}."
        panels.append(Panel(f"{base} → {label}", about, draw, 36.0 + 19.0 * len(names)))
    return Group("domains", f"Accuracy per domain, {results.unit}", panels)


def _steps(
    names: Sequence[str],
    reference: tuple[str, Mapping[str, Score]],
    other: tuple[str, Mapping[str, Score]],
    before: Mapping[str, Score],
    limits: tuple[float, float],
) -> Callable[[Axes, Theme], None]:
    """The same sets for two arms: an arrow from the reference to the other, a ring for the model before."""
    (arm_one, scores_one), (arm_two, scores_two) = reference, other

    def draw(axes: Axes, theme: Theme) -> None:
        one, two = theme.arms[arm_one], theme.arms[arm_two]
        for place, name in enumerate(names):
            if name in before:
                axes.plot(before[name].mean, place, "o", ms=5, mfc="none", mec=theme.muted, mew=1.1, zorder=2)
            if name not in scores_one or name not in scores_two:
                continue
            start, end = scores_one[name].mean, scores_two[name].mean
            line = {"color": two, "lw": 2.2, "alpha": 0.45, "zorder": 1, "solid_capstyle": "butt"}
            axes.plot([start, end], [place, place], **line)  # type: ignore[arg-type]
            axes.plot(start, place, theme.marks[arm_one], ms=4.6, mfc=one, mec="none", zorder=3)
            axes.plot(end, place, theme.marks[arm_two], ms=6, mfc=two, mec=theme.paper, mew=0.8, zorder=4)
            _at_right(axes, place, signed(end - start), color=theme.ink, fontsize=SMALL)
        axes.set_xlim(*limits)
        _plain_axes(axes, theme, grid="x")
        _name_lines(axes, [name.rsplit("/", 1)[-1] for name in names], [theme.ink] * len(names), SMALL)

    return draw


def domain_sets(averages: Averages, results: Results) -> list[str]:
    """The sets of shifted domains; all sets where a suite names none."""
    shifted = {
        n for average in averages.known if averages.kind(average) == "shift" for n in averages.sets(average)
    }
    return [name for name in results.sets if name in shifted] or results.sets


def training_group(found: Collected, curves: Mapping[str, Sequence[Curves]]) -> Group | None:
    """One panel per term of the loss; `curves` holds the runs of each arm."""
    terms = list(dict.fromkeys(term for runs in curves.values() for run in runs for term in run.terms))
    known = ["contrastive_loss", "caption_anchor_loss", "pair_anchor_loss"]
    terms.sort(key=lambda term: (term == "loss", known.index(term) if term in known else len(known)))
    if len(terms) == 2 and "loss" in terms:  # the sum of one term says the same again
        terms.remove("loss")
    panels = []
    for term in terms:
        series = []
        for arm, runs in curves.items():
            seeds = [_binned(run.terms[term]) for run in runs if run.terms.get(term)]
            if seeds:
                series.append(
                    Series(arm, found.arms[arm].label, _mean(seeds), seeds if len(seeds) > 1 else ())
                )
        few = len(series) <= NAMED
        strong = [one.arm for one in series if few or one.arm in (found.reference, found.subject)]
        told = "; ".join(f"{one.label} ends at {one.mean[-1][1]:.2f}" for one in series)
        ordered = sorted(series, key=lambda one: one.arm in strong)
        if len(series) > 3:  # single seeds of more lines than that are a thicket
            ordered = [one._replace(seeds=()) for one in ordered]
        title = term_name(term)
        about = f"{title} over training: {told}."
        panels.append(Panel(title[0].upper() + title[1:], about, _training(ordered, strong), 225.0))
    return Group("training", "Loss over training, by term", panels) if panels else None


def _training(series: Sequence[Series], strong: Sequence[str]) -> Callable[[Axes, Theme], None]:
    """One term of the loss over training, a line per arm; strong ones are drawn in colour and named."""

    def draw(axes: Axes, theme: Theme) -> None:
        from matplotlib.ticker import MaxNLocator

        labels = []
        for one in series:
            named = one.arm in strong
            colour = theme.arms[one.arm] if named else theme.faint
            if named:
                for seed in one.seeds:
                    axes.plot(*zip(*seed, strict=True), color=colour, lw=0.7, alpha=0.35, zorder=2)
                labels.append((*one.mean[-1], one.label, colour))
            width, order = (1.8, 3) if named else (0.8, 1)
            axes.plot(*zip(*one.mean, strict=True), color=colour, lw=width, zorder=order)
        last = max(one.mean[-1][0] for one in series)
        _pad(axes, "y", [value for one in series for line in (one.mean, *one.seeds) for _, value in line])
        axes.set_xlim(0, last * 1.36)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last * 1.01])
        _name_ends(axes, labels)
        axes.set_xlabel("passes over the task data", fontsize=SMALL, color=theme.muted, labelpad=3)
        _plain_axes(axes, theme, grid="y")

    return draw


def _binned(points: Curve) -> Curve:
    """At most `BINS` points: the means of as many equal spans."""
    import pandas as pd

    if len(points) <= BINS:
        return points
    frame = pd.DataFrame(points)
    spans = (frame[0] / points[-1][0] * BINS).astype(int).clip(upper=BINS - 1)
    return list(frame.groupby(spans).mean().itertuples(index=False, name=None))


def _mean(seeds: Sequence[Curve]) -> Curve:
    """Mean over seeds at the points of the first, as far as all go."""
    import numpy as np

    last = min(seed[-1][0] for seed in seeds)
    grid = [x for x, _ in seeds[0] if x <= last + 1e-9]
    values = [np.interp(grid, [x for x, _ in seed], [y for _, y in seed]) for seed in seeds]
    return list(zip(grid, np.mean(values, axis=0).tolist(), strict=True))


def _plain_axes(axes: Axes, theme: Theme, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.rule)
    axes.tick_params(axis="x" if grid == "x" else "both", color=theme.rule, labelcolor=theme.muted, labelsize=SMALL,
                     length=3, width=0.8)  # fmt: skip
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=theme.rule, lw=0.7)  # type: ignore[arg-type]
    axes.set_facecolor("none")


def _name_lines(axes: Axes, names: Sequence[str], colours: Sequence[str], size: float) -> None:
    """Names the lines of a panel at its left, from top to bottom."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=4)


def _pad(axes: Axes, axis: str, values: Sequence[float], share: float = 0.07) -> None:
    low, high = min(values), max(values)
    room = max((high - low) * share, 0.5 if axis == "x" else 0.05)
    (axes.set_xlim if axis == "x" else axes.set_ylim)(low - room, high + room)


def _at_right(axes: Axes, place: float, text: str, **options: Any) -> None:
    """Writes a line's figure beside the axes."""
    axes.annotate(text, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
                  va="center", ha="left", **options)  # fmt: skip


def _name_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each line's name at its end, moved up or down until no two names overlap."""
    low, high = axes.get_ylim()
    apart = (high - low) * 0.075
    ordered = sorted(labels, key=lambda label: label[1])
    places = [label[1] for label in ordered]
    for _ in range(60):  # neighbours push each other apart
        for index in range(len(places) - 1):
            push = max(0.0, apart - (places[index + 1] - places[index])) / 2
            places[index] -= push
            places[index + 1] += push
    for (x, _, text, colour), place in zip(ordered, places, strict=True):
        axes.annotate(text, (x, place), xytext=(7, 0), textcoords="offset points", va="center", ha="left",
                      fontsize=NORMAL, color=colour, fontweight="bold", annotation_clip=False, zorder=7)  # fmt: skip
