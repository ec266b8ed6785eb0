"""Step checkpoints as files: whole or not at all, in the right place among open_clip's, and what they remember."""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal

import numpy as np
import pytest
import torch

from arf_plugin.data.rng import preserved_rng, restore_rng, rng_state, seed_everything
from arf_plugin.errors import CheckpointError
from arf_plugin.step_checkpoint import (
    check_format,
    describe,
    file_name,
    is_torn,
    remove_finished,
    remove_others,
    resume_point,
    write,
)


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


def test_torn(tmp_path):
    whole, torn, empty = (tmp_path / name for name in ("whole.pt", "torn.pt", "empty.pt"))
    write({"weights": torch.ones(1000)}, whole)
    torn.write_bytes(whole.read_bytes()[:-100])
    empty.touch()
    legacy = tmp_path / "legacy.pt"
    torch.save({"weights": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    assert [is_torn(str(path)) for path in (whole, torn, empty, legacy)] == [False, True, True, False]


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
