"""Joins the vendors' icons on the Unicode code point: which icon of which vendor shows which concept.

Five sets ship `chars.json`, a map from code points to icons. The icons of the others are matched by name, the most
trusted list first: emojibase's label, its short codes, and Unicode's own character name (old sets use those). A name
that stands for two concepts matches neither. Skin tones, flags' letters and other components are no concepts.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.download import member
from benchmarks.files import read_json

from emojinet.sources import EMOJI_SETS, NAMES, SHORTCODES

EMOJIBASE, EMOJILIB = NAMES


@dataclass(frozen=True)
class Concept:
    """One emoji, whoever draws it.

    Attributes:
        code: code points in hex without FE0F, e.g. "1F469-200D-1F33E": the join key.
        label: Unicode's short name, e.g. "woman farmer".
        group: one of Unicode's groups, e.g. "food-drink".
        subgroup: one of Unicode's subgroups, e.g. "food-fruit".
        keywords: further words for it, from emojibase's tags and emojilib.
    """

    code: str
    label: str
    group: str
    subgroup: str
    keywords: tuple[str, ...] = field(default=(), compare=False)


def code_of(hexcode: str) -> str:
    """Normalises code points: upper case, without the variation selector FE0F."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def squash(name: str) -> str:
    """A name's letters and digits only, in lower case: "Man’s shoe", "mans-shoe" and "mansshoe" are one."""
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", ascii_only.lower().replace("&", "and"))


def load_concepts(folder: Path) -> dict[str, Concept]:
    """Reads all concepts, keyed by code, in emojibase's order."""
    groups = read_json(member(folder, EMOJIBASE, "meta/groups.json"))
    emojilib = read_json(member(folder, EMOJILIB, "dist/emoji-en-US.json"))
    keywords = {code_of("-".join(f"{ord(c):X}" for c in emoji)): words for emoji, words in emojilib.items()}
    concepts = {}
    for entry in read_json(member(folder, EMOJIBASE, "en/data.json")):
        if "group" not in entry or groups["groups"][str(entry["group"])] == "component":
            continue
        code = code_of(entry["hexcode"])
        label = entry["label"].lower().replace("’", "'")
        words = [*entry.get("tags", ()), *(word.replace("_", " ") for word in keywords.get(code, ()))]
        usable = [word.lower() for word in words if re.fullmatch(r"[A-Za-z][A-Za-z' -]{1,19}", word)]
        concepts[code] = Concept(
            code=code,
            label=label,
            group=groups["groups"][str(entry["group"])],
            subgroup=groups["subgroups"][str(entry["subgroup"])],
            keywords=tuple(dict.fromkeys(word for word in usable if word != label)),
        )
    return concepts


def name_lists(
    concepts: dict[str, Concept], shortcodes: list[dict[str, str | list[str]]]
) -> list[dict[str, str]]:
    """Maps from squashed names to codes, the most trusted first; ambiguous names are left out."""
    labels = defaultdict(set)
    short = defaultdict(set)
    unicode_names = defaultdict(set)
    for code, concept in concepts.items():
        labels[squash(concept.label)].add(code)
        if "-" not in code:
            unicode_names[squash(unicodedata.name(chr(int(code, 16)), ""))].add(code)
    for entries in shortcodes:
        for hexcode, names in entries.items():
            for name in [names] if isinstance(names, str) else names:
                if code_of(hexcode) in concepts:
                    short[squash(name)].add(code_of(hexcode))
    return [
        {name: next(iter(codes)) for name, codes in found.items() if name and len(codes) == 1}
        for found in (labels, short, unicode_names)
    ]


def match_icons(
    icons: dict[str, dict], chars: dict[str, str], concepts: dict[str, Concept], lists: list[dict[str, str]]
) -> dict[str, str]:
    """Finds one icon per concept in one set.

    Args:
        icons: the set's icons by name.
        chars: the set's own map from code points to icon names; may be empty.
        concepts: all concepts by code.
        lists: what `name_lists` returns.

    Returns:
        Icon names by concept code.
    """
    matched: dict[str, str] = {}
    for hexcode, name in chars.items():
        if code_of(hexcode) in concepts and name in icons:
            matched.setdefault(code_of(hexcode), name)
    visible = [name for name, icon in icons.items() if not icon.get("hidden")]
    taken = set(matched.values())
    for codes in lists:
        for name in visible:
            code = codes.get(squash(name))
            if code and name not in taken and code not in matched:
                matched[code] = name
                taken.add(name)
    return matched


def join(folder: Path) -> tuple[dict[str, Concept], dict[str, dict[str, str]]]:
    """Joins all emoji sets.

    Returns:
        The concepts by code, and for each vendor its icon names by code.
    """
    concepts = load_concepts(folder)
    shortcodes = [read_json(member(folder, EMOJIBASE, f"en/shortcodes/{name}.json")) for name in SHORTCODES]
    lists = name_lists(concepts, shortcodes)
    vendors = {}
    for source in EMOJI_SETS:
        chars_path = member(folder, source, "chars.json")
        chars = read_json(chars_path) if "chars.json" in source.members else {}
        icons = read_json(member(folder, source, "icons.json"))["icons"]
        vendors[source.name] = match_icons(icons, chars, concepts, lists)
    return concepts, vendors
