"""Fresh virtual environments that share this one's libraries."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARIES = [path for path in sys.path if Path(path).name == "site-packages"]


def make_environment(folder: Path) -> Path:
    """A fresh virtual environment that sees this one's libraries, but runs none of its start-up files."""
    venv.create(folder, with_pip=False)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "libraries.pth").write_text("".join(f"{path}\n" for path in LIBRARIES))
    return folder / "bin" / "python"


def copy_project(folder: Path) -> Path:
    """A copy of the project in a new folder, so that building it leaves the checkout alone."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("arf_plugin", "patches"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def pip(python: Path, *argv: str) -> None:
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", str(python)),
        *argv,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
