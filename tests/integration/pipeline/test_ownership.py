"""A folder has one owner: children end with their parent, a second configuration waits, half a set is no set."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.building import folder_bytes
from support.building_fixtures import Inputs, retrieve_pairs

from arf_plugin.anchors.manifest import problems_of


@pytest.fixture
def hits(arf, inputs: Inputs, tmp_path: Path) -> Path:
    """Retrieved pairs, each many times, so that packing them one by one takes long enough to be disturbed."""
    found = retrieve_pairs(arf, inputs, tmp_path, k=48)
    table = pq.read_table(found / "pairs.parquet")
    pq.write_table(pa.concat_tables([table] * 80), found / "pairs.parquet")
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``arf`` in a process of its own, which does not outlive the test."""
    started = []

    def run(*argv: object) -> subprocess.Popen[str]:
        # A test run under nohup or in the background ignores some signals, and its children would inherit that.
        heeding = ("env", "--default-signal=HUP,INT")
        words = [*heeding, sys.executable, "-m", "arf_plugin.cli.main", *map(str, argv)]
        started.append(
            subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True)
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def done(out: Path) -> int:
    folder = out / "work/pack/done"
    return len(list(folder.glob("0*.json"))) if folder.exists() else 0


def children(parent: int) -> list[int]:
    """Processes with this parent, dead ones that wait to be read out left aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except (OSError, ValueError):
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "name",
    ["SIGTERM", "SIGKILL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGHUP", "SIGINT"))],
)
def test_children_end_with_their_parent(arf, start, hits: Path, tmp_path: Path, name: str):
    number, out = signal.Signals[name], tmp_path / "A"
    command = ("pack", "--retrieved", hits, "--out", out, "--shard-size")
    parent = start(*command, 1, "--processes", 2)
    wait_for(lambda: done(out) > 20)
    ranks = children(parent.pid)
    assert len(ranks) == 2
    parent.send_signal(number)
    assert parent.wait(timeout=120) == (130 if name == "SIGINT" else -number)
    wait_for(lambda: not any(map(is_there, ranks)), seconds=60)
    left = folder_bytes(out)
    assert problems_of(str(out)) != [], "what is left is not whole"
    time.sleep(0.5)
    assert folder_bytes(out) == left, "somebody is still at work"
    if name == "SIGKILL":
        arf(*command, 2000, "--restart")
        arf("pack", "--retrieved", hits, "--out", tmp_path / "B", "--shard-size", 2000)
        assert folder_bytes(out) == folder_bytes(tmp_path / "B")


def test_a_child_whose_parent_is_gone_before_it_looks(hits: Path, tmp_path: Path):
    words = ["pack", "--retrieved", str(hits), "--out", str(tmp_path / "A")]
    ended = subprocess.run(
        [sys.executable, "-m", "arf_plugin.cli.processes", *words],
        env=os.environ | {"ARF_LOCAL_PROCESS": "1", "RANK": "0", "WORLD_SIZE": "2"},
        stdin=subprocess.PIPE,
        check=False,
    )
    assert ended.returncode == 1 and not (tmp_path / "A").exists()


def test_two_commands_at_once(arf, start, hits: Path, tmp_path: Path):
    out = tmp_path / "A"
    command = ("pack", "--retrieved", hits, "--out", out, "--shard-size")
    first = start(*command, 1)
    wait_for(lambda: done(out) > 5)
    for more in ((), ("--restart",), ("--restart", "--processes", 2)):
        _, err = arf(*command, 2000, *more, status=1)
        assert "Another arf command is at work in" in err and "Wait for it or stop it" in err
    _, err = arf(*command, 1, "--restart", status=1)
    assert "Another arf command is at work in" in err
    second = start(*command, 1)  # the same configuration: it may help
    time.sleep(0.2)
    assert first.poll() is None and second.poll() is None
    for process in (first, second):
        process.kill()
        process.wait()
    _, err = arf(*command, 2000, status=1)
    assert "shard_size: 1 -> 2000" in err and "--restart" in err
    arf(*command, 2000, "--restart")
    assert sorted(path.name for path in (out / "pairs").iterdir()) == ["000000.tar", "000001.tar"]
    assert problems_of(str(out)) == []


def test_two_bookkeepings_of_one_anchor_set(arf, inputs: Inputs, tmp_path: Path):
    """``--work`` may be elsewhere; the set's folder is still one."""
    command = ("anchors", "--task-data", inputs.task, "--pool", inputs.pool, "--model", inputs.clip, "--k", 2,
               "--no-features", "--out", tmp_path / "A")  # fmt: skip
    arf(*command, "--work", tmp_path / "V", "--shard-size", 5)
    arf(*command, "--work", tmp_path / "W", "--shard-size", 50)
    problems = problems_of(str(tmp_path / "A"))
    assert len(problems) == 1 and "files that are no part of what was built: 000001.tar" in problems[0]
    _, err = arf(*command, "--work", tmp_path / "V", "--shard-size", 5, status=1)
    assert "was written by another command since" in err and "--restart" in err
    arf(*command, "--work", tmp_path / "V", "--shard-size", 5, "--restart", "pack")
    assert problems_of(str(tmp_path / "A")) == []


