"""``anchors.json``: what an anchor set holds and where it came from. Reading a set does not need it.

A kind (``captions``, ``pairs``) that is being built is in it as incomplete from before its first file until after its
last, whatever kills the process; a finished one lists its files. So a set made by hand, without a manifest, is read as
it is, and one that ``arf`` builds is never taken for whole while it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arf_plugin import __version__
from arf_plugin.anchors.reading import opened_set
from arf_plugin.errors import AnchorSetError
from arf_plugin.files import sizes_in, write_json
from arf_plugin.untrusted import parse_json, printable, read_json

MANIFEST = "anchors.json"
FORMAT_VERSION = 1
# Folder, which is the name of the kind and of its entry, and suffix of its files.
KINDS = {"captions": ".parquet", "pairs": ".tar"}
_STAGES = {"captions": "caption", "pairs": "pack"}
_COUNTS = {"captions": "files", "pairs": "shards"}  # all that earlier versions noted of the files
_NAMED = 5
_ADVICE = "Delete it, or build the set again."


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Reads the manifest of an anchor set; None if it has none, as one made by hand.

    Raises:
        AnchorSetError: if it is not JSON, or of a format that this version does not know.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    return _checked(read_json(path, AnchorSetError, advice=_ADVICE), str(path))


def _checked(manifest: dict[str, Any], where: str) -> dict[str, Any]:
    found = manifest.get("format_version")
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise AnchorSetError(
            f"{where} has format_version {printable(repr(found))[:80]}; this arf-plugin ({__version__}) reads "
            f"{FORMAT_VERSION}. Use the version that built the set, or build it again."
        )
    for kind in KINDS:
        if not isinstance(manifest.get(kind, {}), dict):
            found = printable(repr(manifest[kind]))[:80]
            raise AnchorSetError(f"{where}: '{kind}' is {found}, expected an object. {_ADVICE}")
    return manifest


def begin_kind(folder: Path, kind: str) -> None:
    """Notes that a kind is being built, before its first file is written or the first old one removed."""
    _update(folder, kind, {"incomplete": True})


def update_manifest(folder: Path, kind: str, entry: dict[str, Any], files: Sequence[Path] = ()) -> None:
    """Writes the entry of one kind, ``captions`` or ``pairs``, once it is whole, and keeps the other.

    The manifest holds no times and no paths, so that equal inputs give equal bytes.

    Args:
        folder: the anchor set.
        kind: which.
        entry: what it holds.
        files: all of its files.
    """
    if files:
        entry = entry | {"written": {path.name: path.stat().st_size for path in files}}
    _update(folder, kind, entry)


def _update(folder: Path, kind: str, entry: dict[str, Any]) -> None:
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f".{MANIFEST}.lock"
    with FileLock(lock):  # captions and pairs may be finished at the same moment
        manifest = read_manifest(folder) or {"format_version": FORMAT_VERSION}
        if manifest.get(kind) == entry and "incomplete" in entry:
            return
        manifest |= {kind: entry, "built_by": f"arf-plugin {__version__}"}
        write_json(folder / MANIFEST, manifest)


def problems_of(anchors: str, kinds: Sequence[str] = tuple(KINDS)) -> list[str]:
    """Says what an anchor set that ``arf`` builds, or has built, lacks, or holds beyond what was written.

    Nothing but the manifest is read. A set made by hand, which has no manifest, has no such problem.

    Args:
        anchors: folder or fsspec URL.
        kinds: those to look at.

    Returns:
        One sentence per problem; empty for a set that is whole.
    """
    try:
        with opened_set(anchors, MANIFEST) as (fs, root):
            path = f"{root}/{MANIFEST}"
            manifest: dict[str, Any] = {}
            if fs.exists(path):
                if not fs.isfile(path):
                    return [f"{anchors}/{MANIFEST} is no file. {_ADVICE}"]
                found = parse_json(fs.cat_file(path), f"{anchors}/{MANIFEST}", AnchorSetError, dict, _ADVICE)
                manifest = _checked(found, path)
            return [problem for kind in kinds for problem in _problems(fs, root, kind, manifest.get(kind))]
    except AnchorSetError as cause:
        return [str(cause)]


def _problems(fs: Any, root: str, kind: str, entry: dict[str, Any] | None) -> list[str]:
    sizes = sizes_in(fs, f"{root}/{kind}", KINDS[kind])
    found = {name.rsplit("/", 1)[-1]: size for name, size in sizes.items()}
    again = f"Run the same arf command ({_STAGES[kind]}, or anchors) again, to its end"
    if entry is None:
        # Earlier versions wrote no entry until a kind was whole; their bookkeeping lies in the set by default.
        work = f"{root}/work/{_STAGES[kind]}"
        unfinished = fs.exists(f"{work}/config.json") and not fs.exists(f"{work}/finished.json")
    else:
        unfinished = bool(entry.get("incomplete"))
    if unfinished:
        return [f"The set's {kind} are not finished ({len(found)} files so far). {again}."]
    if entry is None:
        return []
    written, count = entry.get("written"), entry.get(_COUNTS[kind])
    by_hand = (
        f"Was it changed by hand? Then delete '{kind}' from {MANIFEST}, and what is there is taken as it is"
    )
    if not isinstance(written, dict):
        if isinstance(count, int) and not isinstance(count, bool) and count != len(found):
            return [f"{kind}/ holds {len(found)} of the {count} files that were written. {again}. {by_hand}."]
        return []
    problems = []
    if missing := sorted(written.keys() - found.keys()):
        problems.append(
            f"{kind}/ lacks {len(missing)} of the {len(written)} files that were written: {_names(missing)}. {again}."
        )
    if further := sorted(found.keys() - written.keys()):
        problems.append(
            f"{kind}/ holds {len(further)} files that are no part of what was built: {_names(further)}. Remove them."
        )
    if changed := sorted(name for name in written.keys() & found.keys() if written[name] != found[name]):
        name = changed[0]
        problems.append(
            f"{len(changed)} files in {kind}/ are not of the size that was written: {printable(name)} has "
            f"{found[name]} bytes, expected {printable(str(written[name]))[:40]}. Build them again with --restart."
        )
    return [f"{problem} {by_hand}." for problem in problems]


def _names(names: list[str]) -> str:
    return printable(", ".join(names[:_NAMED])) + (" ..." if len(names) > _NAMED else "")
