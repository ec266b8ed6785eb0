"""Step checkpoints as files: whole or not at all, in the right place among open_clip's, and what they remember."""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal

import numpy as np
import pytest
import torch

from arf_plugin.errors import CheckpointError
from arf_plugin.resume.checkpoint import (
    check_format,
    describe,
    file_name,
    is_truncated,
    remove_finished,
    remove_others,
    resume_point,
    write,
)
from arf_plugin.resume.rng import preserved_rng, restore_rng, rng_state, seed_everything


def draws() -> list[float]:
    return [torch.rand(()).item(), float(np.random.standard_normal()), random.gauss(0, 1)]


def test_random_numbers_go_on_after_a_file(tmp_path):
    seed_everything("a", 1)
    draws()  # both normal generators now hold a second value back
    write({"rng": rng_state()}, tmp_path / "a.pt")
    expected = draws()
    with preserved_rng():
        seed_everything("something else")
        draws()
    restore_rng(torch.load(tmp_path / "a.pt", weights_only=True)["rng"])
    assert draws() == expected


def test_preserved_random_numbers_do_not_notice():
    seed_everything("a", 2)
    expected = draws()
    seed_everything("a", 2)
    with preserved_rng():
        draws()
    assert draws() == expected


def test_open_clip_finds_the_newest(tmp_path):
    from open_clip_train.main import get_latest_checkpoint

    names = [
        "epoch_1.pt",
        file_name(1, 9),
        file_name(1, 10),
        "epoch_2.pt",
        file_name(2, 12),
        file_name(10, 30),
    ]
    for name in names:
        (tmp_path / name).touch()
        assert get_latest_checkpoint(f"{tmp_path}/", remote=False) == str(tmp_path / name)


def test_what_is_superseded_goes(tmp_path):
    for name in ("epoch_1.pt", file_name(0, 3), file_name(1, 9), file_name(1, 10), "epoch_1_step_mine.pt"):
        (tmp_path / name).touch()
    remove_finished(tmp_path, 1)
    assert not (tmp_path / file_name(0, 3)).exists() and (tmp_path / file_name(1, 9)).exists()
    remove_finished(tmp_path, 2)  # there is no epoch_2.pt
    remove_others(tmp_path / file_name(1, 10))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"epoch_1.pt", file_name(1, 10), "epoch_1_step_mine.pt"}


def _write_with_little_room(path, connection):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write({"weights": torch.zeros(100_000)}, path)
    except CheckpointError as error:
        connection.send(str(error))
    else:
        connection.send("written")


def test_no_room(tmp_path):
    """The file before stays, and nothing half written."""
    path = tmp_path / "epoch_latest.pt"
    write({"weights": torch.ones(3)}, path)
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_write_with_little_room, args=(path, theirs))
    process.start()
    said = mine.recv()
    process.join()
    assert "cannot be written" in said and "--resume latest" in said
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert torch.load(path, weights_only=True)["weights"].tolist() == [1, 1, 1]


