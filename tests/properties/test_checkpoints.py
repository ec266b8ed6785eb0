"""Whatever a step checkpoint, a params.txt or a checkpoint's words say: an error of ours, or what can be used."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import given

from arf_plugin.errors import ArfError
from arf_plugin.evaluation.run_settings import Settings, find_run, read_params
from arf_plugin.resume.checkpoint import check_format, describe, resume_point
from arf_plugin.resume.rng import preserved_rng, restore_rng, rng_state

STATE = {"rng": rng_state(), "streams": {"task": [3, 4], "pairs": [0]}}
SAVED = describe(
    epoch=2, step=30, batches=6, num_batches=12, data={"seed": 0, "train_data": "x"}, processes=[STATE, STATE]
)
TENSORS = st.builds(
    lambda size, dtype, value: torch.full((size,), value).to(dtype),
    st.sampled_from([0, 1, 624, 625, 5056]),
    st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.float64, torch.bool]),
    st.integers(-2, 300),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | TENSORS
    | st.binary(max_size=8)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Where something can be replaced."""
    found = [path] if path else []
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return found + [each for key, inner in entries for each in places(inner, (*path, key))]


@given(st.data())
def test_step_checkpoints(data):
    saved = copy.deepcopy(SAVED)
    for _ in range(data.draw(st.integers(1, 3))):
        *inner, last = data.draw(st.sampled_from(places(saved)))
        place = saved
        for key in inner:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(VALUES)
        elif isinstance(place, dict):
            del place[last]
        else:
            place.pop(last)
    rank, deterministic = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    shape = {"num_batches": 12, "accum_freq": 2, "rank": rank, "deterministic": deterministic}
    shape["streams"] = {"task": 2, "pairs": 1}
    try:
        point = resume_point(check_format(saved, "x.pt"), data=SAVED["data"], **shape)
    except ArfError as error:
        assert len(str(error)) < 2000
        return
    assert point.epoch >= 0 and 0 <= point.batches <= 12
    if point.process is not None:
        with preserved_rng():
            restore_rng({**point.process["rng"], "cuda": []})


NAMES = st.sampled_from([*vars(Settings()), "model", "pretrained", "other"])
LINES = st.lists(st.tuples(NAMES, st.text(max_size=40) | st.builds(repr, VALUES)), max_size=8)


def usable(run) -> None:
    """The settings can be told, handed on, and written as flags."""
    if run is not None:
        run.settings.flags()
        assert all(value is not None for value in run.settings.arguments().values())


@given(
    st.binary(max_size=200)
    | LINES.map(lambda lines: "\n".join(f"{n}: {v}" for n, v in lines).encode("utf-8", "replace"))
)
def test_params(content):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "params.txt")
        path.write_bytes(content)
        try:
            usable(read_params(path))
        except ArfError as error:
            assert "\n" not in str(error)


@given(
    VALUES
    | st.text()
    | st.dictionaries(NAMES, st.none() | st.integers() | st.text()).map(lambda d: json.dumps(d))
)
def test_words_in_a_checkpoint(told):
    with contextlib.suppress(ArfError):
        usable(find_run(Path("nowhere/a.pt"), told))
