"""``anchors.json``: what an anchor set holds and where it came from. Reading a set does not need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arf_plugin import __version__
from arf_plugin.anchors.files import write_json
from arf_plugin.errors import AnchorSetError

MANIFEST = "anchors.json"
FORMAT_VERSION = 1


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Reads the manifest of an anchor set; None if it has none, as one made by hand.

    Raises:
        AnchorSetError: if it is not JSON, or of a format that this version does not know.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise AnchorSetError(f"{path} is not JSON: {cause}. Delete it, or build the set again.") from cause
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise AnchorSetError(
            f"{path} has format_version {found!r}; this arf-plugin ({__version__}) reads {FORMAT_VERSION}. "
            "Use the version that built the set, or build it again."
        )
    return manifest


def update_manifest(folder: Path, half: str, entry: dict[str, Any]) -> None:
    """Writes the entry of one half, ``captions`` or ``pairs``, and keeps the other.

    The file holds no times and no paths, so that equal inputs give equal bytes.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f".{MANIFEST}.lock"
    with FileLock(lock):  # captions and pairs may be finished at the same moment
        manifest = read_manifest(folder) or {"format_version": FORMAT_VERSION}
        manifest |= {half: entry, "built_by": f"arf-plugin {__version__}"}
        write_json(folder / MANIFEST, manifest)
