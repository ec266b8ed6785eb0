"""``arf anchors``: the whole chain, resumed after kills, on several ranks, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.building import folder_bytes
from support.building_fixtures import Inputs


def command(inputs: Inputs, out: Path, *more: object) -> list[str]:
    words = ["anchors", "--task-data", inputs.task, "--pool", inputs.pool, "--captioner", inputs.captioner,
             "--min-new-tokens", 3, "--max-new-tokens", 6, "--model", inputs.clip, "--k", 3, "--shard-size", 10,
             "--out", out, *more]  # fmt: skip
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from arf_plugin.cli.main import main

    out = tmp_path_factory.mktemp("undisturbed") / "A"
    assert main(command(inputs, out)) == 0
    return out


def test_one_command_builds_a_set_that_check_accepts(arf, inputs: Inputs, undisturbed: Path):
    out, _ = arf("check", undisturbed, "--train-data", inputs.task, "--full", "--json")
    report = json.loads(out)
    assert report["errors"] == report["warnings"] == []
    assert report["coverage"]["covered"] == report["captions"]["rows"] == 21
    assert report["pairs"]["count"] == report["manifest"]["pairs"]["count"] > 10


def test_equal_inputs_give_equal_bytes(arf, inputs: Inputs, undisturbed: Path, tmp_path: Path):
    arf(*command(inputs, tmp_path / "A", "--batch-size", 256))
    assert folder_bytes(tmp_path / "A") == folder_bytes(undisturbed)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_it_ends_with_the_same_bytes(
    inputs: Inputs, undisturbed: Path, tmp_path: Path, kills: int
):
    """SIGKILL at moments of its work, then once to the end."""
    words = [sys.executable, "-m", "arf_plugin.cli.main", *command(inputs, tmp_path / "A")]
    rng = random.Random(0)
    log = (tmp_path / "log").open("w")
    for _ in range(kills):
        process = subprocess.Popen(words, stderr=log, stdout=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        # The first sign of work, and then a random while: starting Python takes most of the time.
        markers = len(list((tmp_path / "A").rglob("done/*.json")))
        while process.poll() is None and len(list((tmp_path / "A").rglob("done/*.json"))) <= markers:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    unfinished = not (tmp_path / "A/work/pack/finished.json").exists()
    assert unfinished, "the kills came too late to show anything"
    subprocess.run(words, check=True, stderr=log, stdout=log)
    assert folder_bytes(tmp_path / "A") == folder_bytes(undisturbed)


@pytest.mark.slow
def test_two_ranks_together_give_the_bytes_of_one(inputs: Inputs, undisturbed: Path, tmp_path: Path):
    words = [sys.executable, "-m", "arf_plugin.cli.main", *command(inputs, tmp_path / "A")]
    log = (tmp_path / "log").open("w")
    ranks = [
        subprocess.Popen(
            words,
            stderr=log,
            stdout=log,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0], (tmp_path / "log").read_text()
    assert folder_bytes(tmp_path / "A") == folder_bytes(undisturbed)


def test_a_dry_run_counts_and_writes_nothing(arf, inputs: Inputs, tmp_path: Path):
    out, _ = arf(*command(inputs, tmp_path / "A", "--dry-run", "--json"))
    plan = json.loads(out)
    assert plan["pool"] == {"tars": 4, "pairs": 48}
    assert [stage["shards"] for stage in plan["stages"]] == [3, 3, 4]
    assert not (tmp_path / "A").exists()
    out, _ = arf(*command(inputs, tmp_path / "A", "--dry-run"))
    assert "stage caption" in out and "48" in out


def test_either_half_alone(arf, inputs: Inputs, tmp_path: Path):
    arf("anchors", "--task-data", inputs.task, "--captioner", inputs.captioner, "--out", tmp_path / "C",
        "--min-new-tokens", 3, "--max-new-tokens", 6)  # fmt: skip
    assert not (tmp_path / "C/pairs").exists()
    arf("anchors", "--task-data", inputs.task, "--pool", inputs.pool, "--model", inputs.clip, "--out", tmp_path / "P",
        "--work", tmp_path / "W")  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "P").iterdir() if path.suffix != ".lock") == [
        "anchors.json",
        "pairs",
    ]
    arf("check", tmp_path / "C", "--train-data", inputs.task)
    arf("check", tmp_path / "P")


def test_a_changed_k_is_refused_and_restarts_from_retrieve(arf, inputs: Inputs, tmp_path: Path):
    pairs_only = ("anchors", "--task-data", inputs.task, "--pool", inputs.pool, "--model", inputs.clip,
                  "--out", tmp_path / "A", "--shard-size", 5)  # fmt: skip
    arf(*pairs_only, "--k", 3)
    before = len(list((tmp_path / "A/pairs").iterdir()))
    _, err = arf(*pairs_only, "--k", 1, status=1)
    assert "selection.k: 3 -> 1" in err
    _, err = arf(*pairs_only, "--k", 1, "--restart", "retrieve")
    assert err.count("embed: nothing left to do") == 2
    assert len(list((tmp_path / "A/pairs").iterdir())) < before, "shards of the earlier run are left"
    arf("check", tmp_path / "A")


def test_refusals(arf, inputs: Inputs, tmp_path: Path):
    def refused(expected: str, *more: object):
        _, err = arf("anchors", "--task-data", inputs.task, "--out", tmp_path / "A", *more, status=1)
        assert expected in err, err

    refused("Nothing to build")
    refused("add --model", "--pool", inputs.pool)
    refused("does not exist", "--pool", tmp_path / "absent.tar", "--model", inputs.clip)