def test_a_pack_killed_after_its_first_shard_is_not_whole(arf, start, hits: Path, tmp_path: Path):
    out = tmp_path / "A"
    command = ("pack", "--retrieved", hits, "--out", out, "--shard-size", 40)
    process = start(*command)
    wait_for(lambda: done(out) >= 1)
    process.kill()
    process.wait()
    count = len(list((out / "pairs").glob("0*.tar")))
    assert 0 < count < 96
    assert problems_of(str(out)) == [
        f"The set's pairs are not finished ({count} files so far). Run the same arf command (pack, or anchors) again, "
        "to its end."
    ]
    arf(*command)
    assert problems_of(str(out)) == []

    def copy() -> Path:
        shutil.rmtree(tmp_path / "C", ignore_errors=True)
        return Path(shutil.copytree(out, tmp_path / "C"))

    (copy() / "pairs/000003.tar").unlink()
    assert "lacks 1 of the 96 files that were written: 000003.tar" in problems_of(str(tmp_path / "C"))[0]
    with (copy() / "pairs/000003.tar").open("ab") as file:
        file.write(bytes(10240))
    assert "000003.tar has" in problems_of(str(tmp_path / "C"))[0]
    shutil.copy(copy() / "pairs/000003.tar", tmp_path / "C/pairs/mine.tar")
    assert "no part of what was built: mine.tar" in problems_of(str(tmp_path / "C"))[0]
    (tmp_path / "C/pairs/mine.tar").rename(tmp_path / "C/pairs/.incomplete-1-x.tar")
    assert problems_of(str(tmp_path / "C")) == []
    (tmp_path / "C/anchors.json").unlink()
    (tmp_path / "C/pairs/000003.tar").unlink()
    assert problems_of(str(tmp_path / "C")) == [], "without a manifest it is a set made by hand"


def test_captions_that_are_not_whole_are_no_queries(arf, inputs: Inputs, tmp_path: Path):
    from arf_plugin.anchors.manifest import begin_kind

    captioner = ("--captioner", inputs.captioner, "--min-new-tokens", 3, "--max-new-tokens", 6)
    arf("caption", "--task-data", inputs.task, *captioner, "--out", tmp_path / "A")
    begin_kind(tmp_path / "A", "captions")
    _, err = arf(
        "embed", "--captions", tmp_path / "A", "--model", inputs.clip, "--out", tmp_path / "E", status=1
    )
    assert "captions are not finished (3 files so far)" in err


def test_inputs_are_told_apart_by_content(arf, inputs: Inputs, tmp_path: Path):
    shutil.copytree(Path(inputs.task).parent, tmp_path / "task")
    victim = tmp_path / "task/001.tar"
    command = ("embed", "--task-data", f"{tmp_path}/task/{{000..002}}.tar", "--model", inputs.clip,
               "--out", tmp_path / "E")  # fmt: skip
    arf(*command)
    os.utime(victim)
    _, err = arf(*command)
    assert "nothing left to do" in err
    other = (tmp_path / "task/002.tar").read_bytes()
    victim.write_bytes(other)
    _, err = arf(*command, status=1)
    assert f"the content of {victim}" in err and "--restart" in err
    arf(*command, "--restart")


def test_a_file_beside_a_model_folder_is_what_embeds(arf, inputs: Inputs, tmp_path: Path):
    """open_clip passes over --pretrained there, and a folder without weights gave vectors of a random model."""
    folder = Path(inputs.clip.removeprefix("local-dir:"))
    weights = folder / "open_clip_model.safetensors"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "open_clip_config.json", bare)
    command = ("embed", "--task-data", inputs.task, "--model", f"local-dir:{bare}", "--out")
    _, err = arf(*command, tmp_path / "N", status=1)
    assert "has no weights" in err
    arf(*command, tmp_path / "F", "--pretrained", weights)
    arf("embed", "--task-data", inputs.task, "--model", inputs.clip, "--out", tmp_path / "E")
    assert folder_bytes(tmp_path / "F/img_emb") == folder_bytes(tmp_path / "E/img_emb")
    _, err = arf(*command, tmp_path / "F", status=1)
    assert "holds work of stage embed with another configuration" in err


def test_a_table_whose_images_were_all_replaced(arf, inputs: Inputs, tmp_path: Path):
    """The table itself is as it was, and so are the images' names, sizes and times."""
    images = [tmp_path / f"{i}.bmp" for i in range(4)]
    for i, path in enumerate(images):
        Image.new("RGB", (40, 40), (50 * i, 0, 0)).save(path)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    table = tmp_path / "train.tsv"
    table.write_text("\n".join(["filepath\ttitle", *(f"{path}\tt" for path in images)]) + "\n")
    captioner = ("--captioner", inputs.captioner, "--min-new-tokens", 3, "--max-new-tokens", 6)
    commands = [
        ("embed", "--task-data", table, "--model", inputs.clip, "--out", tmp_path / "E"),
        ("caption", "--task-data", table, *captioner, "--out", tmp_path / "A"),
    ]
    for command in commands:
        arf(*command)
    for path in images:
        os.utime(path, (1_100_000_000, 1_100_000_000))
    for command in commands:
        assert "nothing left to do" in arf(*command)[1]
    for i, path in enumerate(images):
        Image.new("RGB", (40, 40), (0, 0, 50 * i)).save(path)
        os.utime(path, (1_100_000_000, 1_100_000_000))
    for command in commands:
        _, err = arf(*command, status=1)
        assert "another configuration or other inputs" in err and "nothing left to do" not in err
        arf(*command, "--restart")
