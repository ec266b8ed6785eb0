"""What the trainer says before and at its first step: of random weights, of counts, of a loss worse than guessing."""

from __future__ import annotations

import os

import pytest
import torch
from support import data

from arf_plugin import files


@pytest.fixture
def weights(train, task, tmp_path):
    """A checkpoint of the tiny model that has learned the task's classes."""
    flags = [*task.flags, "--arf-classnames", task.classnames]
    flags += ["--arf-templates", task.templates, "--epochs", 60, "--save-frequency", 60]
    run = train.forked(*flags, name="learned")
    return run.folder / "checkpoints" / "epoch_60.pt"


def test_anchors_for_random_weights_are_refused(train, task, anchors):
    flags = [*task.flags, "--arf-anchors", anchors]
    argv = train.argv

    def without_leave(*args, **kwargs):
        return [word for word in argv(*args, **kwargs) if word != "--arf-random-weights"]

    train.argv = without_leave
    run = train.forked(*flags, check=False)
    assert run.status != 0 and "come from no file and are random" in run.output
    assert "--pretrained is not given" in run.output and "Train Epoch" not in run.output


def test_weights_from_a_file_need_no_leave(train, task, anchors, tmp_path):
    run = train.forked(*task.flags, name="first")
    torch.save(run.checkpoint["state_dict"], tmp_path / "w.pt")
    argv = train.argv
    train.argv = lambda *a, **k: [word for word in argv(*a, **k) if word != "--arf-random-weights"]
    flags = ["--train-data", task.urls, "--arf-anchors", anchors, "--pretrained", tmp_path / "w.pt"]
    run = train.forked(*flags, name="second")
    assert "come from no file" not in run.output
    assert "--lr 0.001 is a rate for training from scratch" in run.output
    # The number of samples was not given.
    assert "32 usable samples were counted" in run.output and run.output.count("Train Epoch") == 4


def test_class_names_in_another_order_show_in_the_first_loss(train, task, tmp_path, weights):
    reversed_names = tmp_path / "reversed.txt"
    reversed_names.write_text("\n".join(reversed(data.CLASSNAMES)) + "\n")
    common = [*task.flags, "--pretrained", weights]
    common += ["--arf-templates", task.templates, "--arf-classnames"]
    assert "the first loss is" not in train.forked(*common, task.classnames, name="right").output
    assert "the first loss is" in train.forked(*common, reversed_names, name="wrong").output


def replaced(path, change) -> None:
    """Writes a file's content anew, with another content of the same size and the same time of change."""
    before = path.stat()
    content = change(path.read_bytes())
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("what", ["captions", "pairs", "task", "nothing"])
def test_a_deterministic_run_is_not_resumed_with_other_data(train, tmp_path, what):
    folder = tmp_path / "inputs"
    task = data.write_task(folder / "task", shards=1, per_shard=32)
    anchors = folder / "anchors"
    data.write_captions(anchors, {identity: f"a caption of {identity}" for identity in task.ids})
    data.write_pairs(anchors, shards=1, per_shard=16)
    flags = [*task.flags, "--arf-anchors", anchors]
    flags += ["--arf-deterministic", "--arf-checkpoint-every", 1, "--arf-stop-file", tmp_path / "stop"]
    (tmp_path / "stop").touch()
    train.forked(*flags)
    if what == "captions":
        said = {identity: f"A caption of {identity}" for identity in task.ids}
        files.content_digest([data.write_captions(anchors, said)])
    elif what == "pairs":
        replaced(anchors / "pairs/000000.tar", lambda tar: tar.replace(b"a pair text", b"A pair text"))
    elif what == "task":
        replaced(task.folder / "task-0000.tar", lambda tar: tar.replace(b"an own text", b"An own text"))
    run = train.forked(*flags, "--resume", "latest", check=False)
    if what == "nothing":
        assert run.status == 0 and "exactly where it stopped" in run.output
    else:
        assert run.status != 0 and "belongs to a run with other data" in run.output
        assert f"{what.rstrip('s')} contents: sha256" in run.output
        assert run.output.count(" contents: sha256") == 1


def test_a_csv_whose_images_were_replaced_is_not_resumed(train, tmp_path):
    csv = data.write_csv_task(tmp_path / "task", 32)
    flags = ["--train-data", csv, "--arf-deterministic", "--arf-stop-file", tmp_path / "stop"]
    (tmp_path / "stop").touch()
    train.forked(*flags)
    (tmp_path / "task/7.png").write_bytes(data.image(700))
    run = train.forked(*flags, "--resume", "latest", check=False)
    assert run.status != 0 and "task contents: sha256" in run.output


def test_runs_that_could_not_make_a_step_are_refused(train, tmp_path, task):
    csv = data.write_csv_task(tmp_path / "task", 7)
    run = train.forked("--train-data", csv, "--arf-deterministic", check=False)
    assert run.status != 0 and "less than one batch of --batch-size 8" in run.output
    flags = [*task.flags, "--arf-deterministic"]
    run = train.forked(*flags, "--accum-freq", 5, name="accum", check=False)
    assert run.status != 0 and "fewer than --accum-freq 5" in run.output
    run = train.forked(*flags, "--workers", 4, "--batch-size", 16, name="workers", check=False)
    assert run.status != 0 and "less than a batch of --batch-size 16: training would wait" in run.output
