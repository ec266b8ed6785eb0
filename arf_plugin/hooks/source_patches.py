"""Applies the patches of patches/ to a copy of open_clip's sources, checks and reverts them.

git does the work: a series applies as a whole or not at all, and reverts only where nothing was changed since.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from arf_plugin.errors import PatchError

PACKAGE = "open_clip_train"
SERIES = ("arf", "upstream")


def patches_folder() -> Path:
    """patches/: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "patches"
    return inside if inside.is_dir() else package.parent / "patches"


def releases() -> list[str]:
    """Releases of open_clip that there are patches for, oldest first."""
    from packaging.version import Version

    return sorted((path.name for path in patches_folder().iterdir() if path.is_dir()), key=Version)


def find_release(target: Path) -> str:
    """Release of the open_clip in a folder, from its ``open_clip/version.py``.

    Raises:
        PatchError: There is none, or it does not say.
    """
    path = target / "open_clip" / "version.py"
    found = (
        re.search(r"__version__\s*=\s*['\"]([^'\"]+)", path.read_text(encoding="utf-8"))
        if path.is_file()
        else None
    )
    if found is None:
        raise PatchError(f"{path} does not say which release this is. Name it with --release.")
    return found[1]


class Series:
    """A numbered series of patches for one release.

    Args:
        name: ``arf`` or ``upstream``.
        release: Release of open_clip.

    Raises:
        PatchError: There are no patches for the release.
    """

    def __init__(self, name: str, release: str) -> None:
        folder = patches_folder() / release / name
        self.paths = sorted(folder.glob("*.patch")) if folder.is_dir() else []
        if not self.paths:
            raise PatchError(
                f"there are no patches of series '{name}' for open_clip {release}; there are for: "
                f"{', '.join(releases())}.\n"
                "A neighbouring release's often fit: --release"
            )

    def state(self, target: Path) -> str:
        """``applied``, ``applies``, or git's reasons why neither is so.

        Raises:
            PatchError: The folder holds no trainer.
        """
        if not (target / PACKAGE).is_dir():
            raise PatchError(
                f"{target} has no folder {PACKAGE}: expected the one that holds it, `src` in a checkout of open_clip."
            )
        if not self._git(target, "--check", "--reverse"):
            return "applied"
        return self._git(target, "--check") or "applies"

    def apply(self, target: Path) -> None:
        """Applies all patches.

        Raises:
            PatchError: They are applied already, or do not fit.
        """
        self._change(target, wanted="applies", done="applied")

    def revert(self, target: Path) -> None:
        """Takes all patches back.

        Raises:
            PatchError: They are not applied, or their lines were changed since.
        """
        self._change(target, "--reverse", wanted="applied", done="not applied")

    def _change(self, target: Path, *options: str, wanted: str, done: str) -> None:
        state = self.state(target)
        if state == wanted:
            problem = self._git(target, *options)
        elif state in ("applied", "applies"):
            problem = f"the series is {done} already"
        else:
            problem = state
        if problem:
            raise PatchError(
                f"{target}: {problem}\nNothing was changed. The patches are in {self.paths[0].parent}; "
                "see how they fit with: arf patch check"
            )

    def _git(self, target: Path, *options: str) -> str:
        """Runs ``git apply`` in the folder; returns what it complains of."""
        if shutil.which("git") is None:
            raise PatchError("git is not installed; it applies the patches.")
        paths = self.paths[::-1] if "--reverse" in options else self.paths
        # Below a repository git would take the patches' paths for the repository's, and silently skip them.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(target.resolve().parent), "LC_ALL": "C"}
        environment.pop("GIT_DIR", None)
        done = subprocess.run(
            ["git", "apply", *options, *(str(path.resolve()) for path in paths)],
            cwd=target,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr.strip() if done.returncode else ""
