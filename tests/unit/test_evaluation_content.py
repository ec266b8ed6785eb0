"""Figures belong to what was in the images: rows are not reused for others, and a set that is written to is noticed."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image
from support.evaluation import TEMPLATES, save_checkpoint, save_config
from torchvision.transforms.functional import to_tensor

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation import batches
from arf_plugin.evaluation.rows import read_rows
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
    """Measures a checkpoint on a set; returns the rows that there are then."""
    clip = save_config(tmp_path / "clip")
    path = save_checkpoint(clip, tmp_path / "weights.pt", 0)

    def run(root):
        evaluate([path], clip, find_sets(root), out=tmp_path / "results.jsonl", workers=0)
        return read_rows(tmp_path / "results.jsonl")

    return run


def test_rows_are_not_reused_for_other_images_of_equal_names_and_sizes(measured, tmp_path):
    paint(tmp_path / "set", {"red": "red", "blue": "blue"})
    assert len(measured(tmp_path / "set")) == len(measured(tmp_path / "set")) == 1
    paint(tmp_path / "set", {"red": "blue", "blue": "red"})
    with pytest.warns(UserWarning, match="was measured on other images"):
        rows = measured(tmp_path / "set")
    assert len(rows) == 2 and rows[0]["data"] != rows[1]["data"]
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