def test_truncated(tmp_path):
    whole, truncated, empty = (tmp_path / name for name in ("whole.pt", "truncated.pt", "empty.pt"))
    write({"weights": torch.ones(1000)}, whole)
    truncated.write_bytes(whole.read_bytes()[:-100])
    empty.touch()
    legacy = tmp_path / "legacy.pt"
    torch.save({"weights": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    assert [is_truncated(str(path)) for path in (whole, truncated, empty, legacy)] == [
        False,
        True,
        True,
        False,
    ]


def saved(processes=("state of 0", "state of 1")):
    return describe(epoch=2, step=30, batches=6, num_batches=12, data={"seed": 0}, processes=list(processes))


@pytest.mark.parametrize(
    ("num_batches", "accum", "expected"), [(12, 1, 6), (24, 1, 12), (7, 1, 3), (7, 2, 2)]
)
def test_another_shape_goes_on_after_the_same_share(num_batches, accum, expected):
    point = resume_point(
        saved(), data={"seed": 1}, num_batches=num_batches, accum_freq=accum, rank=0, deterministic=False
    )
    assert (point.epoch, point.batches, point.process) == (2, expected, None)


def test_each_process_gets_its_own_state():
    same = {"data": {"seed": 0}, "num_batches": 12, "accum_freq": 1, "deterministic": True}
    assert [resume_point(saved(), rank=rank, **same).process for rank in (0, 1)] == [
        "state of 0",
        "state of 1",
    ]


def test_what_cannot_be_exact_is_refused():
    same = {"data": {"seed": 0}, "num_batches": 12, "accum_freq": 1, "rank": 0, "deterministic": True}
    with pytest.raises(CheckpointError, match="batches in an epoch: 12 then, 13 now"):
        resume_point(saved(), **{**same, "num_batches": 13})
    with pytest.raises(CheckpointError, match="saved without --arf-deterministic"):
        resume_point({**saved(), "processes": None}, **same)
    with pytest.raises(CheckpointError, match="another format"):
        check_format({"format": 99}, "x.pt")


def process(workers: int = 1) -> dict:
    return {"rng": rng_state(), "streams": {"task": [3] * workers}}


def whole() -> dict:
    return describe(epoch=2, step=30, batches=6, num_batches=12, data={"seed": 0}, processes=[process()])


def test_what_was_saved_passes(tmp_path):
    write({"arf": whole()}, tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)["arf"]
    before = draws()
    assert check_format(found, "a.pt") is found
    seed_everything("a", 3)
    expected = draws()
    seed_everything("a", 3)
    check_format(found, "a.pt")  # which sets the random numbers, and puts them back
    assert draws() == expected != before


def damage(path: tuple, value: object) -> dict:
    """A step checkpoint with one part replaced."""
    content: dict = whole()
    *inner, last = path
    place = content
    for name in inner:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


RNG = ("processes", 0, "rng")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("epoch",), None), (("step",), None), (("batches",), None), (("num_batches",), None), (("data",), None),
        (("processes",), None), (("epoch",), 1e30), (("epoch",), -1), (("epoch",), 10**40), (("epoch",), True),
        (("step",), "3"), (("batches",), -6), (("batches",), 13), (("batches",), torch.zeros(1)),
        (("num_batches",), 0), (("data",), []), (("data",), {"seed": torch.zeros(2)}), (("data",), {3: 4}),
        (("processes",), {"0": 1}), (("processes", 0), 7), (RNG, None), (RNG, []), (("processes", 0, "streams"), None),
        (("processes", 0, "streams", "task"), 3), (("processes", 0, "streams", "task"), [-1]),
        (("processes", 0, "streams", "task"), [1.5]), (("processes", 0, "streams", 4), [1]),
        ((*RNG, "torch"), None), ((*RNG, "torch"), torch.zeros(3)), ((*RNG, "torch"), torch.zeros(3).byte()),
        ((*RNG, "numpy"), None), ((*RNG, "numpy"), []), ((*RNG, "numpy", 0), torch.zeros(3, dtype=torch.int64)),
        ((*RNG, "numpy", 0), torch.full((624,), -1)), ((*RNG, "numpy", 1), 10**6), ((*RNG, "numpy", 1), -5),
        ((*RNG, "numpy", 2), 7), ((*RNG, "numpy", 3), "x"), ((*RNG, "cuda"), None), ((*RNG, "cuda"), [torch.zeros(2)]),
        ((*RNG, "python"), None), ((*RNG, "python", 0), 99), ((*RNG, "python", 1), torch.zeros(2, dtype=torch.int64)),
        ((*RNG, "python", 1), torch.full((625,), -1)), ((*RNG, "python", 2), "x"),
    ],
)  # fmt: skip
def test_damaged_fields_are_named(path, value):
    before = rng_state()
    with pytest.raises(CheckpointError) as error:
        check_format(damage(path, value), "logs/x.pt")
    assert "logs/x.pt" in str(error.value) and "--resume" in str(error.value)
    assert len(str(error.value)) < 500
    after = rng_state()
    assert torch.equal(before["torch"], after["torch"]) and before["python"][2] == after["python"][2]


