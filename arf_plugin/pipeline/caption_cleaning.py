"""Cleans what captioners say: control characters, boilerplate at the front, and words that go round in circles.

The paper (section 3.2) takes captions as they come; this is ours. What describes the picture is kept, "a photo of"
included, since CLIP has read it often; what only says that there is a picture goes.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

# Openings without content; matched in any case, at the front, again and again.
BOILERPLATE = (
    *("there is", "there are", "there's", "this is", "we see", "we can see", "you can see"),
    *("in this image", "in this picture", "in this photo", "in the image", "in the picture"),
    *("the image shows", "the image depicts", "the image features", "this image shows", "this image depicts"),
    *("the picture shows", "the photo shows"),
    *("arafed", "araffe", "arafed view of"),  # words that BLIP made up, and is known for
)
_LONGEST_PHRASE = 8  # words


@dataclass(frozen=True)
class Cleaning:
    """How captions are cleaned.

    Attributes:
        boilerplate: whether openings without content are removed.
        prefixes: further openings to remove.
        repeats: whether words and phrases that are repeated over and over are said once.
        min_words: captions with fewer words are left out.
    """

    boilerplate: bool = True
    prefixes: tuple[str, ...] = ()
    repeats: bool = True
    min_words: int = 1

    def config(self) -> dict[str, Any]:
        """The settings as JSON, the openings included: another list may make other captions."""
        return asdict(self) | {"prefixes": self._openings()}

    def __call__(self, text: str) -> str | None:
        """Returns the caption in one line, or None if nothing is left of it."""
        openings = self._openings()
        text, before = one_line(text), None
        while text != before:
            text, before = _without_opening(text, openings), text
        if self.repeats:
            text = " ".join(without_repeats(text.split(" ")))
        return text if len(re.findall(r"\w+", text)) >= max(1, self.min_words) else None

    def _openings(self) -> list[str]:
        """The longest first."""
        openings = {*self.prefixes, *(BOILERPLATE if self.boilerplate else ())}
        return sorted((one_line(o) for o in openings if o.strip()), key=lambda o: (-len(o), o))


def one_line(text: str) -> str:
    """Drops control characters and joins runs of white space."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())


def without_repeats(words: list[str]) -> list[str]:
    """Says repeated phrases once: one or two words from three times on, longer phrases from two times on.

    Twice is left for short ones, as in "bye bye"; commas between the repetitions do not count.
    """
    bare = [word.strip(",.;").casefold() for word in words]
    kept: list[int] = []
    position = 0
    while position < len(words):
        for length in range(1, _LONGEST_PHRASE + 1):
            phrase = bare[position : position + length]
            end = position + length
            while bare[end : end + length] == phrase and any(phrase):
                end += length
            if (end - position) // length >= (3 if length <= 2 else 2):
                # The last of them, for its punctuation is that of what follows.
                kept += range(end - length, end)
                position = end
                break
        else:
            kept.append(position)
            position += 1
    return [words[i] for i in kept]


def _without_opening(text: str, openings: list[str]) -> str:
    lower = text.lower()
    for opening in openings:
        if lower.startswith(opening.lower()):
            rest = text[len(opening) :]
            if not rest or not (rest[0].isalnum() or rest[0] in "'’-"):  # a whole word
                return rest.lstrip(" ,:;.-")
    return text
