"""The open_clip releases that tests run on: the environment's own, and folders beside it.

A test names another release by its folder (``train(..., open_clip=folder)``). All tests of a file run on another
release when its folder is on PYTHONPATH, as the sessions of noxfile.py have it.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from arf_plugin.hooks.releases import PACKAGE, RELEASES

FOLDERS = Path(__file__).parents[2] / ".venvs"


def current() -> str:
    """The release that this process sees."""
    return metadata.version(PACKAGE)


# Whether a session of noxfile.py has put its release in front of the environment's.
ONE_RELEASE = str(FOLDERS) in os.environ.get("PYTHONPATH", "")

# Releases as a test's parameters; those that scripts/test.sh does not run are slow.
PARAMETERS = [
    pytest.param(release.version, marks=() if release.every_change or ONE_RELEASE else pytest.mark.slow)
    for release in RELEASES
    if not ONE_RELEASE or release.version == current()
]


def folder(version: str) -> Path | None:
    """The folder of a release; None if it is the one that this process sees. Skips, or fails, if it is not there."""
    if version == current():
        return None
    if ONE_RELEASE:
        pytest.skip(f"this session runs open_clip {current()}")
    found = FOLDERS / f"{PACKAGE}-{version}"
    if not found.is_dir():
        message = f"open_clip {version} is missing; get it with: python scripts/versions/install.py {version}"
        (release,) = (release for release in RELEASES if release.version == version)
        (pytest.fail if release.every_change else pytest.skip)(message)
    return found


def since(version: str, lacks: str) -> pytest.MarkDecorator:
    """Leaves a test out on releases before one, for what open_clip itself lacks or breaks there."""
    reason = f"open_clip {current()} {lacks}; {version} and later do not"
    return pytest.mark.skipif(Version(current()) < Version(version), reason=reason)


FOLDERS_OF_MODELS = since("3.0", "knows no --model local-dir:FOLDER")


def path(*first: Path) -> str:
    """PYTHONPATH for a process that sees the same open_clip, with folders before it."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


def on_cpu(open_clip: Path | None = None) -> list[str]:
    """The trainer's flags for running on CPU: releases before 2.28 have no --device and find CUDA missing."""
    version = current() if open_clip is None else open_clip.name.rpartition("-")[2]
    return ["--device", "cpu"] if Version(version) >= Version("2.28") else ["--dist-backend", "gloo"]
