"""--arf-trim-text in the real trainer: the same run from fewer positions, or no trimming and a line that says why."""

from __future__ import annotations

import pytest
import torch
from support import resuming
from support.trainer import TERMS, logged

LONG = {"model": "tiny-long"}  # with room to trim
KEPT = "texts keep all their positions, because of the model"


def flags(task, anchors, *more):
    return [*task.flags, "--arf-anchors", anchors, *more]


def recording(path):
    """Records the first step, in double precision, whose gradients no scaler finds too large."""
    return {"ARF_TEST_FP64": "1", "ARF_TEST_RECORD": str(path)}


def seen(path):
    """Texts of the first step, as the model got them."""
    return torch.load(f"{path}.0", weights_only=True)["inputs"][0][1]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_whole_run_is_the_same(train, tmp_path, task, anchors, nproc):
    """Weights after an epoch, what was logged, and the validation loss, whose texts are left alone.

    A bias of attention's keys has no gradient but rounding: AdamW, with its usual epsilon, makes steps of it.
    """
    validation = ["--val-data", task.urls, "--val-num-samples", 32, "--arf-deterministic", "--eps", 1e-3]
    runs = [
        train.forked(
            *flags(task, anchors, *validation, "--arf-trim-text", choice),
            nproc=nproc,
            batch_size=8 // nproc,
            name=choice,
            env=recording(tmp_path / choice),
            **LONG,
        )
        for choice in ("auto", "off")
    ]
    assert seen(tmp_path / "off").shape[1] == 32 and seen(tmp_path / "auto").shape[1] < 32
    one, other = (run.checkpoint["state_dict"] for run in runs)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-10, atol=1e-11)
    assert resuming.steps(runs[0].output) == resuming.steps(runs[1].output)
    losses = [[line for line in run.output.splitlines() if "clip_val_loss" in line] for run in runs]
    assert losses[0] and losses[0][0].partition("clip_val")[2] == losses[1][0].partition("clip_val")[2]
    assert not any(KEPT in run.output for run in runs)


@pytest.mark.parametrize(
    "precision",
    ["amp_bf16", "pure_bf16", pytest.param("compiled", marks=pytest.mark.slow)],
)
def test_under_autocast_and_compilation(train, task, anchors, precision):
    """The same losses to what bfloat16 leaves of them; compiled ones in single precision."""
    how = ["--precision", precision] if precision != "compiled" else ["--precision", "fp32", "--torchcompile"]
    runs = [
        train.forked(
            *flags(task, anchors, *how, "--arf-deterministic", "--arf-trim-text", choice),
            name=choice,
            timeout=900,
            **LONG,
        )
        for choice in ("auto", "off")
    ]
    for term in TERMS:
        one, other = (torch.tensor(logged(run, term)) for run in runs)
        assert len(one) == 4
        torch.testing.assert_close(one, other, rtol=1e-4 if precision == "compiled" else 0.1, atol=1e-4)


def test_a_tower_where_it_is_not_exact_keeps_its_texts(train, tmp_path, task, anchors):
    run = train.forked(*flags(task, anchors), model="tiny-last", env=recording(tmp_path / "last"))
    assert run.output.count(f"{KEPT}: its text tower is pooled by 'last'") == 1
    assert seen(tmp_path / "last").shape[1] == 32


def test_class_prompts_alone_are_trimmed(train, tmp_path, task):
    """FLYP, too; the longest prompt has 7 tokens."""
    prompts = task.prompts
    data = ["--train-data", task.urls, "--train-num-samples", 16]
    train.forked(*data, *prompts, env=recording(tmp_path / "flyp"), **LONG)
    assert seen(tmp_path / "flyp").shape == (8, 8)


def test_what_trains_as_without_the_plugin_is_left_alone(train, tmp_path, task):
    """--arf-freeze-bn by itself asks for nothing of the texts."""
    data = ["--train-data", task.urls, "--train-num-samples", 16, "--arf-freeze-bn"]
    train.forked(*data, env=recording(tmp_path / "plain"), **LONG)
    assert seen(tmp_path / "plain").shape == (8, 32)
    train.forked(*data, "--arf-trim-text", "auto", name="asked", env=recording(tmp_path / "asked"), **LONG)
    assert seen(tmp_path / "asked").shape[1] < 32
