"""Says who drew and wrote what EmojiNet is made of; goes into the repository and beside the data."""

from __future__ import annotations

from emojinet.sources import EMOJI_SETS, NAMES, UNRELATED_SETS, Source

LICENSE_LINKS = {
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "https://opensource.org/license/mit",
}


def _table(sources: tuple[Source, ...]) -> list[str]:
    rows = ["| package | by | licence |", "|---|---|---|"]
    for s in sources:
        link = LICENSE_LINKS[s.license]
        rows.append(f"| {s.package} {s.version} | [{s.author}]({s.url}) | [{s.license}]({link}) |")
    return rows


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
            *_table(EMOJI_SETS),
            "",
            "## Names and keywords",
            "",
            *_table(NAMES),
            "",
            "## Icons in the retrieval pool",
            "",
            *_table(UNRELATED_SETS),
            "",
        ]
    )
