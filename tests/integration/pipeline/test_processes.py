"""``--processes N``: the bytes of one process, and what happens when one of several fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.building import drawing, folder_bytes
from support.building_fixtures import Inputs, retrieve_pairs
from support.tars import write_tar


@pytest.fixture
def hits(arf, inputs: Inputs, tmp_path: Path) -> Path:
    """Retrieved pairs from a pool that the test may change; packing is the stage that starts fastest."""
    return retrieve_pairs(arf, inputs, tmp_path, k=48)


def test_three_processes_give_the_bytes_of_one(arf, hits: Path, tmp_path: Path):
    command = ("pack", "--retrieved", hits, "--shard-size", 10, "--json", "--out")
    arf(*command, tmp_path / "one")
    out, err = arf(*command, tmp_path / "three", "--processes", 3)
    summary = json.loads(out)
    assert summary["finished"] and (summary["shards"], summary["pairs"]) == (5, 48)
    for line in ("[0] pack: 20 of 20 pairs", "[1] pack: 18 of 18 pairs", "[2] pack: 10 of 10 pairs"):
        assert line in err, "every process has its own shards"
    assert folder_bytes(tmp_path / "three") == folder_bytes(tmp_path / "one")


def test_a_failure_is_told_the_others_go_on_and_restart_starts_over(arf, hits: Path, tmp_path: Path):
    tar = tmp_path / "pool/pool-03.tar"
    whole = tmp_path / "whole.tar"
    shutil.copy2(tar, whole)
    write_tar(tar, [("other.jpg", drawing(0))])
    command = ("pack", "--retrieved", hits, "--shard-size", 24, "--out", tmp_path / "A", "--processes", 2)
    _, err = arf(*command, status=1)
    assert "1 of 2 processes failed (1, exit status 1)" in err
    assert "[1] arf pack: error:" in err and "pool-03.tar does not hold the image" in err
    kept = sorted(path.name for path in (tmp_path / "A/pairs").iterdir())
    assert kept == ["000000.tar"], "what is finished is kept"
    shutil.copy2(whole, tar)
    (tmp_path / "A/pairs/000000.tar").write_bytes(b"spoilt")
    arf(*command, "--restart")
    assert len((tmp_path / "A/pairs/000000.tar").read_bytes()) > 10_000


def test_ranks_of_torchrun_do_not_start_processes(
    arf, hits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, err = arf("pack", "--retrieved", hits, "--out", tmp_path / "A", "--processes", 2, status=1)
    assert "shares the work already (rank 0 of 2)" in err
