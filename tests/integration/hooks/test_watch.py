"""--arf-watch through the real trainer: what it sees, where it says so, and that training does not notice."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import open_clip
import pytest
import torch
from support import building, data, evaluation, loggers, releases
from support.loggers import TENSORBOARD, WANDB
from support.tars import write_tar

from arf_plugin.errors import FlagError
from arf_plugin.hooks.table import trains_tasks

ROOT = Path(__file__).parents[3]
# Of the default, amp, a CPU's fp16 overflows with these weights: no step is made.
FP32 = ("--precision", "fp32")


@pytest.fixture
def held_out(tmp_path) -> Path:
    """18 drawings of 6 colours."""
    return evaluation.write_set(tmp_path / "held-out")


@pytest.fixture
def start(tmp_path, model_configs) -> Path:
    """Weights whose features and predictions differ from image to image."""
    open_clip.add_model_config(model_configs)
    path = tmp_path / "start.pt"
    torch.save(evaluation.weights("tiny-vit", 1), path)
    return path


@pytest.fixture
def task_csv(tmp_path) -> Path:
    return data.write_csv_task(tmp_path / "csv", 16)


@pytest.fixture
def csv_anchors(tmp_path, task_csv) -> Path:
    data.write_csv_captions(tmp_path / "csv-anchors", task_csv)
    data.write_pairs(tmp_path / "csv-anchors", shards=2, per_shard=8)
    return tmp_path / "csv-anchors"


def watched(task_csv: Path, held_out: Path, start: Path) -> tuple:
    """Flags of a run from known weights, with everything watched."""
    return (
        *("--train-data", task_csv, *FP32, "--pretrained", start),
        *("--arf-watch", held_out, "--arf-watch-drift"),
    )


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "arf_watch.jsonl").read_text().splitlines()]


def same_checkpoint(one, other) -> bool:
    a, b = one.checkpoint, other.checkpoint
    moments = [
        torch.equal(a["optimizer"]["state"][key]["exp_avg"], b["optimizer"]["state"][key]["exp_avg"])
        for key in a["optimizer"]["state"]
    ]
    return all(moments) and all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())


def test_training_does_not_notice(train, task_csv, csv_anchors, held_out):
    """Bit-equal weights and moments with and without, plain and with anchors; augmentation draws random numbers."""
    for name, flags in (("plain", []), ("arf", ["--arf-anchors", csv_anchors])):
        common = (
            "--train-data",
            task_csv,
            "--force-patch-dropout",
            0.5,
            "--aug-cfg",
            "scale=(0.5,1.0)",
            *flags,
        )
        without = train.forked(*common, name=name)
        watched = train.forked(*common, "--arf-watch", held_out, "--arf-watch-drift", name=f"{name}-watched")
        assert len(rows(watched)) == 2 and "ARF watch" not in without.output
        assert same_checkpoint(without, watched), name
    assert not same_checkpoint(without, train.forked("--train-data", task_csv, name="other"))


def test_frozen_batch_norm_stays_frozen(train, task_csv, held_out):
    run = train.forked(
        "--train-data", task_csv, "--arf-watch", held_out, "--arf-freeze-bn", model="tiny-resnet"
    )
    state = run.checkpoint["state_dict"]
    counters = [value for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert counters and all(value == 0 for value in counters)
    thawed = train.forked(
        "--train-data", task_csv, "--arf-watch", held_out, model="tiny-resnet", name="thawed"
    )
    state = thawed.checkpoint["state_dict"]
    assert {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")} == {2}


@releases.FOLDERS_OF_MODELS
def test_figures_are_those_of_arf_evaluate(train, run_arf, tmp_path, task_csv, held_out, start):
    folders = evaluation.write_folders(tmp_path / "by-folder")
    evaluation.write_texts(folders, sorted(evaluation.NAMES))
    run = train.forked(
        *("--train-data", task_csv, *FP32, "--pretrained", start, "--epochs", 2),
        *("--arf-watch", held_out, folders, "--arf-watch-drift"),
    )
    seen = {(row["epoch"], row["set"]): row for row in rows(run)}
    assert list(seen) == [(epoch, name) for epoch in (0, 1, 2) for name in ("held-out", "by-folder")]
    clip = evaluation.save_config(tmp_path / "clip")
    checkpoints = [start, *(run.folder / "checkpoints" / f"epoch_{epoch}.pt" for epoch in (1, 2))]
    run_arf(
        *("evaluate", *checkpoints, "--model", clip, "--data", held_out, folders),
        *("--out", tmp_path / "rows.jsonl", "--workers", 0),
    )
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        watched = seen[checkpoints.index(Path(row["checkpoint"])), row["set"]]
        assert watched["data"] == row["data"] and watched["prompts"] == row["prompts"]
        assert watched["metrics"] == {name: value for name, value in row["metrics"].items() if name != "ece"}
    before, after = seen[0, "held-out"], seen[2, "held-out"]
    assert before["start"] == after["start"] == before["metrics"]["top1"] and after["step"] == 4
    assert set(before["drift"].values()) == {1.0} and all(-1 < v < 1 for v in after["drift"].values())
    assert f"after epoch 2: held-out: zero-shot top-1 {after['metrics']['top1']:.2f} %" in run.output


def test_collapse_is_warned_about(train, task_csv, tmp_path, start):
    """The classes of the starting model's own answers: it begins at 100 %, and a huge learning rate loses them."""
    images = tmp_path / "own-answers"
    model = open_clip.create_model("tiny-vit")
    model.load_state_dict(torch.load(start, weights_only=True))
    _, _, preprocess = open_clip.create_model_and_transforms("tiny-vit")
    tokens = open_clip.get_tokenizer("tiny-vit")([f"a photo of {name}" for name in data.CLASSNAMES])
    from PIL import Image

    evaluation_set = {}
    with torch.no_grad():
        classes = model.eval().encode_text(tokens, normalize=True)
        for number in range(40):
            path = tmp_path / f"{number}.png"
            path.write_bytes(data.image(900 + number))
            features = model.encode_image(preprocess(Image.open(path))[None])
            evaluation_set[path] = int((features @ classes.T).argmax())
    for path, cls in evaluation_set.items():
        (images / str(cls)).mkdir(parents=True, exist_ok=True)
        path.rename(images / str(cls) / path.name)
    names = [data.CLASSNAMES[cls] for cls in sorted(set(evaluation_set.values()))]
    assert len(names) > 1
    (images / "classnames.txt").write_text("\n".join(names))
    (images / "zeroshot_classification_templates.txt").write_text("a photo of {c}")
    flags = ("--train-data", task_csv, *FP32, "--pretrained", start, "--arf-watch", images)
    run = train.forked(*flags, "--lr", 1, name="collapse")
    before, after = rows(run)
    assert before["metrics"]["top1"] == 100 and after["metrics"]["top1"] < 90
    assert "has collapsed: 100.0 % before training" in run.output and "WARNING" in run.output
    calm = train.forked(*flags, "--lr", 0, name="calm")
    assert "collapsed" not in calm.output and "guessing" not in calm.output
    tolerant = train.forked(*flags, "--lr", 1, "--arf-watch-drop", 1, name="tolerant")
    assert "collapsed" not in tolerant.output


