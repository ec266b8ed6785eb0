"""The small figures of the report. Each draws itself into one matplotlib axes with the colours it is given.

Everything that a reader needs stands beside the line or dot that it is about; no figure has a legend of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arf_plugin.report.comparison import signed
from arf_plugin.report.results import Figure
from arf_plugin.report.style import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 340.0  # points; on the page one point is about one pixel
SMALL, NORMAL = 9.8, 11.0


@dataclass(frozen=True)
class Panel:
    """What all panels have in common.

    Attributes:
        title: stands above it.
        about: one sentence for readers who cannot see it.
    """

    title: str
    about: str

    @property
    def height(self) -> float:
        """Height in points."""
        return 265.0

    def draw(self, axes: Axes, theme: Theme) -> None:
        """Draws into an axes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dots(Panel):
    """One line per arm: a faint dot per seed, the mean with its deviation, and the mean in figures.

    Attributes:
        arms: name -> label, from top to bottom.
        figures: by arm; arms without one are left out.
        lines: arms whose mean goes through as a vertical line.
        lowest_is_best: as with calibration errors.
    """

    arms: Mapping[str, str]
    figures: Mapping[str, Figure]
    lines: Sequence[str] = ()
    lowest_is_best: bool = False

    @property
    def height(self) -> float:
        """Height in points."""
        return 36.0 + 22.0 * len(self._shown)

    @property
    def _shown(self) -> list[str]:
        return [arm for arm in self.arms if arm in self.figures]

    def draw(self, axes: Axes, theme: Theme) -> None:
        """Draws into an axes."""
        shown = self._shown
        means = {arm: self.figures[arm].mean for arm in shown}
        best = (min if self.lowest_is_best else max)(means.values())
        for arm in self.lines:
            if arm in means:
                axes.axvline(means[arm], color=theme.arms[arm], lw=0.9, ls=(0, (2, 2)), alpha=0.75, zorder=1)
        for place, arm in enumerate(shown):
            figure, colour = self.figures[arm], theme.arms[arm]
            if figure.deviation is not None:
                axes.plot(list(figure.seeds.values()), [place] * len(figure.seeds), "o", ms=3.2, mfc=colour, mec="none",
                          alpha=0.35, zorder=2)  # fmt: skip
                axes.errorbar(
                    figure.mean, place, xerr=figure.deviation, color=colour, elinewidth=1.2, zorder=3
                )
            axes.plot(
                figure.mean, place, theme.marks[arm], ms=6, mfc=colour, mec=theme.paper, mew=0.8, zorder=4
            )
            weight = "bold" if math.isclose(figure.mean, best) else "normal"
            _at_right(axes, place, f"{figure.mean:.1f}", color=theme.ink, fontsize=NORMAL, fontweight=weight)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_yticks(range(len(shown)), [self.arms[arm] for arm in shown], fontsize=NORMAL)
        for label, arm in zip(axes.get_yticklabels(), shown, strict=True):
            label.set_color(theme.arms[arm])
        _pad(axes, "x", [value for arm in shown for value in self.figures[arm].seeds.values()])
        _plain_axes(axes, theme, grid="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, pad=4)


@dataclass(frozen=True)
class Line:
    """A path in weight space: points (alpha, x, y) of means, and (x, y) per seed of the fine-tuned model."""

    arm: str
    label: str
    points: tuple[tuple[float, float, float], ...]
    ends: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Paths(Panel):
    """One average over another along alpha, from the model before (alpha 0) to the fine-tuned one (alpha 1).

    Attributes:
        lines: in drawing order.
        x_label, y_label: of the axes.
        strong: arms drawn in colour and named; the others are grey.
        limits: (x low, x high, y low, y high), so that panels side by side share them.
    """

    lines: Sequence[Line]
    x_label: str
    y_label: str
    strong: Sequence[str]
    limits: tuple[float, float, float, float]

    def draw(self, axes: Axes, theme: Theme) -> None:
        """Draws into an axes."""
        axes.set_xlim(self.limits[0], self.limits[1])
        axes.set_ylim(self.limits[2], self.limits[3])
        labels = []
        for line in self.lines:
            strong = line.arm in self.strong
            colour = theme.arms[line.arm] if strong else theme.faint
            xs, ys = [x for _, x, _ in line.points], [y for _, _, y in line.points]
            axes.plot(xs, ys, color=colour, lw=1.8 if strong else 0.8, zorder=3 if strong else 1,
                      solid_joinstyle="round")  # fmt: skip
            if not strong:
                axes.plot(xs[-1], ys[-1], theme.marks[line.arm], ms=3.5, color=colour, mec="none", zorder=1)
                continue
            axes.plot(xs[1:-1], ys[1:-1], "o", ms=3, mfc=theme.paper, mec=colour, mew=1.1, zorder=4)
            for x, y in line.ends:
                axes.plot(x, y, theme.marks[line.arm], ms=3.4, mfc=colour, mec="none", alpha=0.4, zorder=2)
            axes.plot(
                xs[-1], ys[-1], theme.marks[line.arm], ms=7, mfc=colour, mec=theme.paper, mew=0.9, zorder=5
            )
            labels.append((xs[-1], ys[-1], line.label, colour))
            for alpha, x, y in line.points:
                if math.isclose(alpha, 0.5):
                    axes.plot(x, y, "o", ms=5.2, mfc=colour, mec=theme.paper, mew=0.8, zorder=5)
        self._start(axes, theme)
        _name_ends(axes, labels)
        axes.set_xlabel(self.x_label, fontsize=SMALL, color=theme.muted, labelpad=3)
        axes.set_ylabel(self.y_label, fontsize=SMALL, color=theme.muted, labelpad=4)
        _plain_axes(axes, theme, grid="both")

    def _start(self, axes: Axes, theme: Theme) -> None:
        starts = [line.points[0] for line in self.lines if line.points[0][0] == 0.0]
        if starts:
            _, x, y = starts[0]
            axes.plot(x, y, "o", ms=6.5, mfc=theme.paper, mec=theme.muted, mew=1.6, zorder=6)
            axes.annotate("before", (x, y), xytext=(0, -9), textcoords="offset points", ha="center", va="top",
                          fontsize=SMALL, color=theme.muted, zorder=6)  # fmt: skip


@dataclass(frozen=True)
class Steps(Panel):
    """The same sets for two arms: an arrow from the reference to the other, a ring for the model before.

    Attributes:
        names: sets, from top to bottom.
        reference, other: figures by set.
        reference_arm, other_arm: whose they are.
        before: figures by set of the model before.
        limits: of the x axis, so that panels side by side share them.
    """

    names: Sequence[str]
    reference: Mapping[str, Figure]
    other: Mapping[str, Figure]
    reference_arm: str
    other_arm: str
    before: Mapping[str, Figure]
    limits: tuple[float, float]

    @property
    def height(self) -> float:
        """Height in points."""
        return 36.0 + 19.0 * len(self.names)

    def draw(self, axes: Axes, theme: Theme) -> None:
        """Draws into an axes."""
        one, two = theme.arms[self.reference_arm], theme.arms[self.other_arm]
        for place, name in enumerate(self.names):
            if name in self.before:
                axes.plot(
                    self.before[name].mean, place, "o", ms=5, mfc="none", mec=theme.muted, mew=1.1, zorder=2
                )
            if name not in self.reference or name not in self.other:
                continue
            start, end = self.reference[name].mean, self.other[name].mean
            axes.plot(
                [start, end], [place, place], color=two, lw=2.2, alpha=0.45, zorder=1, solid_capstyle="butt"
            )
            axes.plot(start, place, theme.marks[self.reference_arm], ms=4.6, mfc=one, mec="none", zorder=3)
            axes.plot(
                end, place, theme.marks[self.other_arm], ms=6, mfc=two, mec=theme.paper, mew=0.8, zorder=4
            )
            _at_right(axes, place, signed(end - start), color=theme.ink, fontsize=SMALL)
        axes.set_xlim(*self.limits)
        axes.set_ylim(len(self.names) - 0.4, -0.6)
        axes.set_yticks(
            range(len(self.names)), [name.rsplit("/", 1)[-1] for name in self.names], fontsize=SMALL
        )
        _plain_axes(axes, theme, grid="x")
        for label in axes.get_yticklabels():
            label.set_color(theme.ink)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, pad=4)


