"""Colours and marks of the report: one per arm, the same in every plot and table.

Colours come in two sets, for a light and a dark page. No reader has to tell twelve hues apart: each arm also has a mark
of its own, plots name their lines, and where many arms meet, all but two of them are grey. The first six trained
arms differ in lightness as well as hue (after Okabe and Ito, "Color Universal Design", 2008).

A plot is drawn in the colours of a light page. On the page they become CSS variables, so the plot follows the reader's
light or dark mode.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

INKS = {  # name -> (light, dark)
    "ink": ("#1d2026", "#e9e7e2"),
    "muted": ("#626872", "#a0a6b1"),
    "rule": ("#dedcd5", "#33373f"),
    "faint": ("#b9bbbd", "#595f69"),
    "paper": ("#fdfcf9", "#15171b"),
}
BEFORE = ("#5f6672", "#aab1bd")
REFERENCE = ("#c2410c", "#fb923c")
SUBJECT = ("#075fa8", "#60b3f5")
OTHERS = (
    ("#00785a", "#42c99b"),
    ("#a83279", "#ec8fc6"),
    ("#8f6400", "#e3b341"),
    ("#5a47bd", "#aa9ef5"),
    ("#0e7f96", "#67cfe3"),
    ("#5f6f0a", "#b5c840"),
    ("#8a1c36", "#e77d93"),
    ("#7a4a21", "#cf9c70"),
    ("#2f4f8f", "#8fa8e8"),
)
MARKS = ("^", "v", "P", "X", "p", "h", "d", "8", "H")  # of the others; before o, reference s, subject D
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


class Look(NamedTuple):
    """How an arm looks: colours for a light and a dark page, and a matplotlib mark."""

    light: str
    dark: str
    mark: str


class Style:
    """Colours of a page, and the looks of arms, which are given by name in table order.

    Plots are drawn in the colours of a light page: `ink`, `muted`, `rule`, `faint`, `paper`, and `arms` by name.
    """

    ink, muted, rule, faint, paper = (light for light, _ in INKS.values())

    def __init__(
        self,
        arms: Sequence[str],
        reference: str | None = None,
        before: str | None = None,
        subject: str | None = None,
    ) -> None:
        special = {subject: Look(*SUBJECT, "D"), reference: Look(*REFERENCE, "s"), before: Look(*BEFORE, "o")}
        others = (Look(*colours, mark) for colours, mark in itertools.cycle(zip(OTHERS, MARKS, strict=True)))
        self.looks: dict[str, Look] = {arm: special.get(arm) or next(others) for arm in arms}
        self.arms = {arm: look.light for arm, look in self.looks.items()}
        self.marks = {arm: look.mark for arm, look in self.looks.items()}
        self._pairs = {f"--{name}": pair for name, pair in INKS.items()}
        self._pairs |= {f"--arm-{i}": (look.light, look.dark) for i, look in enumerate(self.looks.values())}

    def for_page(self, svg: str) -> str:
        """Replaces colours by CSS variables."""
        names = {light: name for name, (light, _) in self._pairs.items()}
        return _COLOUR.sub(lambda found: f"var({names[found[0]]})" if found[0] in names else found[0], svg)

    def variables(self, dark: bool = False) -> str:
        """CSS declarations of all colours."""
        return " ".join(f"{name}: {pair[dark]};" for name, pair in self._pairs.items())

    def css_colour(self, arm: str) -> str:
        """The arm's colour on the page."""
        return f"var(--arm-{list(self.looks).index(arm)})"
