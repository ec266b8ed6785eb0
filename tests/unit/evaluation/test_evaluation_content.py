"""Scores belong to what was in the images: other images get records of their own, and writing to a set is noticed."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from PIL import Image
from support import building
from support.evaluation import TEMPLATES, save_checkpoint, save_config, write_set
from support.tars import write_tar
from torchvision.transforms.functional import to_tensor

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation import batches
from arf_plugin.evaluation.records import read_records
from arf_plugin.evaluation.run import evaluate
from arf_plugin.evaluation.sets import find_sets


def paint(root, colours):
    """Images of equal names and sizes, whatever their colours, with times that go back."""
    for name, colour in colours.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        path = root / name / "0.bmp"
        Image.new("RGB", (32, 32), colour).save(path)
        os.utime(path, (1e9, 1e9))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))


@pytest.fixture
def measured(tmp_path):
    """Measures a checkpoint on a set; returns the records that there are then."""
    clip = save_config(tmp_path / "clip")
    path = save_checkpoint(clip, tmp_path / "weights.pt", 0)

    def run(root):
        evaluate([path], clip, find_sets(root), out=tmp_path / "results.jsonl", workers=0)
        return read_records(tmp_path / "results.jsonl")

    return run


def test_records_are_not_reused_for_other_images_of_equal_names_and_sizes(measured, tmp_path):
    paint(tmp_path / "set", {"red": "red", "blue": "blue"})
    assert len(measured(tmp_path / "set")) == len(measured(tmp_path / "set")) == 1
    paint(tmp_path / "set", {"red": "blue", "blue": "red"})
    with pytest.warns(UserWarning, match="was measured on other images"):
        records = measured(tmp_path / "set")
    assert len(records) == 2 and records[0]["data"] != records[1]["data"]
    paint(tmp_path / "set", {"red": "red", "blue": "blue"})  # as they were at first
    assert len(measured(tmp_path / "set")) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_that_is_written_to_meanwhile(tmp_path, workers):
    paint(tmp_path / "set", {"red": "red", "blue": "blue"})
    sets = find_sets(tmp_path / "set")
    paint(tmp_path / "set", {"red": "green"})
    stream = batches.decode(sets, batches.plan([2], 2), to_tensor, workers, torch.device("cpu"))
    with pytest.raises(EvaluationError, match=r"red/0\.bmp: the image is not the one that was there"):
        list(stream)


@pytest.fixture
def images(tmp_path):
    """A set of two tars of drawings with six classes."""
    return write_set(tmp_path / "sets" / "shapes")


def test_images_of_equal_names_and_sizes_are_other_data(tmp_path, images):
    root = tmp_path / "folders"
    for name in "ab":
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), "red").save(root / name / "0.bmp")
    before, size = find_sets(root)[0], (root / "a" / "0.bmp").stat()
    Image.new("RGB", (4, 4), "blue").save(root / "a" / "0.bmp")
    os.utime(root / "a" / "0.bmp", ns=(size.st_atime_ns, size.st_mtime_ns))
    assert (root / "a" / "0.bmp").stat().st_size == size.st_size
    assert find_sets(root)[0].samples.digest != before.samples.digest
    with pytest.raises(EvaluationError, match=r"a/0\.bmp: the image is not the one that was there"):
        before.samples[0]
    [tars] = find_sets(images)
    members = [(f"{n:04d}.{ext}", data) for n in range(9) for ext, data in sample(n + 1, n % 6)]
    write_tar(images / "test" / "0.tar", members)
    with pytest.raises(EvaluationError, match=r"0\.tar, sample 0000: the image is not the one"):
        tars.samples[0]
    assert find_sets(images)[0].samples.digest != tars.samples.digest


def sample(drawn, cls):
    return ("jpg", building.drawing(drawn)), ("cls", str(cls).encode())


@pytest.mark.process  # waits for seconds
def test_digests_of_large_sets_are_computed_once(tmp_path, monkeypatch):
    """The cache knows them by size, times and inode; what has just been written is not trusted to it."""
    monkeypatch.setenv("ARF_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "set"
    for name in "ab":
        (root / name).mkdir(parents=True)
        Image.new("RGB", (2000, 2000), "red").save(root / name / "0.bmp")
    digest = find_sets(root)[0].samples.digest
    assert not (tmp_path / "cache").exists()
    time.sleep(2.1)
    assert find_sets(root)[0].samples.digest == digest
    [cached] = (tmp_path / "cache" / "evaluation").iterdir()
    kept = json.loads(cached.read_text())
    cached.write_text(json.dumps(["0" * 64, *kept[1:]]))
    assert find_sets(root)[0].samples.digest != digest  # it was read from there
    cached.write_text("[" * 100_000)
    assert find_sets(root)[0].samples.digest == digest
    with (root / "a" / "0.bmp").open("r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    assert find_sets(root)[0].samples.digest != digest
