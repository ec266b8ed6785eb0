"""Every kind of bad input ends the real trainer before its first step, with a message of its own."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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
        self.pairs = self.anchors / "pairs" / "000000.tar"
        self.train_data = self.task.urls
        self.flags: list[object] = []

    def replace_captions(self, table: dict) -> None:
        shutil.rmtree(self.anchors / "captions")
        (self.anchors / "captions").mkdir()
        pq.write_table(pa.table(table), self.anchors / "captions" / "part-00000.parquet")

    def change_pairs(self, **changes: bytes | None) -> None:
        """Rewrites the first pair shard with some members of its first pair changed, or left out (None)."""
        with tarfile.open(self.pairs) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for extension, content in changes.items():
            members[f"000000.{extension}"] = content
        write_tar(self.pairs, {name: content for name, content in members.items() if content is not None})


def no_anchors(inputs):
    shutil.rmtree(inputs.anchors)
    return "anchors does not exist", "arf anchors"


def empty_anchors(inputs):
    shutil.rmtree(inputs.anchors)
    inputs.anchors.mkdir()
    return "is empty: no captions/*.parquet and no pairs/*.tar (found: nothing)", "arf anchors"


def wrong_columns(inputs):
    inputs.replace_captions({"key": ["a"], "text": ["b"]})
    return (
        "captions/part-00000.parquet has no column 'id' and no column 'caption' (found: key, text)",
        "arf caption",
    )


def not_parquet(inputs):
    (inputs.anchors / "captions" / "part-00000.parquet").write_bytes(b"hello, I am a text file")
    return "captions/part-00000.parquet is no readable parquet file", "arf caption"


def captions_of_other_data(inputs):
    inputs.replace_captions({"id": ["imagenet-0000/1", "imagenet-0000/2"], "caption": ["a", "b"]})
    return "cover none of the 32 task samples", "'task-0000/000000'", "'imagenet-0000/", "arf check"


def one_missing_caption(inputs):
    ids = [identity for identity in inputs.task.ids if identity != "task-0001/000011"]
    inputs.replace_captions({"id": ids, "caption": [f"a caption of {identity}" for identity in ids]})
    return "No caption for task sample task-0001/000011", "--arf-missing-caption prompt"


def caption_not_utf8(inputs):
    ids = inputs.task.ids
    captions = [b"fine"] * (len(ids) - 1) + [b"caf\xe9"]
    inputs.replace_captions({"id": ids, "caption": pa.array(captions, pa.binary())})
    return "captions/part-00000.parquet, row 31: caption is not UTF-8", "byte 3"


def caption_with_null(inputs):
    ids = inputs.task.ids
    inputs.replace_captions({"id": ids, "caption": ["fine"] * 30 + [None, "fine"]})
    return "captions/part-00000.parquet, row 30: caption is None", "arf caption"


def truncated_pair_image(inputs):
    inputs.change_pairs(png=data.image(1)[:200])
    return "000000.tar, pair 000000: ", "arf pack"


def truncated_tar(inputs):
    inputs.pairs.write_bytes(inputs.pairs.read_bytes()[:5000])
    return "000000.tar is cut off or corrupt"


def path_escape(inputs):
    write_tar(inputs.pairs, {"../../evil.png": data.image(1), "../../evil.txt": b"x"})
    return "a member whose name leaves the folder: '../../evil.png'"


def pair_without_text(inputs):
    inputs.change_pairs(txt=None)
    return "000000.tar, pair 000000: has no txt", "arf pack"


def pair_text_not_utf8(inputs):
    inputs.change_pairs(txt=b"caf\xe9")
    return "000000.tar, pair 000000: has a txt that is not UTF-8"


def key_twice(inputs):
    first = inputs.task.folder / "task-0000.tar"
    with tarfile.open(first) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(first, "w") as tar:
        for name, content in members + members[:3]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return "task-0000.tar has the key '000000' twice"


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


def more_workers_than_pair_shards(inputs):
    inputs.flags = ["--workers", 6, "--arf-workers", 5]
    return "4 pair shards for 5 loader workers", "--arf-workers 4"


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


def shards_without_text(inputs):
    inputs.task = data.write_task(inputs.folder / "bare", shards=4, per_shard=8, text=False)
    inputs.train_data = inputs.task.urls
    return "No task sample has a 'txt'", "--arf-classnames"


def missing_task_shard(inputs):
    (inputs.task.folder / "task-0002.tar").unlink()
    return "task-0002.tar does not exist"


BREAKAGES = [
    *(no_anchors, empty_anchors, wrong_columns, not_parquet, captions_of_other_data, one_missing_caption),
    *(
        caption_not_utf8,
        caption_with_null,
        truncated_pair_image,
        truncated_tar,
        path_escape,
        pair_without_text,
    ),
    *(pair_text_not_utf8, key_twice, id_in_two_shards, more_workers_than_task_shards),
    *(more_workers_than_pair_shards, coca, template_without_a_place, shards_without_text, missing_task_shard),
    class_names_of_other_data,
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
    shard = inputs.task.folder / "task-0001.tar"
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    members["000011.png"] = members["000011.png"][:200]
    write_tar(shard, members)
    flags = ["--train-data", inputs.train_data, "--train-num-samples", 32, "--arf-anchors", inputs.anchors]
    run = train.forked(*flags)
    assert "1 of 32 task images are unreadable and will be skipped, first: task-0001/000011" in run.output
    assert run.output.count("Train Epoch") == 4
