"""L2-SP through the real trainer: its gradient is W * (theta - theta_0), once, beside the ordinary one."""

from __future__ import annotations

import re

import pytest
import torch
from support import data

from arf_plugin.errors import FlagError

WEIGHT = 0.7


@pytest.mark.parametrize(("nproc", "accum_freq"), [(1, 1), (2, 2)])
def test_gradient_is_the_pull_to_the_start_beside_the_ordinary_one(tmp_path, train, start, nproc, accum_freq):
    """Two runs that differ in the penalty alone, at the first step where it can show.

    The first step starts from theta_0, where the penalty has no gradient, so both runs reach the same weights; their
    gradients at the second then differ by W * (theta - theta_0).
    """
    task = data.write_csv_task(tmp_path / "task", 24)
    records = {}
    for name, flags in (("stock", []), ("l2sp", ["--arf-l2sp", WEIGHT])):
        env = {"ARF_TEST_FP64": "1", "ARF_TEST_RECORD": str(tmp_path / name), "ARF_TEST_RECORD_STEP": "1"}
        size = 12 // nproc // accum_freq
        common = ["--train-data", task, "--pretrained", start, "--accum-freq", accum_freq]
        train.forked(*common, *flags, nproc=nproc, name=name, batch_size=size, env=env)
        records[name] = torch.load(f"{tmp_path / name}.0", weights_only=True)
    stock, ours = records["stock"], records["l2sp"]
    theta_0 = torch.load(start, weights_only=True)
    moved = 0.0
    for name, weight in ours["weights"].items():
        assert torch.equal(weight, stock["weights"][name]), name
        distance = weight - theta_0[name]
        moved = max(moved, distance.abs().max().item())
        pull = ours["gradients"][name] - stock["gradients"][name]
        torch.testing.assert_close(pull, WEIGHT * distance, rtol=1e-9, atol=1e-13)
    assert moved > 1e-4, "the weights have not moved, so there was nothing to compare"
    assert "logit_scale" in ours["weights"] and any(name.endswith("bias") for name in ours["weights"])


def test_the_logged_penalty_is_the_whole_one(tmp_path, train, start):
    """Also under accumulation, where its gradient comes in parts; and it goes with anchors."""
    task = data.write_csv_task(tmp_path / "task", 16)
    data.write_pairs(tmp_path / "anchors", shards=2, per_shard=6)
    flags = ["--train-data", task, "--pretrained", start, "--accum-freq", 2, "--epochs", 2]
    run = train.forked(*flags, "--arf-l2sp", 3, "--arf-anchors", tmp_path / "anchors", batch_size=4)
    values = [float(value) for value in re.findall(r"L2sp_loss: ([\d.eE+-]+) \(", run.output)]
    assert "L2-SP holds the weights to where they start (weight 3)" in run.output
    assert len(values) == 4 and values[0] == 0 and "Pair_anchor_loss" in run.output
    # The third step, the first of the second epoch, starts from the weights that the first epoch left.
    theta_0, theta = torch.load(start, weights_only=True), run.checkpoint["state_dict"]
    trained = [name for name in theta if theta[name].is_floating_point() and name != "attn_mask"]
    distance = sum((theta[name].double() - theta_0[name].double()).square().sum() for name in trained)
    assert values[2] == pytest.approx(3 / 2 * float(distance), rel=1e-3)


def test_a_resumed_run_is_held_to_where_the_first_one_started(tmp_path, train, start):
    task = data.write_csv_task(tmp_path / "task", 16)
    flags = ["--train-data", task, "--pretrained", start, "--arf-l2sp", 2]
    first = train.forked(*flags)
    again = train.forked(*flags, "--epochs", 2, "--resume", "latest")
    theta_0, theta = torch.load(start, weights_only=True), first.checkpoint["state_dict"]
    trained = [name for name in theta if theta[name].is_floating_point() and name != "attn_mask"]
    distance = sum((theta[name].double() - theta_0[name].double()).square().sum() for name in trained)
    value = re.findall(r"L2sp_loss: ([\d.eE+-]+) \(", again.output.split("resuming checkpoint")[1])[0]
    assert float(value) == pytest.approx(float(distance), rel=1e-3)


def test_locked_towers_are_left_out(train, task, start):
    run = train.forked(
        *(*task.flags, "--pretrained", start, "--arf-l2sp", 1),
        *("--lock-image", "--arf-classnames", task.classnames),
    )
    theta_0 = torch.load(start, weights_only=True)
    after = run.checkpoint["state_dict"]
    assert torch.equal(after["visual.proj"], theta_0["visual.proj"])
    assert not torch.equal(after["text_projection"], theta_0["text_projection"])
    assert "L2sp_loss" in run.output


def test_an_unknown_start_is_refused(parse):
    with pytest.raises(FlagError, match="Name them with --pretrained"):
        parse("--train-data", "x.tar", "--arf-l2sp", 1, "--resume", "latest")
    assert (
        parse("--train-data", "x.tar", "--arf-l2sp", 1, "--resume", "latest", "--pretrained", "y").l2sp == 1
    )
