"""What only open_clip 4 has: tasks, dictionaries, FSDP, and models that cannot go with ARF."""

from __future__ import annotations

import pytest
import torch
from support import data, releases
from support.resuming import assert_same_end, run_with_kills
from support.tars import write_tar
from support.trainer import TERMS, batches, logged

from arf_plugin.hooks.table import trains_tasks

if not trains_tasks(releases.current()):
    pytest.skip("needs the trainer of open_clip 4: run nox -s open_clip-4.2.0.dev0", allow_module_level=True)


@pytest.fixture
def flags(task, anchors):
    return [*task.flags, "--arf-anchors", anchors]


@pytest.fixture
def csv_flags(tmp_path, anchors):
    """Task data whose order depends on the seed alone, so that two runs can be compared."""
    csv = data.write_csv_task(tmp_path, 16)
    data.write_csv_captions(tmp_path / "anchors", csv)
    (tmp_path / "anchors" / "pairs").symlink_to(anchors / "pairs")
    return ["--train-data", csv, "--arf-anchors", tmp_path / "anchors"]


REFUSED = {
    "naflex": (["--use-naflex"], "--use-naflex makes batches of packed patches"),
    "naflex-aug": (["--aug-cfg", "naflex=True"], "--aug-cfg naflex=True makes batches of packed patches"),
    "clap": (["--model", "CLAP-HTSAT-tiny"], "is a model of audio and text"),
    "naflexclap": (["--model", "naflexclap_test"], "is a model of audio and text"),
    "genlip": (["--model", "naflexgenlip_test"], "generates texts and has no contrastive loss"),
    "genlap": (["--model", "naflexgenlap_test_1d"], "generates texts and has no contrastive loss"),
    "coca": (["--model", "coca_ViT-B-32"], "CoCa needs as many images as texts"),
    "variable-text": (["--model", "moderntext-ViT-B-32-256"], "takes texts of any length"),
    "audio": (["--dataset-type", "webdataset-audio"], "ARF trains on images with texts"),
    "text-key": (["--text-key", "caption"], "--text-key caption: ARF reads task samples as KEY.txt"),
    "json": (["--json-text-key", "caption"], "--json-text-key caption: ARF reads task samples as KEY.txt"),
    "image-key": (["--image-key", "tif"], "--image-key tif: ARF reads task samples as KEY.txt"),
    "l2sp": (["--fsdp", "--arf-l2sp", 0.1], "--arf-l2sp and --fsdp do not go together"),
    "watch": (["--fsdp", "--arf-watch", "folder"], "--arf-watch needs the whole model in each process"),
    "sharded": (
        ["--fsdp", "--fsdp-checkpoint", "sharded", "--arf-checkpoint-every", 1],
        "do not go together with --fsdp-checkpoint sharded",
    ),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_go_with_arf_is_refused(train, flags, more, message):
    run = train.forked(*flags, *more, check=False)
    assert run.status != 0 and "arf-plugin: error: " in run.output and message in run.output
    assert "Traceback" not in run.output and "Start epoch" not in run.output


def test_compiled_gathers_without_gradients_are_refused(train, flags):
    run = train.forked(*flags, "--torchcompile", "--local-loss", nproc=2, check=False)
    assert (
        run.status != 0 and "compiled gradients are wrong" in run.output and "Start epoch" not in run.output
    )


@pytest.mark.slow
def test_what_open_clip_itself_breaks_in_two_processes(train, tmp_path, csv_flags):
    """Without the plugin: the reason for the refusal above, and for the cases that tests of gradients leave out."""
    stock = [*csv_flags[:2], "--precision", "fp32"]
    static = train.forked(*stock, "--ddp-static-graph", "--accum-freq", 2, nproc=2, batch_size=4, check=False)
    assert static.status != 0 and "expect_autograd_hooks_ INTERNAL ASSERT FAILED" in static.output
    for gathers, wrong in (([], True), (["--local-loss"], True), (["--gather-with-grad"], False)):
        gradients = []
        for compiled in ([], ["--torchcompile"]):
            record = tmp_path / "-".join(["record", *gathers, *compiled])
            train.forked(
                *(*stock, *gathers, *compiled),
                nproc=2,
                batch_size=4,
                name=record.name,
                timeout=900,
                env={"ARF_TEST_FP64": "1", "ARF_TEST_RECORD": str(record)},
            )
            found = torch.load(f"{record}.0", weights_only=True)["gradients"]
            gradients.append({name.removeprefix("_orig_mod."): value for name, value in found.items()})
        one, other = gradients
        errors = [float((one[name] - other[name]).norm() / one[name].norm()) for name in one]
        assert (max(errors) > 0.5) if wrong else (max(errors) <= 1e-10), gathers


def test_fsdp_trains_what_ddp_trains(train, csv_flags):
    runs = [
        train.forked(*csv_flags, *more, "--precision", "fp32", nproc=2, batch_size=4, name=name)
        for name, more in (("ddp", []), ("fsdp", ["--fsdp"]))
    ]
    assert "FSDP2: sharding" in runs[1].output
    assert batches(runs[0]) == batches(runs[1]) == [(16, 32), (32, 32)]
    for term in TERMS:
        assert logged(runs[0], term) == pytest.approx(logged(runs[1], term), rel=1e-3)
    first, second = (run.checkpoint["state_dict"] for run in runs)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "way", [["--fsdp"], ["--fsdp", "--grad-checkpointing"]], ids=["fsdp", "checkpointing"]
)
def test_fsdp_killed_and_resumed_equals_undisturbed(train, task, anchors, way):
    """Weights in parts, in one file between two steps: the same to the bit."""
    run_flags = ["--train-data", task.urls, "--train-num-samples", 64, "--arf-anchors", anchors, *way]
    run_flags += ["--epochs", 2, "--workers", 2, "--arf-deterministic", "--precision", "fp32"]
    calm = train.forked(*run_flags, nproc=2, batch_size=4, name="calm")
    every = [*run_flags, "--arf-checkpoint-every", 1]
    killed = run_with_kills(train, every, [0.5, 1.4], nproc=2, batch_size=4, name="killed")
    assert "FSDP2: sharding" in killed.output and "goes on after" in killed.output
    assert_same_end(calm, killed, 2)


