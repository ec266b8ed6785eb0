"""The plots of the report: what each panel shows, and how it is drawn; panels side by side share limits and colours.

Each panel draws itself into one matplotlib axes with the colours it is given. Everything that a reader needs stands
beside the line or dot that it is about; no plot has a legend of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from arf_plugin.report.logs import Curves, term_name
from arf_plugin.report.scores import Averages, Key, Results, Score, signed
from arf_plugin.report.sources import Collected
from arf_plugin.report.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 340.0  # points; on the page one point is about one pixel
SMALL, NORMAL = 12.5, 13.5  # on a phone, a panel is a little narrower than that
NAMED = 6  # lines that one panel can name
LONGEST = 22  # letters of a name in a panel; the page's tables have the whole
BINS = 80  # points of a training curve

Curve = Sequence[tuple[float, float]]
Draw = Callable[["Axes", Style], None]


@dataclass(frozen=True)
class Panel:
    """One axes.

    Attributes:
        title: Stands above it.
        about: One sentence for readers who cannot see it.
        draw: Draws it, in a style's colours.
        height: In points.
    """

    title: str
    about: str
    draw: Draw
    height: float = 265.0


@dataclass(frozen=True)
class Group:
    """Panels that belong together: one section of the page, one file beside it, headed by the title."""

    title: str
    panels: Sequence[Panel]


class Line(NamedTuple):
    """A path in weight space: points (alpha, x, y) of means, and (x, y) per seed of the fine-tuned model."""

    arm: str
    label: str
    points: Sequence[tuple[float, float, float]]
    ends: Curve


class Series(NamedTuple):
    """A training curve: mean over seeds, and each seed by itself."""

    arm: str
    label: str
    mean: Curve
    seeds: Sequence[Curve]


def dots_group(
    found: Collected,
    averages: Averages,
    by_arm: Mapping[str, Mapping[str, Score]],
    title: str,
    lowest_is_best: bool = False,
) -> Group | None:
    """One panel per average, with a line per arm."""
    panels = []
    for average in averages.main:
        scores = {arm: by[average] for arm, by in by_arm.items() if average in by}
        if scores:
            labels = {arm: found.arms[arm].label for arm in scores}
            told = "; ".join(f"{labels[arm]} {score.mean:.1f}" for arm, score in scores.items())
            lines = [arm for arm in (found.before, found.baseline) if arm in scores]
            best = (min if lowest_is_best else max)(score.mean for score in scores.values())
            draw = partial(_dots, labels=labels, scores=scores, lines=lines, best=best)
            panels.append(Panel(average, f"{title}, {average}: {told}.", draw, 36.0 + 22.0 * len(scores)))
    return Group(title, panels) if panels else None


def _dots(
    axes: Axes,
    style: Style,
    labels: Mapping[str, str],
    scores: Mapping[str, Score],
    lines: Sequence[str],
    best: float,
) -> None:
    """One line per arm: a faint dot per seed, the mean with its deviation, and the mean as a number."""
    for arm in lines:
        axes.axvline(scores[arm].mean, color=style.arms[arm], lw=0.9, ls=(0, (2, 2)), alpha=0.75, zorder=1)
    for place, (arm, score) in enumerate(scores.items()):
        colour = style.arms[arm]
        if score.deviation is not None:
            seeds = list(score.seeds.values())
            axes.plot(seeds, [place] * len(seeds), "o", ms=3.2, mfc=colour, mec="none", alpha=0.35, zorder=2)
            axes.errorbar(score.mean, place, xerr=score.deviation, color=colour, elinewidth=1.2, zorder=3)
        _mark(axes, style, arm, score.mean, place, ms=6, mew=0.8, zorder=4)
        weight = "bold" if math.isclose(score.mean, best) else "normal"
        _at_right(axes, place, f"{score.mean:.1f}", color=style.ink, fontsize=NORMAL, fontweight=weight)
    _name_lines(axes, list(labels.values()), [style.arms[arm] for arm in scores])
    spread = [score.mean + sign * (score.deviation or 0) for score in scores.values() for sign in (-1, 1)]
    _pad(axes, "x", [*spread, *(value for score in scores.values() for value in score.seeds.values())])
    _plain_axes(axes, style, grid="x")


def curves_group(found: Collected, results: Results) -> Group | None:
    """The ID-against-shift curves over alpha (Figure 4 of the paper), and the same for the other averages."""
    by_key, ids = results.by_average(), results.averages.of_kind("id")
    if not ids:
        return None
    x_name = ids[0]
    panels: list[Panel] = []
    single: list[Panel] = []
    y_names = [name for name in results.averages.main if name not in ids]
    for y_name in y_names:
        arms = [arm for arm in found.arms if arm != found.before]
        paths = [_path(found, results, by_key, arm, x_name, y_name) for arm in arms]
        lines = [path for path in paths if path is not None]
        if lines:
            strong = _strong(found, [line.arm for line in lines])
            panels.append(_paths_panel(y_name, lines, x_name, y_name, strong))
        # Where they are many, each method also by itself, before the reference and all others.
        for line in lines if len(lines) > NAMED and y_name == y_names[0] else ():
            if line.arm not in (found.baseline, found.subject):
                title, strong = f"{y_name}: {line.label}", [found.baseline or "", line.arm]
                single.append(_paths_panel(title, lines, x_name, y_name, strong))
    title = f"{x_name} against shift, from before (α = 0) to fine-tuned (α = 1)"
    return Group(title, [*panels, *single]) if panels else None


def _strong(found: Collected, arms: Sequence[str]) -> list[str]:
    """The arms that a panel shows in colour and by name: all if they are few, else the two that matter most."""
    return [arm for arm in arms if len(arms) <= NAMED or arm in (found.baseline, found.subject)]


def _path(
    found: Collected,
    results: Results,
    by_key: Mapping[Key, Mapping[str, Score]],
    arm: str,
    x_name: str,
    y_name: str,
) -> Line | None:
    keys = {alpha: (name, alpha) for name, alpha in by_key if name == arm and alpha is not None}
    if not keys:
        return None
    measured: dict[float, Key] = {1.0: (arm, None), **keys}
    # An arm may have been mixed with another model than the one before, as LP-FT with the probed one.
    if found.before and results.is_mixed_with(arm, found.before):
        measured.setdefault(0.0, (found.before, None))
    points, ends = [], []
    for alpha, key in sorted(measured.items()):
        x, y = (by_key.get(key, {}).get(name) for name in (x_name, y_name))
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
    draw = partial(_draw_paths, lines=ordered, x_name=x_name, y_name=y_name, strong=strong)
    return Panel(title, f"{x_name} and {y_name} along alpha: {told}.", draw)


def _draw_paths(
    axes: Axes, style: Style, lines: Sequence[Line], x_name: str, y_name: str, strong: Sequence[str]
) -> None:
    places = [place for line in lines for place in (*(point[1:] for point in line.points), *line.ends)]
    xs, ys = zip(*places, strict=True)
    wide, high = max(max(xs) - min(xs), 1.0), max(max(ys) - min(ys), 1.0)
    axes.set_xlim(min(xs) - 0.14 * wide, max(xs) + 0.42 * wide)
    axes.set_ylim(min(ys) - 0.18 * high, max(ys) + 0.08 * high)
    for line in lines:
        _draw_path(axes, style, line, line.arm in strong)
    starts = [line.points[0] for line in lines if line.points[0][0] == 0.0]
    if starts:
        _, x, y = starts[0]
        axes.plot(x, y, "o", ms=6.5, mfc=style.paper, mec=style.muted, mew=1.6, zorder=6)
        axes.annotate("before", (x, y), xytext=(0, -9), textcoords="offset points", ha="center", va="top",
                      fontsize=SMALL, color=style.muted, zorder=6)  # fmt: skip
    named = [line for line in lines if line.arm in strong]
    _name_ends(axes, [(*line.points[-1][1:], line.label, style.arms[line.arm]) for line in named])
    axes.set_xlabel(f"{x_name}, %", fontsize=SMALL, color=style.muted, labelpad=3)
    axes.set_ylabel(f"{y_name}, %", fontsize=SMALL, color=style.muted, labelpad=4)
    for axis in (axes.xaxis, axes.yaxis):  # names need room beyond what an accuracy can be
        low, high = axis.get_view_interval()
        axis.set_ticks([tick for tick in axis.get_ticklocs() if max(low, 0) <= tick <= min(high, 100)])
    _plain_axes(axes, style, grid="both")


def _draw_path(axes: Axes, style: Style, line: Line, strong: bool) -> None:
    colour, mark = style.arms[line.arm] if strong else style.faint, style.marks[line.arm]
    _, xs, ys = zip(*line.points, strict=True)
    width, order = (1.8, 3) if strong else (0.8, 1)
    axes.plot(xs, ys, color=colour, lw=width, zorder=order, solid_joinstyle="round")
    if not strong:
        axes.plot(xs[-1], ys[-1], mark, ms=3.5, color=colour, mec="none", zorder=1)
        return
    axes.plot(xs[1:-1], ys[1:-1], "o", ms=3, mfc=style.paper, mec=colour, mew=1.1, zorder=4)
    for x, y in line.ends:
        axes.plot(x, y, mark, ms=3.4, mfc=colour, mec="none", alpha=0.4, zorder=2)
    _mark(axes, style, line.arm, xs[-1], ys[-1], ms=7, mew=0.9, zorder=5)
    for alpha, x, y in line.points:
        if math.isclose(alpha, 0.5):
            axes.plot(x, y, "o", ms=5.2, mfc=colour, mec=style.paper, mew=0.8, zorder=5)


def domains_group(found: Collected, results: Results) -> Group | None:
    """Accuracy per domain: one panel per arm, against the reference."""
    by_set = results.by_set()
    reference = by_set.get((found.reference or "", None), {})
    before = by_set.get((found.before or "", None), {})
    arms = [arm for arm in found.arms if arm not in (found.reference, found.before) and (arm, None) in by_set]
    arms.sort(key=lambda arm: arm != found.subject)  # first what the report is about
    names = domain_sets(results)
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
        both_arms = {found.reference: reference, arm: scores}
        draw = partial(_steps, names=names, scores=both_arms, before=before, limits=limits)
        about = f"Accuracy per domain, {label} less {base}: {told}."
        panels.append(Panel(f"{base} → {label}", about, draw, 36.0 + 19.0 * len(names)))
    return Group(f"Accuracy per domain, {results.unit}", panels)


def _steps(
    axes: Axes,
    style: Style,
    names: Sequence[str],
    scores: Mapping[str, Mapping[str, Score]],
    before: Mapping[str, Score],
    limits: tuple[float, float],
) -> None:
    """The same sets for two arms: an arrow from the first to the second, a ring for the model before."""
    (one, start_of), (two, end_of) = scores.items()
    for place, name in enumerate(names):
        if name in before:
            axes.plot(before[name].mean, place, "o", ms=5, mfc="none", mec=style.muted, mew=1.1, zorder=2)
        if name not in start_of or name not in end_of:
            continue
        start, end = start_of[name].mean, end_of[name].mean
        axes.plot([start, end], [place, place], color=style.arms[two], lw=2.2, alpha=0.45, zorder=1,
                  solid_capstyle="butt")  # fmt: skip
        axes.plot(start, place, style.marks[one], ms=4.6, mfc=style.arms[one], mec="none", zorder=3)
        _mark(axes, style, two, end, place, ms=6, mew=0.8, zorder=4)
        _at_right(axes, place, signed(end - start), color=style.ink, fontsize=SMALL)
    axes.set_xlim(*limits)
    _plain_axes(axes, style, grid="x")
    _name_lines(axes, [name.rsplit("/", 1)[-1] for name in names], [style.ink] * len(names))


def domain_sets(results: Results) -> list[str]:
    """The sets of shifted domains; all sets where a suite names none."""
    averages = results.averages
    shifted = {member for name in averages.of_kind("shift") for member in averages.sets(name)}
    return [name for name in results.sets if name in shifted] or list(results.sets)


def training_group(found: Collected, curves: Mapping[str, Sequence[Curves]]) -> Group:
    """One panel per term of the loss; `curves` holds the runs of each arm."""
    terms = list(dict.fromkeys(term for runs in curves.values() for run in runs for term in run.terms))
    watched = [term for term in terms if not term.endswith("loss")]
    known = ["contrastive_loss", "caption_anchor_loss", "pair_anchor_loss"]
    terms = [term for term in terms if term not in watched]
    terms.sort(key=lambda term: (term == "loss", known.index(term) if term in known else len(known)))
    if len(terms) == 2 and "loss" in terms:  # the sum of one term says the same again
        terms.remove("loss")
    terms += watched
    panels = []
    for term in terms:
        series = []
        for arm, runs in curves.items():
            seeds = [_binned(run.terms[term]) for run in runs if run.terms.get(term)]
            if seeds:
                series.append(
                    Series(arm, found.arms[arm].label, _mean(seeds), seeds if len(seeds) > 1 else ())
                )
        strong = _strong(found, [one.arm for one in series])
        title = term_name(term)
        told = "; ".join(f"{one.label} ends at {one.mean[-1][1]:.2f}" for one in series)
        if len(series) > 3:  # single seeds of more lines than that are a thicket
            series = [one._replace(seeds=()) for one in series]
        ordered = sorted(series, key=lambda one: one.arm in strong)
        draw = partial(_training, series=ordered, strong=strong)
        about = f"{title} over training: {told}."
        panels.append(Panel(title[0].upper() + title[1:], about, draw, 225.0))
    return Group("Loss over training, by term", panels)


def _training(axes: Axes, style: Style, series: Sequence[Series], strong: Sequence[str]) -> None:
    """One term of the loss over training, a line per arm; strong ones are drawn in colour and named."""
    from matplotlib.ticker import MaxNLocator

    labels = []
    for one in series:
        named = one.arm in strong
        colour = style.arms[one.arm] if named else style.faint
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
    axes.set_xlabel("passes over the task data", fontsize=SMALL, color=style.muted, labelpad=3)
    _plain_axes(axes, style, grid="y")


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


def _mark(axes: Axes, style: Style, arm: str, x: float, y: float, **options: Any) -> None:
    """Draws an arm's mark, set off from what is below it."""
    axes.plot(x, y, style.marks[arm], mfc=style.arms[arm], mec=style.paper, **options)


