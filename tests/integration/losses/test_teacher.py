"""`--arf-teacher` through the real trainer: its average, its checkpoints, and the runs that it goes with.

Its gradients are compared in test_step_equals_three_forwards.py, runs that are killed in resume/test_resume.py.
"""

from __future__ import annotations

import pytest
import torch
from support import data, reference
from support.evaluation import save_config, write_set
from support.trainer import logged

from arf_plugin.evaluation.checkpoints import read_weights

STEPS = 4


@pytest.mark.parametrize(("nproc", "accum_freq"), [(1, 1), (2, 2)])
def test_the_saved_average_is_the_mean_of_the_weights_of_all_steps(tmp_path, train, start, nproc, accum_freq):
    """Without a term (weight 0): it is kept for itself. The weights before each step, and the last, in fp64."""
    task = data.write_csv_task(tmp_path / "task", 8 * STEPS)
    run = train.forked(
        *("--train-data", task, "--pretrained", start, "--accum-freq", accum_freq),
        *("--arf-teacher", "average", "--arf-teacher-weight", 0, "--arf-save-average"),
        nproc=nproc,
        batch_size=8 // nproc // accum_freq,
        env={
            "ARF_TEST_FP64": "1",
            "ARF_TEST_RECORD": str(tmp_path / "record"),
            "ARF_TEST_RECORD_STEP": str(STEPS - 1),
        },
    )
    assert "Teacher_loss" not in run.output
    record = torch.load(tmp_path / "record.0", weights_only=True)
    trajectory = [*(earlier["weights"] for earlier in record["earlier"]), record["weights"]]
    last = {name.removeprefix("module."): value for name, value in run.checkpoint["state_dict"].items()}
    found = read_weights(run.folder / "checkpoints" / "average_1.pt")
    assert len(trajectory) == STEPS and found.keys() == last.keys()
    for name, value in reference.average([*trajectory, last], STEPS).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
        assert name == "logit_scale" or not torch.allclose(found[name], last[name], rtol=0, atol=1e-6)


def test_the_average_is_a_checkpoint_like_others(tmp_path, train, task, start, run_arf):
    flags = [*task.flags, "--arf-classnames", task.classnames]
    run = train.forked(*flags, "--pretrained", start, "--arf-teacher", "average", "--arf-save-average")
    average = run.folder / "checkpoints" / "average_1.pt"
    tests, out = write_set(tmp_path / "set", images=12), tmp_path / "out.json"
    common = ["--model", save_config(tmp_path / "model"), "--workers", 0]
    run_arf("evaluate", average, *common, "--data", tests, "--json", out)
    assert "average_1" in out.read_text()
    run_arf("interpolate", start, average, "--alpha", 0.5, *common, "--out", tmp_path / "half.pt")
    ends = [read_weights(start)["visual.proj"], read_weights(average)["visual.proj"]]
    half = read_weights(tmp_path / "half.pt")["visual.proj"]
    torch.testing.assert_close(half, (ends[0] + ends[1]) / 2)
    again = train.forked(*flags, "--pretrained", average, name="again")
    assert "come from no file" not in again.output


def test_the_term_without_anchors_on_every_other_step(tmp_path, train, start):
    """Own texts, micro-batches, fp32: 0 at the start, where both are one model, and on steps without it."""
    task = data.write_csv_task(tmp_path / "task", 32)
    run = train.forked(
        *("--train-data", task, "--pretrained", start, "--accum-freq", 2, "--epochs", 3),
        *("--arf-teacher", "start", "--arf-teacher-every", 2, "--precision", "fp32"),
        batch_size=4,
    )
    values = logged(run, "Teacher_loss")
    assert len(values) == 12 and values[0] < 1e-9 and values[1::2] == [0.0] * 6
    assert all(value > 0.1 for value in values[2::2])


def test_a_resumed_run_has_the_teacher_that_the_first_one_started_from(tmp_path, train, start):
    """Two epochs in one go, and the second one resumed: the same losses, up to what the log shows of them."""
    task = data.write_csv_task(tmp_path / "task", 16)
    flags = ["--train-data", task, "--pretrained", start, "--arf-teacher", "start", "--precision", "fp32"]
    flags += ["--arf-deterministic"]
    whole = train.forked(*flags, "--epochs", 2, name="whole")
    again = train.forked(*flags, "--epochs", 2, "--resume", whole.folder / "checkpoints" / "epoch_1.pt")
    assert logged(again, "Teacher_loss") == logged(whole, "Teacher_loss")[2:]


def test_batch_norm_and_mixed_precision(train, task, anchors):
    """In two processes, whose statistics differ: the average has those of the first one, as its checkpoint has."""
    run = train.forked(
        *(*task.flags, "--arf-anchors", anchors),
        *("--arf-teacher", "average", "--arf-save-average", "--precision", "amp_bf16"),
        model="tiny-resnet",
        nproc=2,
        batch_size=4,
    )
    found = read_weights(run.folder / "checkpoints" / "average_1.pt")
    last = {name.removeprefix("module."): value for name, value in run.checkpoint["state_dict"].items()}
    assert torch.equal(found["visual.bn1.running_mean"], last["visual.bn1.running_mean"])
    assert not torch.equal(found["visual.conv1.weight"], last["visual.conv1.weight"])
    assert len(logged(run, "Teacher_loss")) == 4 and logged(run, "Teacher_loss")[-1] > 0


def test_random_starting_weights_are_refused(train, task):
    flags = [*task.flags, "--arf-teacher", "average"]
    run = train.forked(*flags, check=False)
    assert run.status != 0 and "come from no file and are random" in run.output


def test_an_epoch_without_its_average_is_refused(train, task, start):
    flags = [*task.flags, "--pretrained", start]
    train.forked(*flags)
    run = train.forked(*flags, "--epochs", 2, "--arf-teacher", "average", "--resume", "latest", check=False)
    assert run.status != 0 and "average_1.pt has none" in run.output
