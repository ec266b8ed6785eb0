"""Captions for the pool, prompts for the classes. All of it is a function of the concept, the vendor and a hash."""

from __future__ import annotations

import re

from benchmarks.files import unit_hash

from emojinet.classes import CLASS_NAMES
from emojinet.join import Concept

# Class prompts in CLIP_benchmark's notation; `{c}` is the class name.
TEMPLATES = (
    "a picture of a {c}.",
    "a drawing of a {c}.",
    "an icon of a {c}.",
    "an illustration of a {c}.",
    "a {c}.",
    "a small picture of a {c}.",
    "a symbol for a {c}.",
    "this is a {c}.",
)

# Web captions often name no more than the kind of thing; without such texts a model never meets a class name alone,
# which is what class prompts are made of.
WITH_CATEGORY = (
    "a picture of a {category}",
    "an icon of a {category}",
    "{category}, {word}",
    "{label}, a kind of {category}",
    "{category}: {label}",
    "a picture of a {category}, {label}",
    "an icon of a {label}, {category}",
    "{label} ({category})",
    "{word} {category}, {label}",
)
WITHOUT_CATEGORY = (
    "a picture of a {label}",
    "{label}, {word}",
    "a drawing of a {label}, {word} and {word2}",
    "an icon of a {label}",
    "a small {label}",
    "{label}",
)
GROUP_WORDS = {
    "animals-nature": "nature",
    "food-drink": "food",
    "travel-places": "place",
    "activities": "activity",
    "objects": "object",
    "smileys-emotion": "face",
    "people-body": "person",
    "symbols": "sign",
    "flags": "flag",
}
# Parts of icon names that say how a file is laid out, not what it shows.
NAME_NOISE = re.compile(r"\b(\d+px|wordmark|original|icon|type|alt|\d+)\b")


def caption(concept: Concept, vendor: str, variant: int = 0) -> str:
    """A text for one drawing: a phrase over label and keywords, a category word in every other one.

    Args:
        concept: what is drawn.
        vendor: who drew it; each vendor's drawing has texts of its own.
        variant: 0 is the pool's text; pretraining sees further ones.
    """

    def pick(options: tuple[str, ...], purpose: str) -> str:
        return options[int(unit_hash("caption", purpose, vendor, concept.code, variant) * len(options))]

    words = concept.keywords or (concept.label,)
    templates = (
        WITH_CATEGORY if unit_hash("category", vendor, concept.code, variant) < 0.5 else WITHOUT_CATEGORY
    )
    return pick(templates, "template").format(
        label=concept.label,
        category=CLASS_NAMES.get(concept.subgroup) or GROUP_WORDS[concept.group],
        word=pick(words, "word"),
        word2=pick(words, "word2"),
    )


def icon_caption(icon: str, set_name: str) -> str:
    """The pool's text for an unrelated icon: its own name, as words."""
    text = " ".join(NAME_NOISE.sub(" ", icon.replace("-", " ").replace("_", " ")).split()) or icon
    return f"flag {text}" if set_name == "circle-flags" else text
