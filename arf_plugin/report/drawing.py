"""Which figures a report has: chooses what each panel shows, so that panels side by side share limits and colours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from arf_plugin.report.figures import Group
from arf_plugin.report.logs import Curves, term_name
from arf_plugin.report.panels import Dots, Line, Panel, Paths, Series, Steps, Training
from arf_plugin.report.results import Averages, Figure, Key, Results
from arf_plugin.report.sources import Collected
from arf_plugin.report.tables import Slice, main_averages

NAMED = 6  # lines that one panel can name
BINS = 80  # points of a training curve


def results_group(found: Collected, one: Slice, averages: Averages, unit: str) -> Group | None:
    """One panel per average: all arms as fine-tuned."""
    return _dots(
        found, one.figures, averages, "results", f"Results {one.title}, {unit}", lowest_is_best=False
    )


def calibration_group(found: Collected, averages: Averages, results: Results) -> Group | None:
    """One panel per average: expected calibration error of all arms."""
    figures = {arm: by for (arm, alpha), by in results.by_average("ece").items() if alpha is None}
    ordered = {arm: figures[arm] for arm in found.arms if figures.get(arm)}
    return _dots(
        found, ordered, averages, "calibration", "Expected calibration error, %", lowest_is_best=True
    )


def _dots(
    found: Collected,
    figures: Mapping[str, Mapping[str, Figure]],
    averages: Averages,
    name: str,
    title: str,
    lowest_is_best: bool,
) -> Group | None:
    panels: list[Panel] = []
    for average in main_averages(averages):
        values = {arm: by[average] for arm, by in figures.items() if average in by}
        if not values:
            continue
        labels = {arm: found.arms[arm].label for arm in values}
        told = "; ".join(f"{labels[arm]} {figure.mean:.1f}" for arm, figure in values.items())
        lines = [arm for arm in (found.before, found.reference) if arm]
        panels.append(Dots(average, f"{title}, {average}: {told}.", labels, values, lines, lowest_is_best))
    return Group(name, title, panels) if panels else None


def curves_group(found: Collected, averages: Averages, results: Results) -> Group | None:
    """The ID-against-shift curves over alpha (Figure 4 of the paper), and the same for the other averages."""
    by_key = results.by_average()
    x_name = next((name for name in averages.known if averages.kind(name) == "id"), None)
    y_names = [name for name in main_averages(averages) if averages.kind(name) != "id"]
    if x_name is None:
        return None
    panels: list[Panel] = []
    single: list[Panel] = []
    for y_name in y_names:
        lines = [
            line
            for arm in found.arms
            if (line := _path(found, results, by_key, arm, x_name, y_name)) is not None
        ]
        if not lines:
            continue
        limits = _limits(lines)
        few = len(lines) <= NAMED
        main = (
            [line.arm for line in lines] if few else [arm for arm in (found.reference, found.subject) if arm]
        )
        panels.append(_paths_panel(y_name, lines, x_name, y_name, main, limits))
        if (
            not few and y_name == y_names[0]
        ):  # then each method by itself, before the reference and all others
            others = [line for line in lines if line.arm not in (found.reference, found.subject)]
            single += [
                _paths_panel(
                    f"{y_name}: {line.label}",
                    lines,
                    x_name,
                    y_name,
                    [a for a in (found.reference, line.arm) if a],
                    limits,
                )
                for line in others
            ]
    title = f"{x_name} against shift, from before (α = 0) to fine-tuned (α = 1)"
    return Group("curves", title, [*panels, *single]) if panels else None


def _path(
    found: Collected,
    results: Results,
    by_key: Mapping[Key, dict[str, Figure]],
    arm: str,
    x_name: str,
    y_name: str,
) -> Line | None:
    if arm == found.before:
        return None
    keys: dict[float, Key] = {
        alpha: (arm, alpha) for name, alpha in by_key if name == arm and alpha is not None
    }
    if not keys:
        return None
    keys.setdefault(1.0, (arm, None))
    if 0.0 not in keys and found.before and _starts_at_before(found, results, arm):
        keys[0.0] = (found.before, None)
    points, ends = [], []
    for alpha, key in sorted(keys.items()):
        x, y = by_key.get(key, {}).get(x_name), by_key.get(key, {}).get(y_name)
        if x is None or y is None:
            continue
        points.append((alpha, x.mean, y.mean))
        if alpha == 1.0 and len(x.seeds) > 1:
            ends = [(x.seeds[seed], y.seeds[seed]) for seed in x.seeds if seed in y.seeds]
    return Line(arm, found.arms[arm].label, tuple(points), tuple(ends)) if len(points) > 1 else None


def _starts_at_before(found: Collected, results: Results, arm: str) -> bool:
    """True unless an arm was mixed with another model than the one before, as LP-FT with the probed one."""
    digests = {
        item.row.get("digest")
        for sets in results.rows.get((found.before or "", None), {}).values()
        for item in sets.values()
    }
    originals = {
        item.row.get("original_digest")
        for (name, alpha), seeds in results.rows.items()
        if name == arm and alpha is not None
        for sets in seeds.values()
        for item in sets.values()
    }
    return originals <= digests | {None}


def _paths_panel(
    title: str,
    lines: Sequence[Line],
    x_name: str,
    y_name: str,
    strong: Sequence[str],
    limits: tuple[float, ...],
) -> Paths:
    told = "; ".join(
        f"{line.label} from {line.points[0][1]:.1f} and {line.points[0][2]:.1f} to {line.points[-1][1]:.1f} and "
        f"{line.points[-1][2]:.1f}"
        for line in lines
        if line.arm in strong
    )
    ordered = [line for line in lines if line.arm not in strong] + [
        line for line in lines if line.arm in strong
    ]
    about = f"{x_name} and {y_name} along alpha: {told}."
    low_x, high_x, low_y, high_y = limits
    return Paths(
        title, about, ordered, f"{x_name}, %", f"{y_name}, %", strong, (low_x, high_x, low_y, high_y)
    )


def _limits(lines: Sequence[Line]) -> tuple[float, float, float, float]:
    xs = [x for line in lines for x in [p[1] for p in line.points] + [e[0] for e in line.ends]]
    ys = [y for line in lines for y in [p[2] for p in line.points] + [e[1] for e in line.ends]]
    wide, high = max(max(xs) - min(xs), 1.0), max(max(ys) - min(ys), 1.0)
    return min(xs) - 0.06 * wide, max(xs) + 0.34 * wide, min(ys) - 0.13 * high, max(ys) + 0.08 * high


def domains_group(found: Collected, averages: Averages, results: Results) -> Group | None:
    """Accuracy per domain: one panel per arm, against the reference."""
    by_set = results.by_set()
    names = domain_sets(averages, results)
    reference = by_set.get((found.reference or "", None), {})
    before = by_set.get((found.before or "", None), {})
    arms = [arm for arm in found.arms if arm not in (found.reference, found.before) and (arm, None) in by_set]
    arms.sort(key=lambda arm: arm != found.subject)  # first what the report is about
    if not names or not arms or not reference or found.reference is None:
        return None
    names = sorted(
        names, key=lambda name: -(before.get(name) or reference.get(name) or Figure({None: 0.0}, 0)).mean
    )
    values = [
        by_set[arm, None][name].mean
        for arm in [*arms, found.reference, found.before or ""]
        for name in names
        if name in by_set.get((arm, None), {})
    ]
    room = 0.05 * (max(values) - min(values)) + 0.5
    limits = (min(values) - room, max(values) + room)
    panels: list[Panel] = []
    for arm in arms:
        other = by_set[arm, None]
        told = "; ".join(
            f"{name} {other[name].mean - reference[name].mean:+.1f}"
            for name in names
            if name in other and name in reference
        )
        label = found.arms[arm].label
        panels.append(
            Steps(
                f"{found.arms[found.reference].label} → {label}",
                f"Accuracy per domain, {label} less {found.arms[found.reference].label}: {told}.",
                names,
                reference,
                other,
                found.reference,
                arm,
                before,
                limits,
            )
        )
    return Group("domains", f"Accuracy per domain, {results.unit}", panels)


def domain_sets(averages: Averages, results: Results) -> list[str]:
    """The sets of shifted domains; all sets where a suite names none."""
    measured = results.sets
    shifted = {
        name
        for average in averages.known
        if averages.kind(average) == "shift"
        for name in averages.sets(average)
    }
    return [name for name in measured if name in shifted] or measured


def training_group(found: Collected, curves: Mapping[str, Sequence[Curves]]) -> Group | None:
    """One panel per term of the loss; `curves` holds the runs of each arm."""
    terms = list(dict.fromkeys(term for runs in curves.values() for run in runs for term in run.terms))
    known = ["contrastive_loss", "caption_anchor_loss", "pair_anchor_loss"]
    terms.sort(key=lambda term: (term == "loss", known.index(term) if term in known else len(known)))
    if len(terms) == 2 and "loss" in terms:  # the sum of one term says the same again
        terms.remove("loss")
    panels: list[Panel] = []
    for term in terms:
        series = []
        for arm, runs in curves.items():
            seeds = [_binned(run.terms[term]) for run in runs if run.terms.get(term)]
            if seeds:
                series.append(
                    Series(arm, found.arms[arm].label, _mean(seeds), tuple(seeds) if len(seeds) > 1 else ())
                )
        few = len(series) <= NAMED
        strong = [item.arm for item in series if few or item.arm in (found.reference, found.subject)]
        told = "; ".join(f"{item.label} ends at {item.mean[-1][1]:.2f}" for item in series)
        ordered = [item for item in series if item.arm not in strong] + [
            item for item in series if item.arm in strong
        ]
        if len(series) > 3:  # single seeds of more lines than that are a thicket
            ordered = [Series(item.arm, item.label, item.mean) for item in ordered]
        title = term_name(term)
        panels.append(
            Training(title[0].upper() + title[1:], f"{title} over training: {told}.", ordered, strong)
        )
    return Group("training", "Loss over training, by term", panels) if panels else None


Curve = tuple[tuple[float, float], ...]


def _binned(points: Sequence[tuple[float, float]]) -> Curve:
    """At most `BINS` points: the means of as many equal spans."""
    if len(points) <= BINS:
        return tuple(points)
    last = points[-1][0]
    bins: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        bins.setdefault(min(int(x / last * BINS), BINS - 1), []).append((x, y))
    return tuple(
        (statistics.fmean(x for x, _ in items), statistics.fmean(y for _, y in items))
        for _, items in sorted(bins.items())
    )


def _mean(seeds: Sequence[Curve]) -> Curve:
    """Mean over seeds at the points of the first, as far as all go."""
    import numpy as np

    last = min(seed[-1][0] for seed in seeds)
    grid = [x for x, _ in seeds[0] if x <= last + 1e-9]
    values = [np.interp(grid, [x for x, _ in seed], [y for _, y in seed]) for seed in seeds]
    return tuple(zip(grid, np.mean(values, axis=0).tolist(), strict=True))