def test_weights_that_are_not_numbers_any_more(train, task_csv, held_out):
    run = train.forked(
        "--train-data", task_csv, "--arf-watch", held_out, "--arf-watch-drift", "--lr", 1e30, "--epochs", 2
    )
    assert rows(run)[-1]["drift"]["image_cka"] is None and 0 <= rows(run)[-1]["metrics"]["top1"] <= 100


def test_two_processes_see_what_one_sees(train, task_csv, held_out, start):
    common = watched(task_csv, held_out, start)
    one = train.forked(*common, "--lr", 0, name="one", batch_size=4)
    two = train.forked(*common, "--lr", 0, "--workers", 1, nproc=2, name="two", batch_size=4)
    assert two.output.count("before training: held-out") == 1
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["metrics"] == b["metrics"] and a["drift"] == pytest.approx(b["drift"], abs=1e-6)


@pytest.mark.parametrize("precision", ["amp_bf16", "pure_bf16"])
def test_precisions(train, task_csv, held_out, precision):
    run = train.forked("--train-data", task_csv, "--arf-watch", held_out, "--precision", precision)
    assert [row["precision"] for row in rows(run)] == [precision] * 2


def test_a_resumed_run_goes_on_with_its_start(train, task_csv, held_out, start):
    common = watched(task_csv, held_out, start)
    train.forked(*common, "--epochs", 1)
    run = train.forked(*common, "--epochs", 2, "--resume", "latest")
    assert "ARF watch: goes on; top-1 before training" in run.output
    assert [row["epoch"] for row in rows(run)] == [0, 1, 2] and len({row["start"] for row in rows(run)}) == 1
    whole = train.forked(*common, "--epochs", 2, name="whole")
    for a, b in zip(rows(run)[:2], rows(whole)[:2], strict=True):
        assert a["metrics"] == b["metrics"] and a["drift"] == b["drift"]
    assert rows(run)[2]["drift"]["image_cosine"] < 1


