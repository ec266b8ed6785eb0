"""Captions for the pool, prompts for the classes. All of it is a function of the drawing and a hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.download import member
from benchmarks.files import read_json, unit_hash
from benchmarks.sources import Source

from iconnet.names import Drawing, strip_style

# Class prompts in CLIP_benchmark's notation; `{c}` is the class name.
TEMPLATES = (
    "an icon of a {c}.",
    "a {c} icon.",
    "a drawing of a {c}.",
    "a symbol for a {c}.",
    "a picture of a {c}.",
    "a small picture of a {c}.",
    "a {c}.",
    "this is a {c}.",
)
FORMS = (
    "{words}",
    "an icon of a {words}",
    "{words} icon",
    "a drawing of a {words}",
    "a {style} icon of a {words}",
    "{words}, {style}",
    "{style} {words} symbol",
    "a picture of a {words}, drawn {style}",
)
FORMS_WITH_CATEGORY = (
    "{words}, {category}",
    "{category}: {words}",
    "an icon of a {words} ({category})",
    "a {style} {words} icon for {category}",
    "a {category} icon",
)
STYLE_WORDS = {
    "line": ("outline", "in thin lines", "outlined"),
    "bold": ("in bold lines", "outline"),
    "broken": ("in broken lines", "outline"),
    "solid": ("solid", "filled", "in black"),
    "duotone": ("two-tone", "duotone"),
    "line-duotone": ("in two-tone lines", "duotone"),
    "bold-duotone": ("two-tone", "solid and duotone"),
}
# Packages that sort their icons, the most telling first, and what they call no kind of thing.
SORTED = ("mdi", "iconoir", "solar", "material-symbols")
VAGUE = {
    *("other", "system", "ui", "actions", "ui actions", "android", "home automation", "vector", "tooltip"),
    *("parts", "hardware", "social"),
}


def categories(unpacked: Path, sources: Sequence[Source]) -> dict[str, str]:
    """The category that the packages themselves give a name, such as "food" for "pizza"; not every name has one."""
    found: dict[str, str] = {}
    sorting = [source for source in sources if source.name in SORTED]
    for source in sorted(sorting, key=lambda source: SORTED.index(source.name), reverse=True):
        listed: dict[str, Counter[str]] = {}
        for category, icons in read_json(member(unpacked, source, "metadata.json"))["categories"].items():
            word = category.split(" / ")[0].split(" +")[0].lower()
            if word not in VAGUE:
                for icon in icons:
                    listed.setdefault(strip_style(source.name, icon)[0], Counter())[word] += 1
        found |= {name: min(words, key=lambda word: (-words[word], word)) for name, words in listed.items()}
    return found


def label(drawing: Drawing) -> str:
    """What is seen, in words: concept and variant, or the words of the name."""
    if drawing.concept:
        return f"{drawing.concept} {drawing.variant}".strip()
    return drawing.name.replace("-", " ")


def caption(drawing: Drawing, kinds: Mapping[str, str], variant: int = 0) -> str:
    """A text for one drawing: its words, the style in half of them, a category in a third.

    Args:
        drawing: the drawing.
        kinds: what `categories` returns.
        variant: 0 is the pool's text; pretraining sees further ones.
    """

    def pick(options: Sequence[str], purpose: str) -> str:
        return options[int(unit_hash("caption", purpose, drawing.key, variant) * len(options))]

    category = kinds.get(drawing.name)
    forms = FORMS
    if category and unit_hash("category", drawing.key, variant) < 0.4:
        forms = FORMS_WITH_CATEGORY
    return pick(forms, "form").format(
        words=label(drawing), category=category, style=pick(STYLE_WORDS[drawing.style], "style")
    )
