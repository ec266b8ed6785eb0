"""Colours and marks of the report: one per arm, the same in every plot and table.

Colours come in two sets, for a light and a dark page. No reader has to tell twelve hues apart: each arm also has a mark
of its own, plots name their lines, and where many arms meet, all but two of them are grey. The first six trained
arms differ in lightness as well as hue (after Okabe and Ito, "Color Universal Design", 2008).

A plot is drawn once with place holders in place of colours. On the page they become CSS variables, so the plot
follows the reader's light or dark mode; in the files beside it they become the light set.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

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

_HOLDER = re.compile(r"#([ab])0ff(\d\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Look:
    """How an arm looks: colours for a light and a dark page, and a matplotlib mark."""

    light: str
    dark: str
    mark: str


@dataclass(frozen=True)
class Theme:
    """Colours to draw with, by name of ink and of arm."""

    inks: dict[str, str]
    arms: dict[str, str]
    marks: dict[str, str]

    def __getattr__(self, name: str) -> str:
        try:
            return self.inks[name]
        except KeyError:
            raise AttributeError(name) from None


class Style:
    """The looks of a report's arms.

    Args:
        arms: names in table order.
        reference: the arm that others are compared with.
        before: the model before fine-tuning, if there is one.
        subject: the arm that the report is about.
    """

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
        self._order = list(self.looks)

    def theme(self) -> Theme:
        """Place holders, to be resolved by :meth:`for_page` or :meth:`for_file`."""
        inks = {name: f"#a0ff{number:02d}" for number, name in enumerate(INKS)}
        arms = {name: f"#b0ff{number:02d}" for number, name in enumerate(self._order)}
        return Theme(inks, arms, self._marks())

    def light(self) -> Theme:
        """The colours of a light page."""
        inks = {name: pair[0] for name, pair in INKS.items()}
        return Theme(inks, {name: look.light for name, look in self.looks.items()}, self._marks())

    def for_page(self, svg: str) -> str:
        """Replaces place holders by CSS variables."""
        names = list(INKS)
        return _HOLDER.sub(
            lambda found: (
                f"var(--{names[int(found[2])]})" if found[1] in "aA" else f"var(--arm-{int(found[2])})"
            ),
            svg,
        )

    def for_file(self, svg: str) -> str:
        """Replaces place holders by the light colours."""
        inks, looks = list(INKS.values()), list(self.looks.values())
        return _HOLDER.sub(
            lambda found: inks[int(found[2])][0] if found[1] in "aA" else looks[int(found[2])].light, svg
        )

    def variables(self, dark: bool = False) -> str:
        """CSS declarations of all colours."""
        pairs = {f"--{name}": pair for name, pair in INKS.items()}
        pairs |= {f"--arm-{i}": (look.light, look.dark) for i, look in enumerate(self.looks.values())}
        return " ".join(f"{name}: {pair[dark]};" for name, pair in pairs.items())

    def css_colour(self, arm: str) -> str:
        """The arm's colour on the page."""
        return f"var(--arm-{self._order.index(arm)})"

    def _marks(self) -> dict[str, str]:
        return {name: look.mark for name, look in self.looks.items()}
