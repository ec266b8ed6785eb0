"""What an icon's name says: its style, the concept, and which variant of it.

`mdi:bell-plus-outline` is a line drawing of the concept `bell`, variant `plus`. Suffixes of style are each set's own.
A name belongs to a concept if it is one of the concept's names, or one of them with words of `MODIFIERS` after it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

# Suffix -> style, set by set; None leaves out near-copies of another style, and styles of few drawings.
# A set's suffixes are tried as listed.
STYLES: dict[str, dict[str, str | None]] = {
    "tabler": {"filled": "solid", "": "line"},
    "lucide": {"": "line"},
    "ph": {
        "thin": None,
        "light": None,
        "bold": "bold",
        "fill": "solid",
        "duotone": "duotone",
        "": "line",
    },
    "carbon": {"filled": None, "solid": None, "fill": None, "outline": None, "": "line"},
    "bi": {"fill": "solid", "": "line"},
    "material-symbols": {
        "outline-rounded": None,
        "outline-sharp": None,
        "rounded": None,
        "sharp": None,
        "outline": "line",
        "": "solid",
    },
    "mdi": {"outline": "line", "": "solid"},
    "fluent": {"filled": "solid", "regular": "line", "light": None},
    "solar": {
        "line-duotone": "line-duotone",
        "bold-duotone": "bold-duotone",
        "broken": "broken",
        "outline": None,
        "linear": "line",
        "bold": "solid",
    },
    "bx": {"": "line"},
    "heroicons": {"20-solid": None, "16-solid": None, "solid": "solid", "": "line"},
    "iconoir": {"solid": None, "": "line"},
    "ion": {"sharp": None, "outline": "line", "": "solid"},
    "mingcute": {"fill": "solid", "line": "line"},
}
LOOKS = {
    "line": "line",
    "bold": "line",
    "broken": "line",
    "solid": "solid",
    "duotone": "duotone",
    "line-duotone": "duotone",
    "bold-duotone": "duotone",
}
# Fluent draws most icons at several sizes; the first of these is taken.
SIZES = ("24", "20", "28", "32", "16", "48", "12", "10")

# Word -> how the variant is called; words that do not change what is seen give no variant of their own.
MODIFIERS = {
    **dict.fromkeys(("plus", "add", "new"), "plus"),
    **dict.fromkeys(("minus", "remove", "dash", "subtract"), "minus"),
    **dict.fromkeys(("x", "close", "cancel", "xmark", "dismiss"), "cross"),
    **dict.fromkeys(("check", "checked", "checkmark", "done", "tick"), "check mark"),
    **dict.fromkeys(("off", "slash", "disabled"), "off"),
    **dict.fromkeys(("alert", "exclamation", "error", "warning"), "exclamation mark"),
    **dict.fromkeys(("circle", "round"), "in a circle"),
    "square": "in a square",
    **dict.fromkeys(("multiple", "multi"), "several"),
    "half": "half",
    **dict.fromkeys(("alt", "variant", "simple", "line", "big", "small", "large", "mini", "on", "front"), ""),
}
_NUMBER = re.compile(r"\d{1,2}")


@dataclass(frozen=True)
class Drawing:
    """One icon.

    Attributes:
        set: the icon set.
        icon: its name there.
        style: how it is drawn; a key of `LOOKS`.
        name: the name without suffix of style.
        concept: what it shows; empty if that is no listed concept.
        variant: such as "plus" or "off"; empty for the plain drawing.
    """

    set: str
    icon: str
    style: str
    name: str
    concept: str = ""
    variant: str = ""

    @property
    def domain(self) -> str:
        """Set and style: a domain of the benchmark."""
        return f"{self.set}-{self.style}"

    @property
    def key(self) -> str:
        """The WebDataset key: unique, and free of dots."""
        return f"{self.set}_{self.icon}"


def strip_style(set_name: str, icon: str) -> tuple[str, str | None, str]:
    """Takes the suffix of style from a name.

    Returns:
        The name, the style (None: to be left out), and the size where the name has one.
    """
    size = ""
    for suffix, style in STYLES[set_name].items():
        if suffix and not icon.endswith(f"-{suffix}"):
            continue
        name = icon.removesuffix(f"-{suffix}") if suffix else icon
        if set_name == "fluent":
            name, _, size = name.rpartition("-")
        return name, style, size
    return icon, None, size


class Concepts:
    """Finds the concept of a name.

    Args:
        names: the names of each concept, by concept.
        other_meanings: set and name where a name means something else in that set.
    """

    def __init__(
        self, names: Mapping[str, Iterable[str]], other_meanings: Container[tuple[str, str]] = ()
    ) -> None:
        self._other_meanings = other_meanings
        self._concepts = {tuple(name.split("-")): concept for concept, all_ in names.items() for name in all_}
        self._longest = max(map(len, self._concepts))

    def of(self, set_name: str, name: str) -> tuple[str, str]:
        """Concept and variant of a set's name without style; two empty texts where it is none."""
        words = tuple(name.split("-"))
        for count in range(min(len(words), self._longest), 0, -1):
            concept = self._concepts.get(words[:count])
            if concept is not None and (set_name, "-".join(words[:count])) not in self._other_meanings:
                rest = words[count:]
                if all(word in MODIFIERS or _NUMBER.fullmatch(word) for word in rest):
                    said = (MODIFIERS.get(word, "") for word in rest)
                    return concept, " ".join(dict.fromkeys(word for word in said if word))
        return "", ""

    def mentioned(self, name: str) -> set[str]:
        """All concepts whose names occur in a name: its word groups."""
        words = tuple(name.split("-"))
        spans = (
            words[start : start + count]
            for start in range(len(words))
            for count in range(1, self._longest + 1)
        )
        return {self._concepts[span] for span in spans if span in self._concepts}


def read_drawings(set_name: str, icons: Iterable[str], concepts: Concepts) -> list[Drawing]:
    """Reads a set's names; of a drawing that comes in several sizes, one is taken."""
    found: dict[tuple[str, str], tuple[int, Drawing]] = {}
    for icon in sorted(icons):
        name, style, size = strip_style(set_name, icon)
        if style is None or not name:
            continue
        rank = SIZES.index(size) if size in SIZES else 0
        known = found.get((name, style))
        if known is None or rank < known[0]:
            found[name, style] = (rank, Drawing(set_name, icon, style, name, *concepts.of(set_name, name)))
    return [drawing for _, drawing in found.values()]
