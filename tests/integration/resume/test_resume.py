"""--arf-deterministic and --arf-checkpoint-every in the real trainer: bitwise identical, killed or not."""

from __future__ import annotations

import random
from pathlib import Path

import open_clip
import pytest
import torch
from support import data
from support.resuming import (
    assert_same_end,
    equal,
    last_checkpoint,
    run_killed,
    run_until,
    run_with_kills,
    steps,
)
from support.tars import write_tar
from support.trainer import Trainer

from arf_plugin.errors import FlagError
from arf_plugin.evaluation.checkpoints import read_weights

EPOCHS = 2


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> data.Task:
    """Task data whose shards differ in size; one image looks whole and cannot be decoded."""
    folder = tmp_path_factory.mktemp("uneven")
    task = data.write_task(folder, shards=4, per_shard=14)
    broken = bytearray(data.image(500))
    broken[60:90] = bytes(30)
    members = {"900000.png": bytes(broken), "900000.cls": b"1", "900000.txt": b"a broken image"}
    for number in range(3):
        members |= {
            f"90001{number}.png": data.image(600 + number),
            f"90001{number}.cls": b"2",
            f"90001{number}.txt": f"an own text number 60{number}".encode(),
        }
    write_tar(folder / "task-0004.tar", members)
    task.samples |= {f"task-0004/{key}": (0, 0) for key in ("900000", "900010", "900011", "900012")}
    task.shards = 5
    return task


@pytest.fixture(scope="module")
def uneven_anchors(tmp_path_factory, uneven, model_configs):
    folder = tmp_path_factory.mktemp("uneven_anchors")
    data.write_captions(folder, {identity: f"a caption of {identity}" for identity in uneven.ids})
    data.write_pairs(folder, shards=4, per_shard=9)
    open_clip.add_model_config(model_configs)
    data.write_features(folder, data.start_of("tiny-vit", folder / "start.pt"), "tiny-vit")
    return folder


def flags(task, *more) -> list:
    """A run of ``EPOCHS`` epochs of seven batches of 8, with random crops."""
    return [
        *("--train-data", task.urls, "--train-num-samples", 56, "--epochs", EPOCHS, "--arf-deterministic"),
        *("--aug-cfg", "scale=(0.3,1.0)", *more),
    ]


def shape(task, anchors, variant: str) -> list:
    """Flags of a variant of training."""
    prompts = task.prompts
    return {
        "anchors": ["--arf-anchors", anchors, *prompts],
        "flyp": prompts,
        "plain": [],
        "every": ["--arf-anchors", anchors, "--arf-every", 3],
        "accum": ["--arf-anchors", anchors, "--accum-freq", 2, "--arf-pair-batch-size", 3],
        "difference": [
            *("--arf-anchors", anchors, "--arf-pair-loss", "difference", "--arf-caption-loss", "feature"),
            *("--pretrained", anchors / "start.pt", "--arf-every", 2),
        ],
        "resampled": [*prompts, "--dataset-resampled"],
        "mixing": [
            *("--train-data", f"{task.urls}::{anchors}/pairs/{{000000..000003}}.tar", "--dataset-resampled"),
            *("--train-data-upsampling-factors", "1::2", *prompts),
        ],
    }[variant]


MODEL = {"model": "tiny-vit-dropout"}