@dataclass(frozen=True)
class Series:
    """A training curve: mean over seeds, and each seed by itself."""

    arm: str
    label: str
    mean: tuple[tuple[float, float], ...]
    seeds: tuple[tuple[tuple[float, float], ...], ...] = ()


@dataclass(frozen=True)
class Training(Panel):
    """One term of the loss over training, a line per arm.

    Attributes:
        series: in drawing order.
        strong: arms drawn in colour and named; the others are grey.
    """

    series: Sequence[Series]
    strong: Sequence[str]

    @property
    def height(self) -> float:
        """Height in points."""
        return 225.0

    def draw(self, axes: Axes, theme: Theme) -> None:
        """Draws into an axes."""
        from matplotlib.ticker import MaxNLocator

        labels = []
        for series in self.series:
            strong = series.arm in self.strong
            colour = theme.arms[series.arm] if strong else theme.faint
            if strong:
                for seed in series.seeds:
                    axes.plot(*zip(*seed, strict=True), color=colour, lw=0.7, alpha=0.35, zorder=2)
                labels.append((*series.mean[-1], series.label, colour))
            axes.plot(*zip(*series.mean, strict=True), color=colour, lw=1.8 if strong else 0.8,
                      zorder=3 if strong else 1)  # fmt: skip
        values = [
            value for series in self.series for line in (series.mean, *series.seeds) for _, value in line
        ]
        last = max(series.mean[-1][0] for series in self.series)
        _pad(axes, "y", values)
        axes.set_xlim(0, last * 1.36)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last * 1.01])
        _name_ends(axes, labels)
        axes.set_xlabel("passes over the task data", fontsize=SMALL, color=theme.muted, labelpad=3)
        _plain_axes(axes, theme, grid="y")


