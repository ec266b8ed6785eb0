"""Plain mixing: pairs of the anchor set as task samples like all others, through the real trainer."""

from __future__ import annotations

import shutil

import open_clip
import pytest
import torch
from support import data, reference
from support.tars import write_tar


@pytest.fixture
def mixture(task, anchors):
    """Flags of a mixed run."""
    return [
        *("--train-data", f"{task.urls}::{anchors}/pairs/{{000000..000003}}.tar"),
        *("--dataset-resampled", "--train-data-upsampling-factors", "1::1", "--train-num-samples", 64),
        *task.prompts,
    ]


def test_class_prompts_for_classes_and_own_texts_for_pairs(tmp_path, train, task, anchors, mixture):
    env = {"ARF_TEST_FP64": "1", "ARF_TEST_RECORD": str(tmp_path / "record")}
    run = train.forked(*mixture, batch_size=32, env=env)
    line = "ARF: plain mixing: 32 task samples have a class and get class prompts, 24 have none and keep"
    assert line in run.output and "samples of both kinds" not in run.output
    ((images, texts),) = torch.load(tmp_path / "record.0", weights_only=True)["inputs"]
    tokenize = open_clip.get_tokenizer("ViT-B-32", context_length=texts.shape[1])
    files = {"task": reference.Files(task.folder), "pairs": reference.Files(anchors / "pairs")}
    seen = dict.fromkeys(files, 0)
    for image, tokens in zip(images, texts, strict=True):
        distances = {
            kind: (found.images - image).abs().flatten(1).amax(1).min() for kind, found in files.items()
        }
        kind = min(distances, key=lambda name: distances[name])
        sample = files[kind].samples[files[kind].ids[files[kind].find(image)]]
        seen[kind] += 1
        expected = [sample["txt"].decode()]
        if kind == "task":
            name = data.CLASSNAMES[int(sample["cls"])]
            expected = [f"a photo of a {name}.", f"a drawing of a {name}."]
        assert any(torch.equal(tokens, text) for text in tokenize(expected))
    assert sum(seen.values()) == 32 and all(seen.values()), seen


def test_mixing_without_resampling(train, task, anchors):
    """open_clip's `a::b` alone: one pass over both."""
    run = train.forked(
        *("--train-data", f"{task.urls}::{anchors}/pairs/{{000000..000003}}.tar", "--train-num-samples", 56),
        *("--arf-classnames", task.classnames),
    )
    assert "24 have none and keep their own text" in run.output and run.output.count("Train Epoch") == 7


def broken(folder, task, change):
    """A copy of the task data with the members of its first shard changed."""
    shutil.copytree(task.folder, folder)
    members = {}
    for identity, files in reference.read_tars(folder).items():
        if identity.startswith("task-0000/"):
            key = identity.partition("/")[2]
            members.update({f"{key}.{ext}": content for ext, content in change(key, files).items()})
    write_tar(folder / "task-0000.tar", members)
    return ["--train-data", f"{folder}/task-{{0000..0003}}.tar", "--train-num-samples", 32]


def test_a_shard_of_both_kinds_is_warned_about(tmp_path, train, task):
    flags = broken(
        tmp_path / "task",
        task,
        lambda key, files: {e: c for e, c in files.items() if e != "cls" or key != "000003"},
    )
    run = train.forked(*flags, "--arf-classnames", task.classnames)
    assert "1 shards hold samples of both kinds" in run.output and "task-0000.tar" in run.output
    assert "31 task samples have a class and get class prompts, 1 have none" in run.output


def test_a_sample_with_neither_is_named(tmp_path, train, task):
    flags = broken(
        tmp_path / "task", task, lambda key, files: {"png": files["png"]} if key == "000003" else files
    )
    run = train.forked(*flags, "--arf-classnames", task.classnames, check=False)
    assert run.status != 0 and "arf-plugin: error: Sample task-0000/000003 has no 'cls'" in run.output
    assert "Train Epoch" not in run.output


def test_data_without_any_class_is_refused(train, task, anchors):
    run = train.forked(
        *("--train-data", f"{anchors}/pairs/{{000000..000003}}.tar", "--train-num-samples", 24),
        *("--arf-classnames", task.classnames),
        check=False,
    )
    assert (
        run.status != 0 and "24 of 24 task samples have no 'cls', which --arf-classnames needs" in run.output
    )
