"""Tests that depend on open_clip's release, on every release of arf_plugin/hooks/releases.py.

    nox                              all of them, one after another
    nox -s releases-VERSION          one; nox --list shows them
    nox -s releases-VERSION -- -k accumulation

Sessions share the environment that scripts/test.sh makes; each puts its release in front of the environment's own.
scripts/test.sh itself runs all tests on the newest release from PyPI, and the command line on one more.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYTHON = ROOT / ".venv" / "bin" / "python"
LIST = runpy.run_path(str(ROOT / "arf_plugin" / "hooks" / "releases.py"))
TESTS = (
    "tests/hooks/test_table.py",
    "tests/hooks/test_activation.py",
    "tests/integration/test_trainer.py",
    "tests/integration/test_create_task.py",
    "tests/integration/test_step_equals_three_forwards.py",
    "tests/integration/test_baseline_l2sp.py",
    "tests/integration/test_baseline_lpft.py",
    "tests/integration/test_baseline_distillation.py",
    "tests/integration/test_baseline_mixing.py",
)


@nox.session(venv_backend="none", name="releases")
@nox.parametrize("release", [nox.param(release, id=release.version) for release in LIST["RELEASES"]])
def releases(session: nox.Session, release: object) -> None:
    """Runs them on one release."""
    version = release.version  # type: ignore[attr-defined]
    session.run(str(PYTHON), "scripts/versions/install.py", version, external=True)
    folder = ROOT / ".venvs" / f"{LIST['PACKAGE']}-{version}"
    env = {
        "PYTHONPATH": str(folder) if folder.is_dir() else "",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    jobs = ("-n", os.environ.get("JOBS", "2"), "--dist", "loadscope")
    session.run(
        str(PYTHON), "-m", "pytest", *jobs, "-m", "not slow", *TESTS, *session.posargs, env=env, external=True
    )
