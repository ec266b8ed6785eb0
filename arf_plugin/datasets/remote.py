"""Copies of sources that lie elsewhere, on the Hugging Face hub (``hf://``) or wherever else fsspec reaches."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from arf_plugin.anchors.task import expand_urls
from arf_plugin.console import progress
from arf_plugin.errors import TaskDataError
from arf_plugin.files import replacing
from arf_plugin.untrusted import printable

_OTHERS = ("readme.md", ".gitattributes")  # what a repository of the hub has beside its data


def fetched(source: str, folder: Path) -> Path:
    """Copies a source into a folder; files that are there in the same size are not fetched again.

    Args:
        source: A folder, a file, a glob, or files in braces and ``::``, such as ``hf://datasets/NAME/data/*.parquet``.
        folder: Where the copy goes.

    Returns:
        The folder, which holds the files under their own names.

    Raises:
        TaskDataError: It cannot be reached, or is not there.
    """
    import fsspec

    try:
        found: list[tuple[Any, str, str, int]] = []  # file system, path there, path below the folder, bytes
        for url in expand_urls(source):
            there, path = fsspec.url_to_fs(url)
            listed = there.find(path, detail=True) if there.isdir(path) else there.glob(path, detail=True)
            top = os.path.commonpath([str(PurePosixPath(one).parent) for one in listed]) if listed else ""
            found += [
                (there, one, os.path.relpath(one, top), info["size"] or 0)
                for one, info in sorted(listed.items())
                if info["type"] == "file" and PurePosixPath(one).name.lower() not in _OTHERS
            ]
        if not found:
            raise TaskDataError(f"There is no file at {source}. Check its name, and whether you may read it.")
        if len({name for _, _, name, _ in found}) < len(found):
            raise TaskDataError(f"Two files of {source} have the same name. Fetch them one after the other.")
        with progress("fetch", "B", sum(size for *_, size in found)) as bar:
            for there, path, name, size in found:
                if ".." in PurePosixPath(name).parts:
                    raise TaskDataError(f"{printable(path)} would be written out of {folder}. It was not.")
                target = folder / name
                if not target.is_file() or target.stat().st_size != size:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(target) as temporary:
                        there.get_file(path, str(temporary))
                bar.update(size)
    except TaskDataError:
        raise
    except Exception as cause:  # of the libraries behind the file systems
        raise TaskDataError(
            f"{source} cannot be fetched: {type(cause).__name__}: {printable(str(cause))[:300]}. Copy it to this "
            "machine, and name the copy."
        ) from cause
    return folder
