"""Reads the icon sets of Iconify's packages (@iconify-json/...): SVG bodies by name in one JSON file."""

from __future__ import annotations

from pathlib import Path

from benchmarks.download import DownloadError, member
from benchmarks.files import read_json
from benchmarks.sources import Source


def load_icons(folder: Path, source: Source) -> dict[str, str]:
    """Reads a set's icons as SVG documents, by name."""
    data = read_json(member(folder, source, "icons.json"))
    documents = {}
    for name, icon in data["icons"].items():
        left, top = (icon.get(side, data.get(side, 0)) for side in ("left", "top"))
        width, height = (icon.get(side, data.get(side, 16)) for side in ("width", "height"))
        documents[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
    return documents


def visible_names(folder: Path, source: Source) -> list[str]:
    """Names of a set's icons, without those that its authors have withdrawn."""
    icons = read_json(member(folder, source, "icons.json"))["icons"]
    return [name for name, icon in icons.items() if not icon.get("hidden")]


def check_license(folder: Path, source: Source) -> None:
    """Compares a set's licence with the one in its package.

    Raises:
        DownloadError: They differ.
    """
    found = read_json(member(folder, source, "info.json"))["license"]["spdx"]
    if found != source.license:
        raise DownloadError(
            f"{source.package} {source.version} says its licence is {found!r}, expected {source.license!r}. "
            "Look at the package, and correct sources.py and ATTRIBUTION.md."
        )