def test_a_resumed_run_whose_starting_features_are_damaged(train, task_csv, held_out, start):
    common = watched(task_csv, held_out, start)
    run = train.forked(*common, "--epochs", 1)
    features = run.folder / "arf_watch_start.pt"
    other = {"held-out": {"image": torch.zeros(3, 2), "text": torch.zeros(6, 2)}}
    for number, damage in enumerate((b"", features.read_bytes()[:500], other), 2):
        if isinstance(damage, bytes):
            features.write_bytes(damage)
        else:
            torch.save(damage, features)
        run = train.forked(*common, "--epochs", number, "--resume", "latest")
        assert "drift is measured from here on" in run.output and "Traceback" not in run.output
        assert run.output.count("ARF watch: before") + run.output.count("ARF watch: after") >= 2


def test_a_resumed_run_whose_file_of_rows_is_damaged(train, task_csv, held_out, start):
    common = watched(task_csv, held_out, start)
    run = train.forked(*common, "--epochs", 1)
    path = run.folder / "arf_watch.jsonl"
    whole = path.read_text()
    path.write_text("[" * 100_000 + "\n" + whole)
    run = train.forked(*common, "--epochs", 2, "--resume", "latest", check=False)
    assert run.status == 1 and "arf_watch.jsonl, line 1 is no JSON" in run.output
    assert "Traceback" not in run.output and "Train Epoch: 1" not in run.output
    path.write_text(whole.replace('"data": "', '"data": "0'))  # as of another version
    run = train.forked(*common, "--epochs", 2, "--resume", "latest")
    assert "has no scores of the set 'held-out' as it is now" in run.output


def test_tensorboard_has_every_term_the_scale_and_the_watch(train, task, anchors, held_out):
    assert TENSORBOARD.is_dir(), f"tensorboard is missing in {TENSORBOARD}: run scripts/test.sh"
    run = train.forked(
        *(*task.flags, "--arf-anchors", anchors),
        *("--arf-watch", held_out, "--arf-watch-drift", "--report-to", "tensorboard"),
        env={"PYTHONPATH": f"{train.env['PYTHONPATH']}{os.pathsep}{TENSORBOARD}"},
    )
    events = loggers.tensorboard_events(run.folder / "tensorboard")
    for term in ("contrastive_loss", "caption_anchor_loss", "pair_anchor_loss", "loss"):
        logged = [float(value) for value in re.findall(rf" {term.capitalize()}: ([\d.]+) \(", run.output)]
        assert [step for step, _ in events[f"train/{term}"]] == [0, 1, 2, 3]
        assert [value for _, value in events[f"train/{term}"]] == pytest.approx(logged, rel=1e-3)
    scale = "train/logit_scale" if trains_tasks(releases.current()) else "train/scale"
    assert [value for _, value in events[scale]] == pytest.approx([14.28] * 4, rel=0.02)
    seen = {row["epoch"]: row for row in rows(run)}
    assert events["watch/held-out/top1"] == [(e, pytest.approx(seen[e]["metrics"]["top1"])) for e in (0, 1)]
    assert events["watch/held-out/image_cka"][0] == (0, 1.0)