def _plain_axes(axes: Axes, theme: Theme, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.rule)
    kept = [label.get_color() for label in axes.get_yticklabels()]
    axes.tick_params(color=theme.rule, labelcolor=theme.muted, labelsize=SMALL, length=3, width=0.8)
    if len(set(kept)) > 1:  # labels in their arms' colours stay so, and as large as they were
        for label, colour in zip(axes.get_yticklabels(), kept, strict=True):
            label.set_color(colour)
            label.set_fontsize(NORMAL)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=theme.rule, lw=0.7)  # type: ignore[arg-type]
    axes.set_facecolor("none")


def _pad(axes: Axes, axis: str, values: Sequence[float], share: float = 0.07) -> None:
    low, high = min(values), max(values)
    room = max((high - low) * share, 0.5 if axis == "x" else 0.05)
    (axes.set_xlim if axis == "x" else axes.set_ylim)(low - room, high + room)


def _at_right(axes: Axes, place: float, text: str, **options: Any) -> None:
    """Writes a line's figure beside the axes."""
    axes.annotate(
        text, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
        va="center", ha="left", **options,
    )  # fmt: skip


def _name_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each line's name at its end, moved up or down until no two names overlap."""
    if not labels:
        return
    low, high = axes.get_ylim()
    apart = (high - low) * 0.075
    ordered = sorted(labels, key=lambda label: label[1])
    places = [label[1] for label in ordered]
    for _ in range(60):  # neighbours push each other apart
        moved = False
        for index in range(len(places) - 1):
            gap = places[index + 1] - places[index]
            if gap < apart * 0.999:
                places[index] -= (apart - gap) / 2
                places[index + 1] += (apart - gap) / 2
                moved = True
        if not moved:
            break
    for (x, _, text, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            text, (x, place), xytext=(7, 0), textcoords="offset points", va="center", ha="left", fontsize=NORMAL,
            color=colour, fontweight="bold", annotation_clip=False, zorder=7,
        )  # fmt: skip