def test_counters_of_a_step_checkpoint(train, flags):
    """The trainer's own counts of steps and samples go on, too."""
    run = train.forked(*flags, "--arf-checkpoint-every", 3, "--save-frequency", 0, "--epochs", 2)
    path = run.folder / "checkpoints" / "epoch_1_step_6.pt"
    saved = torch.load(path, weights_only=True)
    assert (saved["epoch"], saved["global_step"], saved["samples_seen"]) == (1, 6, 6 * 16)
    resumed = train.forked(*flags, "--epochs", 2, "--resume", path, name="resumed")
    last = torch.load(resumed.folder / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert (last["global_step"], last["samples_seen"]) == (8, 8 * 16)


def test_samples_without_text_are_dropped_in_order(train, tmp_path):
    """open_clip 4 drops a sample with an empty text; the number that orders samples must not make up for it."""
    task = data.write_task(tmp_path / "task", shards=1, per_shard=8)
    members = {}
    for number in range(4):
        members |= {f"{number}.png": data.image(700 + number), f"{number}.txt": b" ", f"{number}.cls": b"0"}
    write_tar(task.folder / "task-0001.tar", members)
    seen = []
    for name, more in (("plain", []), ("ordered", ["--arf-deterministic"])):
        record = tmp_path / name
        train.forked(
            *(
                "--train-data",
                f"{task.folder}/task-{{0000..0001}}.tar",
                "--train-num-samples",
                8,
                "--arf-freeze-bn",
            ),
            *more,
            env={"ARF_TEST_RECORD": str(record)},
            name=name,
        )
        ((images, _),) = torch.load(f"{record}.0", weights_only=True)["inputs"]
        seen.append({image.numpy().tobytes() for image in images})
    assert len(seen[0]) == 8 and seen[0] == seen[1]


def test_samples_of_anchors_are_counted(train, flags):
    """The trainer's counters: B + A images for each step of each process."""
    run = train.forked(*flags, "--arf-pair-batch-size", 3, "--accum-freq", 2)
    assert batches(run) == [(22, 44), (44, 44)]
    assert (run.checkpoint["samples_seen"], run.checkpoint["global_step"]) == (44, 2)


def test_unknown_tasks_are_refused():
    from argparse import Namespace

    from open_clip.task import CoCaTask

    from arf_plugin.config import ArfConfig
    from arf_plugin.errors import IncompatibleUpstreamError
    from arf_plugin.hooks.session import Session
    from arf_plugin.hooks.task import create_task

    session = Session(ArfConfig(), releases.current())
    build = create_task(lambda args: CoCaTask(torch.nn.Identity(), default_loss=False), session)
    with pytest.raises(IncompatibleUpstreamError, match="a task of type CoCaTask"):
        build(Namespace())
