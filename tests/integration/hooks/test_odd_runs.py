"""Runs with flags that change model and preprocessing: what they saw themselves is what everything else measures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from support import building, data, evaluation, releases

from arf_plugin.cli.main import main
from arf_plugin.evaluation.checkpoints import open_checkpoint
from arf_plugin.evaluation.records import read_records

pytestmark = releases.since("3.0", "has no --force-context-length")
MEAN = ("--image-mean", 0.1, 0.2, 0.3, "--image-std", 0.9, 0.7, 0.8)
ODD = (
    *("--siglip", *MEAN, "--image-interpolation", "bilinear", "--image-resize-mode", "squash"),
    *("--force-image-size", 48, "--force-quick-gelu", "--force-context-length", 10),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_configs) -> Path:
    """Starting weights, and drawings that are not square, of six classes."""
    folder = tmp_path_factory.mktemp("world")
    open_clip.add_model_config(model_configs)
    torch.save({"state_dict": evaluation.weights("tiny-vit", 1)}, folder / "start.pt")
    for n in range(60):
        image = Image.open(io.BytesIO(building.drawing(n))).crop((0, 0, 32 - n % 9, 32)).resize((61, 47))
        place = folder / "set" / f"{building.COLOURS[n % 6]}_thing"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{n:03d}.png")
    data.write_csv_task(folder / "task", 24)
    return folder


@pytest.fixture
def run(world, train):
    """Trains with flags, watching the set; returns the run and what it saw in the end."""

    def start(*flags: object, name: str = "run"):
        done = train.forked(
            *(
                "--train-data",
                world / "task" / "task.csv",
                "--precision",
                "fp32",
                "--pretrained",
                world / "start.pt",
            ),
            *("--arf-watch", world / "set", *flags),
            name=name,
        )
        lines = (done.folder / "arf_watch.jsonl").read_text().splitlines()
        return done, json.loads(lines[-1])["metrics"]

    return start


@pytest.fixture
def evaluate(world, tmp_path, capsys):
    """Runs `arf evaluate`; returns the rows and what it said."""

    def start(*argv: object, out: str = "rows.jsonl"):
        common = ("--model", "tiny-vit", "--data", world / "set", "--workers", 0, "--batch-size", 8)
        assert main(list(map(str, ("evaluate", *argv, *common, "--out", tmp_path / out)))) == 0
        return read_records(tmp_path / out), capsys.readouterr().err

    return start


def same(row: dict, watched: dict) -> bool:
    return all(row["metrics"][name] == pytest.approx(value, abs=1e-9) for name, value in watched.items())


def test_all_agree_to_the_last_image(run, evaluate, world, tmp_path, capsys):
    trained, watched = run(*ODD)
    tuned = trained.folder / "checkpoints" / "epoch_1.pt"
    [row], said = evaluate(tuned)
    assert same(row, watched) and row["preprocess"].startswith(
        "--image-mean 0.1 0.2 0.3 --image-std 0.9 0.7 0.8"
    )
    assert "measured with --image-mean 0.1" in said and str(trained.folder / "params.txt") in said

    # Without its run it is another figure, or none; with the trainer's flags it is the same again.
    alone = tmp_path / "alone.pt"
    alone.write_bytes(tuned.read_bytes())
    [row], said = evaluate(alone, out="alone.jsonl")
    assert not same(row, watched) and "--force-image-size 48" in said and "--force-context-length 10" in said
    [_, row], _ = evaluate(
        alone, *ODD[1:], out="alone.jsonl"
    )  # another row of the same file, not the one before
    assert same(row, watched)

    start = world / "start.pt"
    assert (
        main(["interpolate", str(start), str(tuned), "--alpha", "1", "--out", str(tmp_path / "one.pt")]) == 0
    )
    assert (
        main(["interpolate", str(start), str(tuned), "--alpha", "0.5", "--out", str(tmp_path / "half.pt")])
        == 0
    )
    one, half = evaluate(tmp_path / "one.pt", tmp_path / "half.pt", out="mixed.jsonl")[0]
    assert same(one, watched) and not same(
        half, watched
    )  # they lie elsewhere, and tell of the run themselves
    sweep = (
        *("--alphas", 0.5, 1, "--model", "tiny-vit", "--data", world / "set", "--workers", 0),
        *("--batch-size", 8),
    )
    argv = ("interpolate", start, tuned, *sweep, "--results", tmp_path / "sweep.jsonl")
    assert main(list(map(str, argv))) == 0
    in_memory = {row["alpha"]: row["metrics"] for row in read_records(tmp_path / "sweep.jsonl")}
    assert in_memory == {0.5: half["metrics"], 1.0: one["metrics"]}

    task = ("--task-data", _labelled(world / "task"), "--classnames", _names(tmp_path))
    argv = ("probe", *task, "--model", "tiny-vit", "--pretrained", tuned, "--out", tmp_path / "probe.pt")
    assert main(list(map(str, argv))) == 0
    [row], _ = evaluate(tmp_path / "probe.pt", out="probe.jsonl")  # zero-shot: the set has other classes
    assert same(row, watched)


def _labelled(folder: Path) -> Path:
    path = folder / "labelled.csv"
    lines = [f"{folder / f'{n}.png'}\ta text\t{n % 4}" for n in range(24)]
    path.write_text("\n".join(["filepath\ttitle\tcls", *lines]) + "\n")
    return path


def _names(folder: Path) -> Path:
    (folder / "names.txt").write_text("\n".join(data.CLASSNAMES) + "\n")
    return folder / "names.txt"


def test_each_checkpoint_is_measured_as_it_was_trained(run, evaluate, world):
    """In one command, at whatever number of models in memory; a row of one way is not taken for the other."""
    (one, first), (two, second) = run(*MEAN, name="one"), run("--force-image-size", 64, name="two")
    paths = [each.folder / "checkpoints" / "epoch_1.pt" for each in (one, two)]
    rows, _ = evaluate(*paths, world / "start.pt")
    assert same(rows[0], first) and same(rows[1], second)
    assert [row["preprocess"] for row in rows] == [
        "--image-mean 0.1 0.2 0.3 --image-std 0.9 0.7 0.8", "--force-image-size 64", None,
    ]  # fmt: skip
    assert rows[2]["metrics"] == evaluate(world / "start.pt", out="alone.jsonl")[0][0]["metrics"]
    again, _ = evaluate(*paths, world / "start.pt")
    assert again == rows  # nothing is measured twice
    (one.folder / "params.txt").unlink()
    more, _ = evaluate(paths[0])
    assert len(more) == 4 and more[3]["preprocess"] is None and not same(more[3], first)


def test_a_head_goes_on_from_what_the_probe_saw(run, world, tmp_path, train):
    """--arf-head takes a probe of a run with another image size and a bias of the loss."""
    trained, _ = run("--siglip", "--force-image-size", 48)
    tuned = trained.folder / "checkpoints" / "epoch_1.pt"
    names = _names(tmp_path)
    task = ("--task-data", _labelled(world / "task"), "--classnames", names)
    argv = ("probe", *task, "--model", "tiny-vit", "--pretrained", tuned, "--out", tmp_path / "probe.pt")
    assert main(list(map(str, argv))) == 0
    assert json.loads(open_checkpoint(tmp_path / "probe.pt").run)["force_image_size"] == [48]
    flags = ("--arf-head", tmp_path / "probe.pt", "--arf-classnames", names, "--force-image-size", 48)
    lpft = train.forked("--train-data", _labelled(world / "task"), "--precision", "fp32", *flags, name="lpft")
    assert lpft.checkpoint["state_dict"]["visual.positional_embedding"].shape[0] == 37


def test_resuming_below_a_folder_that_looks_like_a_pattern(world, train, tmp_path):
    """Training would begin anew, silently; and a hostile checkpoint there is not unpickled, whatever torch is told."""
    train.logs = tmp_path / "lr=[1e-5]"
    flags = ("--train-data", world / "task" / "task.csv", "--precision", "fp32", "--arf-checkpoint-every", 1)
    train.forked(*flags)
    run = train.forked(*flags, "--epochs", 2, "--resume", "latest")
    assert (
        "resuming checkpoint" in run.output
        and "Start epoch 1" in run.output
        and "Start epoch 0" not in run.output
    )

    other = train.forked(*flags, "--resume", "latest", model="tiny-resnet", check=False)
    assert other.status == 1 and "is of another model than this run's: " in other.output
    assert "Traceback" not in other.output

    class Command:
        def __reduce__(self):
            return Path.touch, (tmp_path / "mark",)

    torch.save({**run.checkpoint, "more": Command()}, run.folder / "checkpoints" / "epoch_3.pt")
    refused = train.forked(
        *(*flags, "--epochs", 4, "--resume", "latest"),
        check=False,
        env={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )
    assert refused.status == 1 and not (tmp_path / "mark").exists()
    assert "is no checkpoint that can be read" in refused.output and "Traceback" not in refused.output
