"""The tables: every arm on every average, once as fine-tuned and once per alpha of WiSE-FT that is reported.

A *slice* is one such table. Alphas are taken from what is measured: 0.5, which the paper of WiSE-FT recommends where
nothing can be validated, and the alpha that validation has chosen for each arm, if there is one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from arf_plugin.report.comparison import Difference, difference
from arf_plugin.report.numbers import finite
from arf_plugin.report.results import Averages, Figure, Key, Results
from arf_plugin.report.sources import Collected

TUNED = "as fine-tuned"


@dataclass
class Slice:
    """One table.

    Attributes:
        key: ``tuned``, ``wise`` or ``chosen``.
        title: heads it.
        figures: by arm and average.
        differences: to the reference, by arm and average.
        comparisons: further pairs of arms -> differences by average.
        alphas: alpha by arm, for ``chosen``.
    """

    key: str
    title: str
    figures: dict[str, dict[str, Figure]]
    differences: dict[str, dict[str, Difference]] = field(default_factory=dict)
    comparisons: dict[tuple[str, str], dict[str, Difference]] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def best(self, average: str) -> set[str]:
        """The arms with the highest mean, to the decimal that is shown."""
        means = {
            arm: round(found[average].mean, 1) for arm, found in self.figures.items() if average in found
        }
        return {arm for arm, mean in means.items() if mean == max(means.values())}


def build_slices(
    found: Collected, results: Results, averages: Averages, comparisons: Sequence[tuple[str, str]]
) -> list[Slice]:
    """Builds the tables that the measurements allow."""
    by_key = results.by_average()
    slices = [
        Slice("tuned", TUNED, _ordered(found, {arm: by_key.get((arm, None), {}) for arm in found.arms}))
    ]
    wise = _middle([alpha for alpha in results.alphas() if 0.0 < alpha < 1.0])
    if wise is not None:
        slices.append(Slice("wise", f"WiSE-FT at α = {wise:g}", _ordered(found, _at(found, by_key, wise))))
    chosen = chosen_alphas(found, averages)
    figures = {arm: by_key.get((arm, _measured(by_key, arm, alpha)), {}) for arm, alpha in chosen.items()}
    if wise is not None and set(chosen.values()) == {wise}:  # a table of its own would say the same twice
        if len(results.alphas()) > 1:
            slices[-1].title += ", which validation chose for every arm"
    elif any(figures.values()):
        before = {found.before: by_key.get((found.before, None), {})} if found.before else {}
        slices.append(
            Slice(
                "chosen",
                "WiSE-FT, α chosen on validation",
                _ordered(found, {**before, **figures}),
                alphas=chosen,
            )
        )
    for one in slices:
        _compare(one, found, comparisons)
    return slices


def chosen_alphas(found: Collected, averages: Averages) -> dict[str, float]:
    """Alpha by arm as validation chose it: by the grid, else here by the validation rows' first ID average."""
    chosen: dict[str, float] = {}
    for content in found.choices:
        entries = content.get("wise")
        for arm, entry in (entries if isinstance(entries, dict) else {}).items():
            alpha = finite(entry.get("chosen")) if isinstance(entry, dict) else None
            if arm in found.arms and alpha is not None:
                chosen[arm] = alpha
    judge = next((name for name in averages.known if averages.kind(name) == "id"), None)
    if chosen or judge is None:
        return chosen
    by_key = Results(found.validation, averages).by_average()
    for arm in found.arms:
        candidates = {
            1.0 if alpha is None else alpha: figures[judge].mean
            for (name, alpha), figures in by_key.items()
            if name == arm and judge in figures
        }
        if len(candidates) > 1:  # the smaller of equals, as it is nearer to the original
            chosen[arm] = max(sorted(candidates), key=lambda alpha: candidates[alpha])
    return chosen


def main_averages(averages: Averages) -> list[str]:
    """Those to talk about and to draw; class splits mix the same figures anew, and stand in the table alone."""
    names = [name for name in averages.known if averages.kind(name) != "class-split"]
    return names or list(averages.known)


def markdown(found: Collected, slices: Sequence[Slice], averages: Averages, unit: str) -> str:
    """All tables as Markdown: mean ± standard deviation over seeds, the best of a column in bold."""
    parts = []
    for one in slices:
        names = [name for name in averages.known if any(name in figures for figures in one.figures.values())]
        alpha = ["α"] if one.alphas else []
        lines = [[f"{unit}, {one.title}", *alpha, *names]]
        lines.append(["---"] * len(lines[0]))
        for arm, figures in one.figures.items():
            cells = [f"{one.alphas[arm]:g}" if arm in one.alphas else ""] if one.alphas else []
            for name in names:
                text = shown(figures[name]) if name in figures else ""
                cells.append(f"**{text}**" if text and arm in one.best(name) else text)
            lines.append([_escaped(found.arms[arm].label), *cells])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def shown(figure: Figure) -> str:
    """A figure as text: ``43.6 ± 0.9``, without a deviation where there is one seed."""
    return f"{figure.mean:.1f}" + ("" if figure.deviation is None else f" ± {figure.deviation:.1f}")


def _escaped(text: str) -> str:
    for mark in "\\|`*_<>[]":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _middle(alphas: Sequence[float]) -> float | None:
    if not alphas:
        return None
    return 0.5 if 0.5 in alphas else statistics.median_low(sorted(alphas))


def _measured(by_key: Mapping[Key, object], arm: str, alpha: float) -> float | None:
    """The key under which an alpha was measured: alpha 1 is the fine-tuned model itself."""
    return None if alpha == 1.0 and (arm, 1.0) not in by_key else alpha


def _at(
    found: Collected, by_key: Mapping[Key, dict[str, Figure]], alpha: float
) -> dict[str, dict[str, Figure]]:
    return {arm: by_key.get((arm, None if arm == found.before else alpha), {}) for arm in found.arms}


def _ordered(found: Collected, figures: Mapping[str, dict[str, Figure]]) -> dict[str, dict[str, Figure]]:
    return {arm: figures[arm] for arm in found.arms if figures.get(arm)}


def _compare(one: Slice, found: Collected, comparisons: Sequence[tuple[str, str]]) -> None:
    reference = one.figures.get(found.reference or "", {})
    for arm, figures in one.figures.items():
        if arm != found.reference and reference:
            one.differences[arm] = _differences(figures, reference)
    for pair in comparisons:
        if all(arm in one.figures for arm in pair) and pair[1] != found.reference:
            one.comparisons[pair] = _differences(one.figures[pair[0]], one.figures[pair[1]])


def _differences(one: Mapping[str, Figure], other: Mapping[str, Figure]) -> dict[str, Difference]:
    found = {name: difference(figure, other[name]) for name, figure in one.items() if name in other}
    return {name: item for name, item in found.items() if item is not None}