def _plain_axes(axes: Axes, style: Style, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(style.rule)
    axes.tick_params(axis="x" if grid == "x" else "both", color=style.rule, labelcolor=style.muted, labelsize=SMALL,
                     length=3, width=0.8)  # fmt: skip
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=style.rule, lw=0.7)  # type: ignore[arg-type]
    axes.set_facecolor("none")


def _brief(name: str) -> str:
    """A name that leaves a panel room for what it shows: beginning and end, where names that are alike differ."""
    return (
        name
        if len(name) <= LONGEST
        else f"{name[: LONGEST // 2].rstrip()}…{name[-(LONGEST // 2 - 1) :].lstrip()}"
    )


def _name_lines(axes: Axes, names: Sequence[str], colours: Sequence[str]) -> None:
    """Names the lines of a panel at its left, from top to bottom."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [_brief(name) for name in names], fontsize=SMALL)
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=4)


def _pad(axes: Axes, axis: str, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    room = max((high - low) * 0.07, 0.5 if axis == "x" else 0.05)
    (axes.set_xlim if axis == "x" else axes.set_ylim)(low - room, high + room)


def _at_right(axes: Axes, place: float, text: str, **options: Any) -> None:
    """Writes a line's number beside the axes."""
    axes.annotate(text, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
                  va="center", ha="left", **options)  # fmt: skip


def _name_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each line's name (x, y, name, colour) at its end, moved up or down until no two names overlap."""
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
        axes.annotate(_brief(text), (x, place), xytext=(7, 0), textcoords="offset points", va="center", ha="left",
                      fontsize=NORMAL, color=colour, fontweight="bold", annotation_clip=False, zorder=7)  # fmt: skip
