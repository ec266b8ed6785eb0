"""The quickstart's smoke run, from the npm packages to the table. Needs the npm registry; about 3 minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.resuming import equal

ROOT = Path(__file__).parents[3]
METRICS = {"id", "shift", "mono", "zero_shot", "zero_shot_fine"}


def quickstart(*argv: object) -> str:
    command = [sys.executable, ROOT / "scripts" / "emojinet" / "quickstart.py", "--fast", *argv]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_fast_quickstart_ends_with_the_table_and_starts_again_where_it_was_and_is_the_same_every_time(
    tmp_path,
):
    options = ("--data", tmp_path / "data", "--out", tmp_path / "out")
    printed = quickstart(*options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["seeds"] == [0]
    assert set(results["arms"]) == {"before", "flyp", "arf", "flyp+wise", "arf+wise"}
    assert all(set(scores) == METRICS for scores in results["arms"].values())
    assert results["arms"]["flyp"] != results["arms"]["before"] != results["arms"]["arf"]
    assert sum(results["samples"].values()) > 2000
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000
    assert "FLYP + WiSE-FT" in printed

    assert (tmp_path / "out" / "fit" / "report" / "index.html").is_file()

    def weights(run):
        found = [run / "pretraining" / "weights.pt", *(run / "fit").glob("runs/*/checkpoints/epoch_2.pt")]
        return {str(path.relative_to(run)): path for path in found}

    again = ("--data", tmp_path / "data", "--out", tmp_path / "again")
    quickstart(*again)
    first, second = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert first.keys() == second.keys() and len(first) == 3
    for name, path in first.items():
        one, other = (torch.load(p, weights_only=True) for p in (path, second[name]))
        assert equal(one["state_dict"], other["state_dict"]), f"two runs of {name} differ"

    before = {path: path.stat().st_mtime_ns for path in first.values()}
    assert printed.splitlines()[-9:] == quickstart(*options).splitlines()[-9:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
