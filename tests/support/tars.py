"""Writes tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from arf_plugin.anchors.tars import Member, scan_samples
from arf_plugin.errors import ArfError, TaskDataError


def members_of(url: str, error: type[ArfError] = TaskDataError, **options: Any) -> Iterator[Member]:
    """The members of a tar's samples, one after another; see `scan_samples` for the options."""
    for sample in scan_samples(url, error, **options):
        yield from sample.members.values()


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """Writes a tar of the given members, in order; as pairs, a name may come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