@pytest.mark.parametrize(
    ("variant", "workers", "nproc"),
    [
        ("anchors", 4, 1),
        ("flyp", 0, 2),
        ("mixing", 2, 1),
        ("accum", 0, 1),
        pytest.param("plain", 2, 1, marks=pytest.mark.slow),
        pytest.param("every", 4, 1, marks=pytest.mark.slow),
        ("difference", 2, 2),
    ],
)
def test_killed_and_resumed_equals_undisturbed(train, uneven, uneven_anchors, variant, workers, nproc):
    """Two runs with one seed, one of them killed twice, end with the same bits and log the same losses."""
    run_flags = flags(uneven, *shape(uneven, uneven_anchors, variant), "--workers", workers)
    options = {**MODEL, "nproc": nproc, "batch_size": 8 // nproc}
    calm = train.forked(*run_flags, name="calm", **options)
    # An odd number of batches is in the middle of a round of two workers.
    every, kills = 1 if variant == "accum" else 3, [0.45, 1.3]
    killed = run_with_kills(
        train,
        [*run_flags, "--arf-checkpoint-every", every],
        kills,
        seed=len(variant),
        name="killed",
        **options,
    )
    assert "goes on after" in killed.output
    assert_same_end(calm, killed, EPOCHS)
    assert steps(killed.output) == steps(calm.output)


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_averaged_teacher_goes_on(train, uneven, uneven_anchors, nproc):
    """From step checkpoints, and right after an epoch, from open_clip's own and the average beside it."""
    run_flags = flags(uneven, *shape(uneven, uneven_anchors, "anchors"))
    run_flags += ["--arf-teacher", "average", "--arf-teacher-every", 2]
    options = {**MODEL, "nproc": nproc, "batch_size": 8 // nproc}
    calm = train.forked(*run_flags, name="calm", **options)
    checkpoints = ["--arf-checkpoint-every", 3]
    killed = run_with_kills(train, [*run_flags, *checkpoints], [0.6, 1.05, 1.5], name="killed", **options)
    assert killed.output.count("goes on after") == 2 and "epoch_1.pt' (epoch 1)" in killed.output
    assert_same_end(calm, killed, EPOCHS)
    assert steps(killed.output) == steps(calm.output)
    averages = [read_weights(run.folder / "checkpoints" / f"average_{EPOCHS}.pt") for run in (calm, killed)]
    assert equal(*averages)
    assert not equal(
        averages[0]["visual.proj"], last_checkpoint(calm, EPOCHS)["state_dict"].get("visual.proj")
    )


def test_seed_decides(train, uneven, uneven_anchors):
    run_flags = flags(uneven, *shape(uneven, uneven_anchors, "flyp"))
    first = train.forked(*run_flags, name="first", **MODEL)
    other = train.forked(*run_flags, "--seed", 1, name="other", **MODEL)
    assert steps(first.output).keys() == steps(other.output).keys() and steps(first.output) != steps(
        other.output
    )


@pytest.mark.parametrize(("workers", "nproc"), [(2, 1), pytest.param(0, 2, marks=pytest.mark.slow)])
def test_rows_of_a_csv(train, tmp_path, workers, nproc):
    csv = data.write_csv_task(tmp_path / "csv", 40)
    run_flags = [
        *("--train-data", csv, "--epochs", EPOCHS, "--arf-deterministic"),
        *("--aug-cfg", "scale=(0.3,1.0)"),
    ]
    run_flags += ["--workers", workers]
    options = {**MODEL, "nproc": nproc, "batch_size": 8 // nproc}
    calm = train.forked(*run_flags, name="calm", **options)
    killed = run_with_kills(
        train, [*run_flags, "--arf-checkpoint-every", 1], [0.4, 1.2], name="killed", **options
    )
    assert_same_end(calm, killed, EPOCHS)
    assert steps(killed.output) == steps(calm.output)


def test_an_epoch_checkpoint_is_as_good(train, uneven, uneven_anchors):
    run_flags = flags(uneven, *shape(uneven, uneven_anchors, "anchors"))
    calm = train.forked(*run_flags, name="calm", **MODEL)
    resumed = train.forked(
        *run_flags, "--resume", calm.folder / "checkpoints" / "epoch_1.pt", name="resumed", **MODEL
    )
    assert_same_end(calm, resumed, EPOCHS)


def test_step_checkpoint_is_open_clips_own(train, uneven, model_configs):
    """Found by --resume latest, removed when superseded, weights that stock open_clip loads."""
    run_flags = [*flags(uneven), "--arf-checkpoint-every", 3, "--save-frequency", 0]
    run = train.forked(*run_flags, **MODEL)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["epoch_1_step_12.pt", "epoch_2.pt"]
    saved = torch.load(run.folder / "checkpoints" / "epoch_1_step_12.pt", weights_only=True)
    assert saved["epoch"] == 1 and saved["name"] == "run" and saved["arf"]["batches"] == 5
    open_clip.add_model_config(model_configs)
    open_clip.create_model(MODEL["model"], pretrained=str(run.folder / "checkpoints" / "epoch_1_step_12.pt"))
    last = last_checkpoint(run, 2)
    assert not equal(saved["state_dict"], last["state_dict"])


def test_save_most_recent(train, uneven):
    """The one file that open_clip then looks for."""
    run_flags = [*flags(uneven), "--arf-checkpoint-every", 2, "--save-most-recent", "--save-frequency", 0]
    calm = train.forked(*run_flags, name="calm", **MODEL)
    killed = run_killed(train, run_flags, 0.5, name="killed", **MODEL)
    assert [path.name for path in (killed.folder / "checkpoints").glob("*.pt")] == ["epoch_latest.pt"]
    resumed = train.forked(*run_flags, "--resume", "latest", name="killed", **MODEL)
    assert "goes on after" in resumed.output
    assert_same_end(calm, resumed, EPOCHS)


@pytest.mark.parametrize(("moment", "first"), [(0.7, 5), (1.05, 8)])
def test_fresh_order_on_another_number_of_processes(train, uneven, uneven_anchors, moment, first):
    """The right step and the rest of the batches, from a step checkpoint as from an epoch's."""
    run_flags = [flag for flag in flags(uneven, "--arf-checkpoint-every", 4) if flag != "--arf-deterministic"]
    run_flags += ["--arf-anchors", uneven_anchors]
    whole = train.forked(*run_flags, name="whole")
    run_killed(train, run_flags, moment, name="killed")
    resumed = train.forked(*run_flags, "--resume", "latest", name="killed", nproc=2, batch_size=4)
    assert ("with the data in a fresh order" in resumed.output) == (moment < 1)
    rates, again = (
        {
            7 * epoch + round(0.07 * percent): text.split()[1]
            for (epoch, percent), text in steps(run.output).items()
        }
        for run in (whole, resumed)
    )
    assert list(again) == list(range(first, 15)) and again.items() <= rates.items()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--workers", 2], "task_workers: 0 then, 2 now"),
        (["--seed", 5], "seed: 0 then, 5 now"),
        (["--batch-size", 4], "batch_size: 8 then, 4 now"),
        (["--arf-trim-text", "auto"], "trim_text: off then, auto now"),
    ],
)
def test_another_shape_is_refused(train, uneven, stopped, change, said):
    refused = train.forked(*flags(uneven), "--resume", stopped, *change, name="other", check=False, **MODEL)
    assert refused.status != 0 and said in refused.output and "drop --arf-deterministic" in refused.output


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, model_configs, uneven):
    """A step checkpoint of a deterministic run."""
    folder = tmp_path_factory.mktemp("stopped")
    train = Trainer(folder / "logs", model_configs, folder / "cache")
    train.forked(*flags(uneven, "--epochs", 1, "--arf-checkpoint-every", 4), **MODEL)
    return folder / "logs" / "run" / "checkpoints" / "epoch_0_step_4.pt"


