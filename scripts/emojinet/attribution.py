"""Says who drew and wrote what EmojiNet is made of; goes into the repository and beside the data."""

from __future__ import annotations

from benchmarks.attribution import table

from emojinet.sources import EMOJI_SETS, NAMES, UNRELATED_SETS


def attribution() -> str:
    """The text of ATTRIBUTION.md."""
    return "\n".join(
        [
            "# Attribution",
            "",
            "EmojiNet is built on the user's machine from the packages below; none of their drawings is part of",
            "this repository. Changes made to them: drawn from SVG as 64 x 64 pixel PNG images on white. Each image",
            "keeps its own licence, named in the json beside it; drawings under a share-alike licence may be passed",
            "on under that licence only. `python scripts/emojinet/build.py --attribution` writes this file.",
            "",
            "## Emoji",
            "",
            *table(EMOJI_SETS),
            "",
            "## Names and keywords",
            "",
            *table(NAMES),
            "",
            "## Icons in the retrieval pool",
            "",
            *table(UNRELATED_SETS),
            "",
        ]
    )
