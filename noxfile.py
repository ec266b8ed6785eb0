"""Tests that depend on open_clip's release, on every release of arf_plugin/hooks/releases.py.

    nox                              all of them, one after another
    nox -s open_clip-VERSION          one; nox --list shows them
    nox -s open_clip-VERSION -- -k accumulation

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
    "tests/unit/hooks/test_table.py",
    "tests/integration/hooks/test_activation.py",
    "tests/integration/hooks/test_trainer.py",
    "tests/integration/resume/test_resume.py",
    "tests/integration/hooks/test_watch.py",
    "tests/integration/hooks/test_create_task.py",
    "tests/integration/losses/test_step_equals_three_forwards.py",
    "tests/integration/losses/test_feature_anchors.py",
    "tests/integration/losses/test_baseline_l2sp.py",
    "tests/integration/losses/test_baseline_lpft.py",
    "tests/integration/losses/test_baseline_distillation.py",
    "tests/integration/losses/test_baseline_mixing.py",
)


def define(version: str) -> None:
    """Makes the session of one release."""

    @nox.session(venv_backend="none", name=f"open_clip-{version}")
    def run(session: nox.Session) -> None:
        session.run(str(PYTHON), "scripts/versions/install.py", version, external=True)
        folder = ROOT / ".venvs" / f"{LIST['PACKAGE']}-{version}"
        env = {
            "PYTHONPATH": str(folder) if folder.is_dir() else "",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        pytest = (str(PYTHON), "-m", "pytest", "-n", os.environ.get("JOBS", "2"), "--dist", "loadscope")
        session.run(*pytest, "-m", "not slow", *TESTS, *session.posargs, env=env, external=True)


for release in LIST["RELEASES"]:
    define(release.version)