def test_states_of_other_processes_and_workers():
    same = {"data": {"seed": 0}, "num_batches": 12, "accum_freq": 1, "deterministic": True}
    with pytest.raises(CheckpointError, match="has the state of 1 processes, and this is number 1"):
        resume_point(whole(), rank=1, **same)
    with pytest.raises(CheckpointError, match="has nothing for the stream 'pairs', expected 2"):
        resume_point(whole(), rank=0, streams={"task": 1, "pairs": 2}, **same)
    with pytest.raises(CheckpointError, match="has 1 counts for the stream 'task', expected 2"):
        resume_point(whole(), rank=0, streams={"task": 2}, **same)


def test_only_what_we_named_is_removed(tmp_path):
    ours = [file_name(0, 3), file_name(1, 10)]
    others = ["epoch_0_step_03.pt", "epoch_00_step_3.pt", "epoch_0_step_٣.pt", "epoch_0_step_3.pt.bak"]
    for name in [*ours, *others]:
        (tmp_path / name).touch()
    (tmp_path / file_name(0, 7)).mkdir()
    (tmp_path / "epoch_5.pt").touch()
    remove_others(tmp_path / file_name(1, 11))
    remove_finished(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == {*others, file_name(0, 7), "epoch_5.pt"}


def test_a_name_that_can_be_guessed_is_not_written_to(tmp_path):
    """A link where an earlier release wrote its temporary file leads nowhere."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "a.pt.partial").symlink_to(tmp_path / "victim")
    write({"weights": torch.ones(2)}, tmp_path / "a.pt")
    assert (tmp_path / "victim").read_text() == "mine"


def test_left_overs_of_dead_processes_go(tmp_path):
    import os
    import socket
    import subprocess

    host = socket.gethostname()
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            living = tmp_path / f".incomplete-{other.pid}@{host}@aa@epoch_1.pt"
            dead = tmp_path / f".incomplete-4194305@{host}@bb@epoch_1.pt"
            own = (
                tmp_path / f".incomplete-{os.getpid()}@{host}@cc@epoch_1_step_2.pt"
            )  # of a container's last life
            for path in (living, dead, own):
                path.touch()
            write({"weights": torch.ones(2)}, tmp_path / "a.pt")
            assert {path.name for path in tmp_path.iterdir()} == {living.name, "a.pt"}
        finally:
            other.kill()


def test_a_folder_that_has_gone(tmp_path):
    """It is made again; where that cannot be, the path is named."""
    write({"weights": torch.ones(2)}, tmp_path / "gone" / "a.pt")
    assert (tmp_path / "gone" / "a.pt").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/a\.pt cannot be written"):
        write({"weights": torch.ones(2)}, tmp_path / "file" / "a.pt")


@pytest.mark.parametrize("name", ["lr=[1e-5]", "run[1]", "what?", "a*b", "[!x]"])
def test_the_newest_below_a_folder_whose_name_looks_like_a_pattern(tmp_path, name):
    from open_clip_train.main import get_latest_checkpoint as stock

    from arf_plugin.hooks.resume import get_latest_checkpoint

    folder, neighbour = tmp_path / name / "run" / "checkpoints", tmp_path / "run1" / "run" / "checkpoints"
    for place, names in ((folder, ["epoch_1.pt", file_name(1, 9)]), (neighbour, ["epoch_7.pt"])):
        place.mkdir(parents=True)
        for each in names:
            torch.save({}, place / each)
    find = get_latest_checkpoint(stock, None)
    assert find(str(folder), False) == str(folder / file_name(1, 9))
    (folder / file_name(2, 19)).write_bytes(b"PK\3\4 cut off")
    assert find(str(folder), False) == str(folder / file_name(1, 9))
    assert (folder / f"{file_name(2, 19)}.truncated").is_file()
    assert find(str(tmp_path / "nothing[1]" / "checkpoints"), False) is None
