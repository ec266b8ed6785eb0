"""The tables: every arm on every average, once as fine-tuned and once per alpha of WiSE-FT that is reported.

A *slice* is one such table. Alphas are taken from what is measured: 0.5, which the paper of WiSE-FT recommends where
nothing can be validated, and the alpha that validation has chosen for each arm, if there is one.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from arf_plugin.console import markdown_table
from arf_plugin.report.scores import Averages, Difference, Key, Results, Score, difference
from arf_plugin.report.sources import Collected, finite, mapping


@dataclass
class Slice:
    """One table.

    Attributes:
        key: ``tuned``, ``wise`` or ``chosen``.
        title: Heads it.
        scores: By arm and average.
        names: The averages that it has, in the suites' order.
        pairs: Pairs of arms -> differences by average: every arm to the reference first, then what else is compared.
        alphas: Alpha by arm, for ``chosen``.
    """

    key: str
    title: str
    scores: dict[str, dict[str, Score]]
    names: list[str]
    pairs: dict[tuple[str, str], dict[str, Difference]]
    alphas: dict[str, float] = field(default_factory=dict)

    def best(self, average: str) -> set[str]:
        """The arms with the highest mean, to the decimal that is shown."""
        means = {arm: round(found[average].mean, 1) for arm, found in self.scores.items() if average in found}
        return {arm for arm, mean in means.items() if mean == max(means.values())}


def build_slices(found: Collected, results: Results, comparisons: Collection[tuple[str, str]]) -> list[Slice]:
    """Builds the tables that the measurements allow."""
    by_key = results.by_average()

    def table(key: str, title: str, alphas: Mapping[str, float | None]) -> Slice:
        """Scores of arms at alphas; the model before fine-tuning has none, and alpha 1 is the fine-tuned one."""
        keys = {arm: measured_key(by_key, arm, alphas[arm]) for arm in found.arms if arm in alphas}
        scores = {arm: by_key[key] for arm, key in keys.items() if by_key.get(key)}
        names = [name for name in results.averages.known if any(name in by for by in scores.values())]

        def less(arm: str, other: str) -> dict[str, Difference]:
            paired = results.verdicts(keys[arm], keys[other])
            both = [name for name in scores[arm] if name in scores[other]]
            items = {n: difference(scores[arm][n], scores[other][n], paired.get(n)) for n in both}
            return {name: item for name, item in items.items() if item is not None}

        base = found.reference or ""
        pairs = [(arm, base) for arm in scores if arm != base] if base in scores else []
        pairs += [pair for pair in comparisons if set(pair) <= scores.keys() and pair[1] != base]
        return Slice(key, title, scores, names, {pair: less(*pair) for pair in pairs})

    before: dict[str, float | None] = {found.before: None} if found.before else {}
    slices = [table("tuned", "as fine-tuned", dict.fromkeys(found.arms))]
    inner = [alpha for alpha in results.alphas() if 0.0 < alpha < 1.0]
    wise = 0.5 if 0.5 in inner else statistics.median_low(inner) if inner else None
    if wise is not None:
        title = f"WiSE-FT at α = {wise:g}"
        slices.append(table("wise", title, {**dict.fromkeys(found.arms, wise), **before}))
    chosen = chosen_alphas(found, results.averages)
    if wise is not None and set(chosen.values()) == {wise}:  # a table of its own would say the same twice
        if len(results.alphas()) > 1:
            slices[-1].title += ", which validation chose for every arm"
    elif any(by_key.get(measured_key(by_key, arm, alpha)) for arm, alpha in chosen.items()):
        slices.append(table("chosen", "WiSE-FT, α chosen on validation", {**before, **chosen}))
        slices[-1].alphas = chosen
    return [one for one in slices if one.scores]


def chosen_alphas(found: Collected, averages: Averages) -> dict[str, float]:
    """The alpha that validation has chosen for each arm: as a grid has written it down, else by validation records."""
    chosen = {}
    for content in found.choices:
        for arm, entry in mapping(content.get("wise")).items():
            alpha = finite(mapping(entry).get("chosen"))
            if arm in found.arms and alpha is not None:
                chosen[arm] = alpha
    judge = next(iter(averages.of_kind("id")), None)
    if chosen or judge is None:
        return chosen
    by_key = Results(found.validation, averages).by_average()
    for arm in found.arms:
        candidates = {
            1.0 if alpha is None else alpha: scores[judge].mean
            for (name, alpha), scores in by_key.items()
            if name == arm and judge in scores
        }
        if len(candidates) > 1:  # the smaller of equals, as it is nearer to the original
            chosen[arm] = max(sorted(candidates), key=lambda alpha: candidates[alpha])
    return chosen


def markdown(found: Collected, slices: Sequence[Slice], unit: str) -> str:
    """All tables as Markdown: mean ± standard deviation over seeds, the best of a column in bold."""
    tables = []
    for one in slices:
        lines = []
        for arm, scores in one.scores.items():
            cells = [f"{one.alphas[arm]:g}" if arm in one.alphas else ""] if one.alphas else []
            for name in one.names:
                text = str(scores.get(name, ""))
                cells.append(f"**{text}**" if text and arm in one.best(name) else text)
            lines.append([_escaped(found.arms[arm].label), *cells])
        head = [f"{unit}, {one.title}", *(["α"] if one.alphas else []), *one.names]
        tables.append(markdown_table(head, lines))
    return "\n\n".join(tables) + "\n"


def _escaped(text: str) -> str:
    for mark in "\\`*_<>[]":  # a bar is escaped by the table
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def measured_key(by_key: Mapping[Key, object], arm: str, alpha: float | None) -> Key:
    """Where an arm's scores at an alpha are: alpha 1 is the fine-tuned model itself."""
    return (arm, None) if alpha == 1.0 and (arm, 1.0) not in by_key else (arm, alpha)
