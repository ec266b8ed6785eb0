"""Bad input ends the real trainer before its first step, with a message of its own."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from support import data
from support.tars import write_tar


class Inputs:
    """A whole set of inputs in a folder of its own, to be broken by a test."""

    def __init__(self, folder: Path, task: data.Task, anchors: Path) -> None:
        self.folder = folder
        self.anchors = folder / "anchors"
        shutil.copytree(anchors, self.anchors)
        shutil.copytree(task.folder, folder / "task")
        self.task = data.Task(folder / "task", task.shards, dict(task.samples))
        self.train_data = self.task.urls
        self.flags: list[object] = []


def change(tar: Path, name: str, content: bytes) -> None:
    """Rewrites a tar with another content of a member."""
    with tarfile.open(tar) as whole:
        members = {member.name: whole.extractfile(member).read() for member in whole}
    write_tar(tar, {**members, name: content})


def no_anchors(inputs):
    shutil.rmtree(inputs.anchors)
    return "anchors does not exist", "arf anchors"


def one_missing_caption(inputs):
    ids = [identity for identity in inputs.task.ids if identity != "task-0001/000011"]
    data.write_captions(inputs.anchors, {identity: f"a caption of {identity}" for identity in ids})
    return "No caption for task sample task-0001/000011", "--arf-missing-caption prompt"


def truncated_pair_image(inputs):
    change(inputs.anchors / "pairs" / "000000.tar", "000000.png", data.image(1)[:200])
    return "000000.tar, pair 000000: ", "arf pack"


def id_in_two_shards(inputs):
    other = inputs.folder / "other" / "task-0000.tar"
    other.parent.mkdir()
    shutil.copy(inputs.task.folder / "task-0000.tar", other)
    inputs.train_data = f"{inputs.task.urls}::{other}"
    return (
        "The id 'task-0000/000000' occurs twice in the task data",
        "/task/task-0000.tar",
        "/other/task-0000.tar",
    )


def more_workers_than_task_shards(inputs):
    inputs.flags = ["--workers", 12, "--arf-workers", 2]
    return "4 task shards for 10 loader workers", "Lower --workers"


def coca(inputs):
    inputs.flags = ["--model", "coca_ViT-B-32"]
    return "--model coca_ViT-B-32: CoCa", "without --arf-* flags"


def class_names_of_other_data(inputs):
    names = inputs.folder / "names.txt"
    names.write_text("cat\ndog\n")
    inputs.flags = ["--arf-classnames", names]
    return "expected a class index from 0 to 1", "names.txt"


def template_without_a_place(inputs):
    templates = inputs.folder / "templates.txt"
    templates.write_text("a photo of a {c}.\na photo\n")
    inputs.flags = ["--arf-classnames", inputs.task.classnames, "--arf-templates", templates]
    return "templates.txt, line 2: 'a photo' has no place for the class name"


def a_glob_where_braces_are_meant(inputs):
    inputs.train_data = f"{inputs.task.folder}/*.tar"
    return "is a glob (4 files)", "/task-{0000..0003}.tar'"


def no_templates(inputs):
    inputs.flags = [*inputs.task.prompts[:2], "--arf-templates", inputs.folder / "nowhere.txt"]
    return "nowhere.txt cannot be read"


def no_such_model(inputs):
    inputs.flags = ["--model", "ViT-B-61"]
    return "Did you mean 'ViT-B-16'"


def no_such_weights(inputs):
    inputs.flags = ["--model", "ViT-B-16", "--pretrained", "opnai"]
    return "Did you mean 'openai'"


# What is not there is missed before the trainer makes a folder, or loads a model.
NOT_THERE = (no_anchors, a_glob_where_braces_are_meant, no_templates, no_such_model, no_such_weights)

# One of each part of the inputs; all rules are tried in tests/unit/checks, where both of their reporters say the same.
BREAKAGES = [
    *(no_anchors, one_missing_caption, truncated_pair_image, id_in_two_shards, more_workers_than_task_shards),
    *(coca, template_without_a_place, class_names_of_other_data, *NOT_THERE[1:]),
]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
def test_bad_input_is_named_before_the_first_step(tmp_path, train, task, anchors, breakage):
    inputs = Inputs(tmp_path / "inputs", task, anchors)
    expected = breakage(inputs)
    flags = ["--train-data", inputs.train_data, "--train-num-samples", 32, "--arf-anchors", inputs.anchors]
    run = train.forked(*flags, *inputs.flags, check=False)
    assert run.status != 0
    for part in [expected] if isinstance(expected, str) else expected:
        assert part in run.output, run.output
    assert "arf-plugin: error: " in run.output
    assert "/arf_plugin/" not in run.output, "a traceback through our code instead of a message"
    assert "Train Epoch" not in run.output and not list(run.folder.glob("checkpoints/*.pt"))
    assert breakage not in NOT_THERE or not run.folder.exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--arf-caption-weight", "0.5"],
        ["--arf-pair-weight", "0"],
        ["--arf-pair-batch-size", "4"],
        ["--arf-every", "2"],
        ["--arf-workers", "1"],
        ["--arf-missing-caption", "prompt"],
    ],
    ids=lambda flags: flags[0],
)
def test_anchor_flags_need_an_anchor_set(parse, flags):
    from arf_plugin.errors import FlagError

    with pytest.raises(FlagError, match=rf"{flags[0]} given without --arf-anchors"):
        parse("--train-data", "x.tar", *flags)


def test_anchor_flags_without_an_anchor_set_end_the_trainer(train, task):
    run = train.forked("--train-data", task.urls, "--arf-pair-weight", "0.5", check=False)
    assert run.status != 0 and "--arf-pair-weight given without --arf-anchors" in run.output


def test_a_missing_caption_can_be_filled_with_the_prompt(tmp_path, train, task, anchors):
    inputs = Inputs(tmp_path / "inputs", task, anchors)
    one_missing_caption(inputs)
    flags = ["--train-data", inputs.train_data, "--train-num-samples", 32, "--arf-anchors", inputs.anchors]
    run = train.forked(*flags, "--arf-missing-caption", "prompt")
    assert "1 of 32 task samples have no caption (first: task-0001/000011)" in run.output
    assert "Caption_anchor_loss" in run.output


def test_two_processes_stop_together_with_one_message(tmp_path, train, task, anchors):
    """The first process finds the error, none waits for it or trains on."""
    inputs = Inputs(tmp_path / "inputs", task, anchors)
    one_missing_caption(inputs)
    flags = ["--train-data", inputs.train_data, "--train-num-samples", 32, "--arf-anchors", inputs.anchors]
    run = train.forked(*flags, nproc=2, check=False)
    assert run.status != 0 and run.output.count("arf-plugin: error: No caption for task sample") == 1
    assert "Train Epoch" not in run.output


def test_an_unreadable_task_image_needs_no_caption(tmp_path, train, task, anchors):
    """No captioner could describe it and open_clip skips it, so it does not stop the run."""
    inputs = Inputs(tmp_path / "inputs", task, anchors)
    one_missing_caption(inputs)
    change(inputs.task.folder / "task-0001.tar", "000011.png", data.image(11)[:200])
    flags = ["--train-data", inputs.train_data, "--train-num-samples", 32, "--arf-anchors", inputs.anchors]
    run = train.forked(*flags)
    assert "1 of 32 task images are unreadable and will be skipped, first: task-0001/000011" in run.output
    assert run.output.count("Train Epoch") == 4