def test_torn_files(train, uneven, stopped, tmp_path):
    """A named torn file is refused; --resume latest puts one aside and takes the one before."""
    torn = tmp_path / "epoch_0_step_9.pt"
    torn.write_bytes(stopped.read_bytes()[:-5000])
    refused = train.forked(*flags(uneven), "--resume", torn, name="torn", check=False, **MODEL)
    assert refused.status != 0 and "is no checkpoint that can be read" in refused.output
    folder = train.logs / "latest" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / stopped.name).write_bytes(stopped.read_bytes())
    (folder / "epoch_1.pt").write_bytes(torn.read_bytes())
    run = train.forked(*flags(uneven), "--resume", "latest", name="latest", **MODEL)
    assert "epoch_1.pt was not written to its end" in run.output
    assert "epoch 0 goes on after 4 of 7 batches" in run.output


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "nproc"), [(0, 1), (2, 1), (0, 2), (2, 2), (0, 4)])
def test_twenty_kills(train, uneven, uneven_anchors, nproc, workers):
    epochs = 8
    run_flags = flags(uneven, *shape(uneven, uneven_anchors, "anchors"), "--workers", workers)
    run_flags += ["--epochs", epochs]
    options = {**MODEL, "nproc": nproc, "batch_size": 8 // nproc}
    calm = train.forked(*run_flags, name="calm", **options)
    rng = random.Random(f"{nproc}/{workers}")
    kills = sorted(rng.uniform(0.05, epochs - 0.8) for _ in range(20))
    killed = run_with_kills(
        train, [*run_flags, "--arf-checkpoint-every", 1], kills, seed=workers, name="killed", **options
    )
    assert_same_end(calm, killed, epochs)
    assert steps(killed.output) == steps(calm.output)


def test_a_stop_file_ends_a_run_in_order(train, uneven, uneven_anchors, tmp_path):
    """Both processes stop after the same step, with status 0; the resumed run ends like an undisturbed one."""
    stop = tmp_path / "stop"
    run_flags = flags(uneven, *shape(uneven, uneven_anchors, "anchors"), "--arf-stop-file", stop)
    options = {**MODEL, "nproc": 2, "batch_size": 4}
    calm = train.forked(*run_flags, name="calm", **options)
    stopped = run_until(train, run_flags, 0.3, f"touch {stop}", name="stopped", **options)
    assert stopped.status == 0 and "asked to stop" in stopped.output and not stop.exists()
    assert len(list((stopped.folder / "checkpoints").iterdir())) == 1
    resumed = train.forked(*run_flags, "--resume", "latest", name="stopped", **options)
    assert steps(stopped.output + resumed.output) == steps(calm.output)
    assert_same_end(calm, resumed, EPOCHS)


def test_killed_while_a_checkpoint_is_written(train, uneven):
    """The half-written file is in nobody's way."""
    run_flags = [*flags(uneven), "--arf-checkpoint-every", 1]
    calm = train.forked(*flags(uneven), name="calm", **MODEL)
    killed = run_killed(train, run_flags, 0.5, "kill-in-fsync", name="killed", **MODEL)
    checkpoints = killed.folder / "checkpoints"
    assert list(checkpoints.glob(".incomplete-*")) and list(checkpoints.glob("epoch_*_step_*.pt"))
    resumed = train.forked(*run_flags, "--resume", "latest", name="killed", **MODEL)
    assert "goes on after" in resumed.output and not list(checkpoints.glob(".incomplete-*"))
    assert_same_end(calm, resumed, EPOCHS)


@pytest.mark.slow
def test_literal_command_line_on_the_older_release(train, uneven, uneven_anchors, tmp_path):
    """Two processes of torchrun, stopped after their first step."""
    folder = Path(__file__).parents[3] / ".venvs" / "open_clip_torch-2.32.0"
    run_flags = flags(uneven, *shape(uneven, uneven_anchors, "anchors"), "--epochs", 1)
    run_flags += ["--arf-checkpoint-every", 4, "--arf-stop-file", tmp_path / "stop", "--resume", "latest"]
    options = {**MODEL, "nproc": 2, "batch_size": 4, "open_clip": folder}
    calm = train(*run_flags, name="calm", **options)
    assert [path.name for path in (calm.folder / "checkpoints").iterdir()] == [
        "epoch_1.pt"
    ]  # the step's is gone
    (tmp_path / "stop").touch()
    stopped = train(*run_flags, name="stopped", **options)
    assert [path.name for path in (stopped.folder / "checkpoints").iterdir()] == ["epoch_0_step_1.pt"]
    assert_same_end(calm, train(*run_flags, name="stopped", **options), 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--arf-checkpoint-every", 5, "--horovod"],
            "--arf-checkpoint-every and --horovod do not go together",
        ),
        (["--arf-deterministic", "--horovod"], "--arf-deterministic and --horovod do not go together"),
        (["--arf-stop-file", "x", "--logs", "none"], "--arf-stop-file with --logs none"),
        (["--arf-stop-file", "x", "--remote-sync", "s3://y"], "--arf-stop-file and --remote-sync"),
    ],
)
def test_flags_that_contradict(parse, given, said):
    with pytest.raises(FlagError, match=said):
        parse("--train-data", "x.tar", *given)