@pytest.mark.slow
def test_wandb_has_the_watch_at_the_steps_of_training(train, task_csv, held_out, tmp_path):
    """wandb itself, offline; its file of records is a log as LevelDB writes it, of protobuf messages."""
    loggers.install_wandb()
    path = f"{train.env['PYTHONPATH']}{os.pathsep}{WANDB}{os.pathsep}{TENSORBOARD}"
    env = {"PYTHONPATH": path, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    flags = ("--train-data", task_csv, "--arf-watch", held_out, "--arf-watch-drift", "--epochs", 2)
    run = train(*flags, "--report-to", "wandb", env=env)
    (records,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history = loggers.wandb_history(records)
    seen = {line["_step"]: line["watch/held-out/top1"] for line in history if "watch/held-out/top1" in line}
    assert seen == {row["step"]: row["metrics"]["top1"] for row in rows(run)} and list(seen) == [0, 2, 4]
    assert [line["_step"] for line in history if "train/contrastive_loss" in line] == [0, 1, 2, 3]


@pytest.mark.parametrize("broken", ["missing", "empty", "classes", "image", "twice"])
def test_a_set_that_cannot_be_watched_stops_before_the_first_step(
    train, tmp_path, task_csv, held_out, broken
):
    folders = [held_out]
    if broken == "missing":
        folders, expected = [tmp_path / "nowhere"], "--arf-watch: There is no folder"
    elif broken == "empty":
        (tmp_path / "nothing").mkdir()
        folders, expected = [tmp_path / "nothing"], "There is no evaluation set in or below"
    elif broken == "classes":
        evaluation.write_texts(held_out, evaluation.NAMES[:3])
        expected = "expected a number from 0 to 2"
    elif broken == "image":
        members = [("0.jpg", building.drawing(0)[:300]), ("0.cls", b"0")]
        write_tar(held_out / "test" / "1.tar", members)
        expected = "sample 0: the image"
    else:
        folders, expected = (
            [held_out, evaluation.write_set(tmp_path / "b" / "held-out")],
            "two sets are called",
        )
    run = train.forked("--train-data", task_csv, "--arf-watch", *folders, check=False)
    assert run.status == 1 and expected in run.output, run.output
    assert "Traceback" not in run.output and "Train Epoch" not in run.output


@pytest.mark.slow
def test_an_image_that_vanishes_later_does_not_end_the_training(train, tmp_path, task_csv):
    """Each process's optimizer step deletes it, which is after the first look."""
    folders = evaluation.write_folders(tmp_path / "folders")
    evaluation.write_texts(folders, sorted(evaluation.NAMES))
    victim = next(folders.rglob("*.png"))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests' / 'shim')!r})\n"
        f"exec(open({str(ROOT / 'tests' / 'shim' / 'sitecustomize.py')!r}).read())\n"
        "import os, torch\n"
        "step = torch.optim.AdamW.step\n"
        "def gone(self, closure=None):\n"
        f"    os.path.exists({str(victim)!r}) and os.remove({str(victim)!r})\n"
        "    return step(self, closure)\n"
        "torch.optim.AdamW.step = gone\n"
    )
    run = train(
        "--train-data",
        task_csv,
        "--arf-watch",
        folders,
        env={"PYTHONPATH": str(tmp_path)},
        nproc=2,
        batch_size=4,
    )
    assert run.output.count("nothing measured after epoch 1") == 2 and victim.name in run.output
    assert run.checkpoint["epoch"] == 1


def test_flags_that_need_it(parse):
    for flags in (["--arf-watch-drift"], ["--arf-watch-drop", "0.2"]):
        with pytest.raises(FlagError, match="given without --arf-watch"):
            parse("--train-data", "x.tar", *flags)
    with pytest.raises(SystemExit):
        parse("--train-data", "x.tar", "--arf-watch", "f", "--arf-watch-drop", "20")
    assert parse("--train-data", "x.tar", "--arf-watch", "a", "b").watch == ("a", "b")
