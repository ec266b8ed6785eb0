"""The real trainer with anchors: the literal command line on each release, and what each flag does to a run."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import open_clip
import pytest
import torch
from support import data, releases
from support.environments import make_environment
from support.trainer import SHIM, TERMS, batches, logged

ROOT = Path(__file__).parents[3]


@pytest.fixture
def flags(task, anchors):
    return [*task.flags, "--arf-anchors", anchors]


@pytest.fixture
def prompts(task):
    return task.prompts


@pytest.mark.parametrize("release", releases.PARAMETERS)
def test_literal_command_line(train, flags, prompts, model_configs, release):
    run = train(*flags, *prompts, "--arf-freeze-bn", open_clip=releases.folder(release))
    assert "ARF is on" in run.output and "Traceback" not in run.output
    for term in TERMS:
        values = logged(run, term)
        assert len(values) == 4 and all(math.isfinite(value) and value > 0 for value in values), run.output
    assert batches(run) == [(16, 64), (32, 64), (48, 64), (64, 64)]
    # An ordinary checkpoint: stock open_clip takes its weights with nothing missing and nothing left over.
    open_clip.add_model_config(model_configs)
    model = open_clip.create_model("tiny-vit")
    model.load_state_dict(run.checkpoint["state_dict"])


def test_two_processes_with_workers(train, flags):
    run = train(*flags, "--workers", 2, nproc=2)
    assert batches(run) == [(32, 64), (64, 64)]
    assert run.output.count("ARF is on") == 1


def test_arf_train_needs_no_start_up_file(train, flags, tmp_path):
    """The explicit door, in an environment without the start-up file."""
    python = make_environment(tmp_path / "env")
    argv = [python, "-m", "arf_plugin.cli.main", "train", *train.argv(tuple(flags), "run", "tiny-vit", 8)]
    env = {**train.env, "PYTHONPATH": releases.path(SHIM, ROOT), "ARF_TEST_SHIM_ALWAYS": "1"}
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0 and "Pair_anchor_loss" in done.stderr + done.stdout, done.stderr


def test_flyp_alone_trains_on_class_shards(train, tmp_path, prompts):
    """Without an anchor set the prompt flags give FLYP, on shards that have no text of their own."""
    bare = data.write_task(tmp_path / "bare", shards=2, per_shard=8, text=False)
    run = train.forked("--train-data", bare.urls, "--train-num-samples", 16, *prompts)
    assert "FLYP" in run.output and batches(run) == [(8, 16), (16, 16)]
    assert logged(run, "Contrastive_loss") and not logged(run, "Caption_anchor_loss")


@pytest.mark.parametrize("half", ["captions", "pairs"])
def test_either_half_may_be_missing(train, tmp_path, task, anchors, half):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / half).symlink_to(anchors / half)
    run = train.forked(*task.flags, "--arf-anchors", tmp_path / "half")
    present, absent = TERMS[1:] if half == "captions" else TERMS[:0:-1]
    assert logged(run, present) and not logged(run, absent)
    name = "pair anchors" if half == "captions" else "caption anchors"
    assert f"the term of the {name} is off, because {tmp_path / 'half'} has none" in run.output


@pytest.mark.parametrize(
    ("off", "images", "texts"), [("caption", 16, 16), ("pair", 8, 16)], ids=["caption", "pair"]
)
def test_weight_zero_switches_a_term_and_its_compute_off(train, flags, off, images, texts):
    run = train.forked(*flags, f"--arf-{off}-weight", 0)
    assert not logged(run, f"{off.capitalize()}_anchor_loss")
    assert f"the term of the {off} anchors is off, because its weight is 0" in run.output
    assert f"{images} images, {texts} texts" in run.output
    assert batches(run)[-1] == (4 * images, 4 * images)


def test_weights_scale_the_logged_terms(train, flags):
    first = [
        [logged(run, term)[0] for term in TERMS]
        for run in (
            train.forked(*flags, "--seed", 1, name="one"),
            train.forked(
                *flags, "--seed", 1, "--arf-caption-weight", 10, "--arf-pair-weight", 0.1, name="other"
            ),
        )
    ]
    # The order of samples differs from run to run (webdataset seeds its shuffle by the clock): compare sizes only.
    assert first[1][1] / first[0][1] > 5 and first[1][2] / first[0][2] < 0.2


def test_accumulation_with_fewer_pairs(train, flags):
    run = train.forked(*flags, "--accum-freq", 2, "--arf-pair-batch-size", 3)
    assert batches(run) == [(22, 44), (44, 44)] and logged(run, "Pair_anchor_loss")


@pytest.mark.parametrize("own_text", [True, False])
def test_csv_task_data(train, tmp_path, anchors, prompts, own_text):
    """Captions join on the image path as the CSV has it; class prompts need no text column."""
    csv = data.write_csv_task(tmp_path, 16)
    data.write_csv_captions(tmp_path / "anchors", csv)
    if not own_text:
        rows = [line.split("\t") for line in csv.read_text().splitlines()]
        csv.write_text("".join(f"{path}\t{cls}\n" for path, _, cls in rows))
    (tmp_path / "anchors" / "pairs").symlink_to(anchors / "pairs")
    flags = ["--train-data", csv, "--arf-anchors", tmp_path / "anchors"]
    run = train.forked(*flags, *([] if own_text else prompts))
    assert batches(run) == [(16, 32), (32, 32)]
    assert all(logged(run, term) for term in TERMS)


def test_csv_with_an_empty_text_is_refused(train, tmp_path, anchors):
    """open_clip itself would train on the text 'nan'."""
    lines = ["filepath\ttitle", f"{tmp_path}/0.png\ta text", f"{tmp_path}/1.png\t"]
    (tmp_path / "task.csv").write_text("\n".join(lines) + "\n")
    flags = ["--train-data", tmp_path / "task.csv", "--arf-anchors", anchors, "--arf-caption-weight", 0]
    run = train.forked(*flags, check=False)
    assert run.status != 0 and "row 2: column 'title' is empty" in run.output


def test_validation_data_is_left_alone(train, flags, task):
    run = train.forked(*flags, "--val-data", task.urls, "--val-num-samples", 32)
    assert "Eval Epoch: 1" in run.output and re.search(r"clip_val_loss: [\d.]+", run.output)


def test_batch_norm_is_warned_about(train, flags):
    run = train.forked(*flags, model="tiny-resnet")
    assert "BatchNorm layers" in run.output and "--arf-freeze-bn makes it exact" in run.output


def test_frozen_batch_norm_keeps_its_statistics(train, flags):
    run = train.forked(*flags, "--arf-freeze-bn", model="tiny-resnet")
    state = run.checkpoint["state_dict"]
    means = {name: value for name, value in state.items() if name.endswith("running_mean")}
    assert means and all(torch.equal(value, torch.zeros_like(value)) for value in means.values())
    counters = [value for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert counters and all(value == 0 for value in counters)
    assert any(
        not torch.equal(state[name.replace("running_mean", "weight")], torch.ones_like(value))
        for name, value in means.items()
    )


def test_resume_continues_an_anchored_run(train, flags):
    train.forked(*flags, name="run")
    again = train.forked(*flags, "--epochs", 2, "--resume", "latest", name="run")
    assert "resuming checkpoint" in again.output and "Train Epoch: 1" in again.output
