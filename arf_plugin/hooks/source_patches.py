"""Applies the patches of patches/ to a copy of open_clip's sources, checks and reverts them.

git does the work: a series applies as a whole or not at all, and reverts only where nothing was changed since.

The sources are somebody else's, and a work tree can bring settings that run programs (filters, hooks, a file system
monitor). So git never sees it: the files that the patches name are copied into an empty folder, git works there with an
environment of its own and without any configuration, and what it has changed is written back.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from arf_plugin.errors import PatchError
from arf_plugin.files import replacing
from arf_plugin.untrusted import require_regular

PACKAGE = "open_clip_train"
LARGEST_SOURCE = 16 << 20  # bytes; open_clip's largest file has 80,000


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
    text = _read(path).decode("utf-8", "replace") if path.exists() else ""
    found = re.search(r"__version__\s*=\s*['\"]([^'\"\s]{1,40})['\"]", text)
    if found is None:
        raise PatchError(f"{path} does not say which release this is. Name it with --release.")
    return found[1]


def _read(path: Path) -> bytes:
    require_regular(path, PatchError)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_SOURCE + 1)
    except OSError as cause:
        raise PatchError(f"{path} cannot be read: {cause.strerror or cause}.") from cause
    if len(content) > LARGEST_SOURCE:
        raise PatchError(
            f"{path} has more than {LARGEST_SOURCE >> 20} MiB, expected a source file of open_clip."
        )
    return content


class Series:
    """A numbered series of patches, ``arf`` or ``upstream``, for one release of open_clip.

    Raises:
        PatchError: There are no patches for the release.
    """

    def __init__(self, name: str, release: str) -> None:
        folder = patches_folder() / release / name
        # The sources say which release they are; a name that is none of ours leads to no folder of theirs.
        self.paths = sorted(folder.glob("*.patch")) if release in releases() else []
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

    def change(self, target: Path, *, revert: bool = False) -> None:
        """Applies all patches, or takes them back.

        Raises:
            PatchError: They are as they should become, do not fit, or their lines were changed since.
        """
        state = self.state(target)
        if state == ("applied" if revert else "applies"):
            problem = self._git(target, *(["--reverse"] if revert else []))
        elif state in ("applied", "applies"):
            problem = f"the series is {'not ' if revert else ''}applied already"
        else:
            problem = state
        if problem:
            raise PatchError(
                f"{target}: {problem}\nNothing was changed. "
                f"The patches are in {self.paths[0].parent}; see how they fit with: arf patch check"
            )

    def _git(self, target: Path, *options: str) -> str:
        """Runs ``git apply`` on a copy of the files and writes back what it changes; returns what it complains of."""
        paths = [str(path.resolve()) for path in (self.paths[::-1] if "--reverse" in options else self.paths)]
        program = shutil.which("git")
        if program is None:
            raise PatchError("git is not installed; it applies the patches.")
        with tempfile.TemporaryDirectory(prefix="arf-patch-") as scratch:
            folder = Path(scratch) / "sources"
            folder.mkdir()

            def git(*arguments: str) -> subprocess.CompletedProcess[str]:
                return subprocess.run(
                    [str(Path(program).absolute()), "apply", *arguments, *paths],
                    cwd=folder,
                    env=_environment(scratch),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                )

            # -z: names as they are, each ended by a zero byte, behind two counts.
            listed = git("--numstat", "-z")
            if listed.returncode:
                return listed.stderr.strip()
            names = sorted({entry.split("\t")[2] for entry in listed.stdout.split("\0") if entry})
            before = {name: content for name in names if (content := _source(target, name)) is not None}
            for name, content in before.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            done = git(*options)
            if done.returncode:
                return done.stderr.strip()
            for name in names if "--check" not in options else ():
                _write_back(folder / name, target / name, before.get(name))
        return ""


def _environment(home: str) -> dict[str, str]:
    """An environment in which git is outside of any repository and has no configuration."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
        "HOME": home,
        # No repository is looked for: where the temporary folder lies in one, its configuration must not count.
        "GIT_DIR": str(Path(home) / "none"),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
    }


def _source(target: Path, name: str) -> bytes | None:
    """Bytes of a source file; None if it is missing. Refuses links: they may lead to some other program's file."""
    path = target
    for part in Path(name).parts:
        path = path / part
        if path.is_symlink():
            raise PatchError(
                f"{path} is a link, expected a folder or file of its own: its target would be changed."
            )
    return _read(path) if path.exists() else None


def _write_back(changed: Path, path: Path, before: bytes | None) -> None:
    """Gives a source file the content that git has left, or removes it."""
    try:
        if not changed.exists():
            path.unlink(missing_ok=True)
        elif (content := changed.read_bytes()) != before:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
                if before is not None:
                    temporary.chmod(stat.S_IMODE(path.stat().st_mode))
    except OSError as cause:
        raise PatchError(
            f"{path} cannot be written: {cause.strerror or cause}. Files before it have been changed; see how it "
            "stands with: arf patch check"
        ) from cause
