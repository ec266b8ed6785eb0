"""Who drew and wrote the packages, as a table for ATTRIBUTION.md."""

from __future__ import annotations

from benchmarks.sources import Source

LICENSE_LINKS = {
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "ISC": "https://opensource.org/license/isc-license-txt",
    "MIT": "https://opensource.org/license/mit",
}


def table(sources: tuple[Source, ...]) -> list[str]:
    """Lines of a table: package and version, author, licence."""
    rows = ["| package | by | licence |", "|---|---|---|"]
    for s in sources:
        link = LICENSE_LINKS[s.license]
        rows.append(f"| {s.package} {s.version} | [{s.author}]({s.url}) | [{s.license}]({link}) |")
    return rows
