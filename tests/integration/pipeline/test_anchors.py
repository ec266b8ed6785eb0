"""``arf anchors``: the whole chain, resumed after kills, on several ranks, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
from support.building import drawing, folder_bytes
from support.building_fixtures import Inputs

from arf_plugin.anchors.task import expand_urls


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
    assert report["features"]["captions"] == 21 and report["features"]["pairs"] == report["pairs"]["count"]


def test_features_are_those_of_the_commands_of_their_own_and_follow_a_change(
    arf, inputs: Inputs, tmp_path: Path, undisturbed: Path
):
    out = tmp_path / "A"
    arf(*command(inputs, out, "--no-features"))
    assert not (out / "features").exists()
    arf("features", out, "--model", inputs.clip)
    assert folder_bytes(out / "features") == folder_bytes(undisturbed / "features")
    _, err = arf(*command(inputs, out, "--shard-size", 5, "--restart", "pack"))
    assert "features: " in err and "nothing left to do in" in err
    report = json.loads(arf("check", out, "--train-data", inputs.task, "--full", "--json")[0])
    assert report["errors"] == report["warnings"] == []


def test_equal_inputs_give_equal_bytes(arf, inputs: Inputs, undisturbed: Path, tmp_path: Path):
    arf(*command(inputs, tmp_path / "A", "--batch-size", 256))
    assert folder_bytes(tmp_path / "A") == folder_bytes(undisturbed)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_every_stage_killed_at_random_ends_with_the_same_bytes(inputs: Inputs, tmp_path: Path, kills: int):
    def stages(out: Path) -> list[list[str]]:
        model = ["--model", inputs.clip]
        caption = ["--captioner", inputs.captioner, "--min-new-tokens", "3", "--max-new-tokens", "6"]
        words = [
            ["caption", "--task-data", inputs.task, *caption, "--out", out / "A"],
            ["embed", "--task-data", inputs.task, *model, "--out", out / "task"],
            ["embed", "--pool", inputs.pool, *model, "--out", out / "pool"],
            [
                *("retrieve", "--queries", out / "task", "--pool", out / "pool", "--k", "3"),
                *("--out", out / "hits"),
            ],
            ["pack", "--retrieved", out / "hits", "--shard-size", "5", "--out", out / "A"],
            ["features", out / "A", *model],
        ]
        return [[str(word) for word in stage] for stage in words]

    runs = [(0, argv) for argv in stages(tmp_path / "whole")] + [
        (kills, argv) for argv in stages(tmp_path / "killed")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "support.kill_and_resume", "0"],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    landed = json.loads(done.stdout)
    assert sum(landed) >= 2 * kills, f"too few kills landed to show anything: {landed}"
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


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
    assert plan["pool"] == {"tars": 4, "pairs": 48} and plan["pairs_at_most"] == 48
    assert [stage["samples"] for stage in plan["stages"]] == [21, 21, 48, 69]
    assert [stage["shards"] for stage in plan["stages"][:-1]] == [3, 3, 4]
    assert not (tmp_path / "A").exists()
    table = arf(*command(inputs, tmp_path / "A", "--dry-run"))[0].splitlines()
    (line,) = (words for words in map(str.split, table) if words[:1] == ["caption"])
    assert line[:4] == ["caption", "3", "0", "21"] and line[-1] == str(tmp_path / "A")


def test_a_dry_run_estimates_what_a_stage_takes(arf, inputs: Inputs, undisturbed: Path, tmp_path: Path):
    plan = json.loads(arf(*command(inputs, tmp_path / "A", "--dry-run", "--json"))[0])
    caption, task, pool, _ = plan["stages"]
    assert all(0 < stage["seconds"] < 600 and stage["memory"] > 1e8 for stage in (caption, task, pool))
    work = undisturbed / "work"
    for stage, folder in ((task, work / "task"), (pool, work / "pool")):
        taken = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".npy", ".parquet"))
        assert 0.2 * taken < stage["disk"] < 5 * taken
    search = (
        "retrieve",
        "--queries",
        work / "task",
        "--pool",
        work / "pool",
        "--out",
        tmp_path / "H",
        "--dry-run",
    )
    found = json.loads(arf(*search, "--json")[0])
    assert found["seconds"] > 0 and found["disk"] > 0 and not (tmp_path / "H").exists()
    said, _ = arf(*search)
    assert "memory" in said and "00:0" in said


def test_either_half_alone(arf, inputs: Inputs, tmp_path: Path):
    arf("anchors", "--task-data", inputs.task, "--captioner", inputs.captioner, "--out", tmp_path / "C",
        "--min-new-tokens", 3, "--max-new-tokens", 6)  # fmt: skip
    assert not (tmp_path / "C/pairs").exists()
    arf("anchors", "--task-data", inputs.task, "--pool", inputs.pool, "--model", inputs.clip, "--out", tmp_path / "P",
        "--work", tmp_path / "W")  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "P").iterdir() if path.suffix != ".lock") == [
        "anchors.json",
        "features",
        "pairs",
    ]
    assert not (tmp_path / "C/features").exists(), "no model is known"
    arf("check", tmp_path / "C", "--train-data", inputs.task)
    arf("check", tmp_path / "P")


def test_a_csv_as_task_data(arf, inputs: Inputs, tmp_path: Path):
    paths = []
    for i in range(9):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(drawing(i, "PNG"))
        paths.append(str(path))
    csv = tmp_path / "train.tsv"
    csv.write_text("\n".join(["filepath\ttitle", *(f"{path}\tt" for path in paths)]) + "\n")
    arf("anchors", "--task-data", csv, "--captioner", inputs.captioner, "--min-new-tokens", 3, "--pool", inputs.pool,
        "--model", inputs.clip, "--k", 2, "--out", tmp_path / "A")  # fmt: skip
    out, _ = arf("check", tmp_path / "A", "--train-data", csv, "--json")
    assert json.loads(out)["coverage"]["covered"] == 9
    with tarfile.open(tmp_path / "A/pairs/000000.tar") as tar:
        member = tar.extractfile("000000000.json")
        assert member is not None
        assert set(json.loads(member.read())["queries"]) <= set(paths)


def test_pools_behind_urls_and_commands(arf, inputs: Inputs, undisturbed: Path, tmp_path: Path):
    """fsspec's memory file system stands for s3 and the like; commands are read from front to back."""
    local = expand_urls(inputs.pool)
    memory = fsspec.filesystem("memory")
    for path in local:
        memory.pipe(f"/pool/{Path(path).name}", Path(path).read_bytes())
    remote = "memory://pool/pool-{00..03}.tar"
    piped = "::".join(f"pipe:cat {path}" for path in local)
    for name, pool in (("remote", remote), ("piped", piped)):
        out = tmp_path / name
        arf("anchors", "--task-data", inputs.task, "--pool", pool, "--model", inputs.clip, "--k", 3,
            "--shard-size", 10, "--out", out)  # fmt: skip
        assert folder_bytes(out / "pairs") == folder_bytes(undisturbed / "pairs")


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


def test_a_search_that_cannot_work_is_refused_before_anything_is_built(arf, inputs: Inputs, tmp_path: Path):
    """Captions and embeddings may take days; what only the search needs is looked at first."""
    words = command(inputs, tmp_path / "A")
    nobody = ("--backend", "service", "--service-url", "http://127.0.0.1:9", "--service-patience", 0.1)
    _, err = arf(*words, *nobody, status=1)
    assert "127.0.0.1:9" in err
    (tmp_path / "image.index").write_bytes(b"not an index")
    _, err = arf(*words, "--backend", "faiss", "--index", tmp_path, status=1)
    assert "image.index is not a faiss index" in err
    assert not (tmp_path / "A").exists()


def test_refusals(arf, inputs: Inputs, tmp_path: Path):
    def refused(expected: str, *more: object):
        _, err = arf("anchors", "--task-data", inputs.task, "--out", tmp_path / "A", *more, status=1)
        assert expected in err, err

    refused("Nothing to build")
    refused("add --model", "--pool", inputs.pool)
    refused("does not exist", "--pool", tmp_path / "absent.tar", "--model", inputs.clip)
