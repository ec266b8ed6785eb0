"""Where open_clip's own tests come from: the source archive of a release on PyPI, or a commit in git."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from arf_plugin.hooks.releases import PACKAGE, REPOSITORY, Release


def fetch_tests(release: Release, git: str | None, folder: Path) -> str:
    """Puts a release's ``tests/`` and the settings of pytest beside them into a folder of their own.

    Args:
        release: The release.
        git: A local git directory or clone of open_clip's; None for GitHub. Only unreleased code needs it.
        folder: The folder, which is emptied first. Nothing of the release's code gets there.

    Returns:
        What they were taken from.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return _from_git(release.commit, git, folder) if release.commit else _from_pypi(release, folder)


def _from_pypi(release: Release, folder: Path) -> str:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-binary", PACKAGE, "-d", folder, release.requirement], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    for name in ("tests", "pyproject.toml"):
        (unpacked / name).rename(folder / name)
    shutil.rmtree(unpacked)
    return archive.name


def _from_git(commit: str, git: str | None, folder: Path) -> str:
    if git is None:
        git = str(folder / "git")
        subprocess.run(["git", "init", "-q", "--bare", git], check=True)
        origin = REPOSITORY.removeprefix("git+")
        subprocess.run(["git", "-C", git, "fetch", "-q", "--depth", "1", origin, commit], check=True)
    archive = ["git", "-C", git, "archive", "--prefix=tests/", f"{commit}:tests"]
    subprocess.run(
        ["tar", "x", "-C", folder],
        input=subprocess.run(archive, check=True, stdout=subprocess.PIPE).stdout,
        check=True,
    )
    settings = subprocess.check_output(["git", "-C", git, "show", f"{commit}:pyproject.toml"])
    (folder / "pyproject.toml").write_bytes(settings)
    return f"commit {commit[:8]}"
