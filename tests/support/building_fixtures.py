"""Fixtures of anchor building; the models are made once per test run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import building


@dataclass(frozen=True)
class Inputs:
    """Paths and names of the inputs of anchor building."""

    task: str
    pool: str
    clip: str
    captioner: str


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Task data (3 tars, 21 images), a pool (4 tars, 48 pairs), a tiny CLIP and a tiny captioner."""
    folder = tmp_path_factory.mktemp("building")
    return Inputs(
        task=building.write_task(folder / "task"),
        pool=building.write_pool(folder / "pool"),
        clip=building.save_tiny_clip(folder / "clip"),
        captioner=building.save_tiny_captioner(folder / "captioner"),
    )


@pytest.fixture
def arf(capsys: pytest.CaptureFixture[str]):
    """Runs ``arf`` in this process; returns exit status, standard output and standard error."""
    from arf_plugin.cli.main import main

    def run(*argv: object, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        found = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert found == status, f"exit status {found}, expected {status}\n{out}{err}"
        return out, err

    return run


def retrieve_pairs(arf: Callable[..., object], inputs: Inputs, folder: Path, k: int) -> Path:
    """Retrieves pairs from a pool of the test's own, which it may change: FOLDER/pool.

    Returns:
        The folder of hits and pairs, FOLDER/H.
    """
    pool = building.write_pool(folder / "pool")
    for flag, data, name in (("--task-data", inputs.task, "task"), ("--pool", pool, "pool")):
        arf("embed", flag, data, "--model", inputs.clip, "--out", folder / "E" / name)
    out = folder / "H"
    arf("retrieve", "--queries", folder / "E/task", "--pool", folder / "E/pool", "--k", k, "--out", out)
    return out
