"""examples/custom_trainer.py on tars of images: a plain loop with anchors learns all three terms."""

from __future__ import annotations

import runpy
from pathlib import Path

import open_clip
import pytest
import torch
from support import data

EXAMPLE = Path(__file__).parents[3] / "examples" / "custom_trainer.py"
CAPTIONS = [
    *("a ball", "a hill", "a lamp", "a ship", "a bird", "a leaf", "a door", "a ring"),
    *("a wolf", "a drum", "a fork", "a star", "a cake", "a moon", "a shoe", "a sock"),
]


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The example's `main`, with a tiny model that open_clip knows by name."""
    monkeypatch.setenv("ARF_CACHE_DIR", str(tmp_path / "cache"))
    open_clip.add_model_config(data.write_model_configs(tmp_path / "configs"))
    return runpy.run_path(str(EXAMPLE))["main"]


def test_a_loop_of_ones_own_learns_task_and_anchors(main, tmp_path):
    task = data.write_task(tmp_path / "task", shards=2, per_shard=8, text=False)
    captions = dict(zip(task.ids, CAPTIONS, strict=True))
    data.write_captions(tmp_path / "anchors", captions)
    data.write_pairs(tmp_path / "anchors", shards=1, per_shard=8)
    history = main(
        [
            *("--train-data", str(task.folder), "--anchors", str(tmp_path / "anchors")),
            *("--classnames", str(task.classnames), "--model", "tiny-vit", "--batch-size", "8"),
            *("--epochs", "20", "--lr", "1e-3", "--out", str(tmp_path / "tuned.pt")),
        ]
    )
    assert len(history) == 40
    first, last = history[0], history[-1]
    assert set(first) == {"contrastive_loss", "caption_anchor_loss", "pair_anchor_loss"}
    # Two samples of a class share their prompt, so the task's term cannot fall as far as the others.
    assert last["contrastive_loss"] < first["contrastive_loss"]
    assert last["caption_anchor_loss"] < 0.5 * first["caption_anchor_loss"]
    assert last["pair_anchor_loss"] < 0.5 * first["pair_anchor_loss"]
    weights = torch.load(tmp_path / "tuned.pt", weights_only=True)
    open_clip.create_model("tiny-vit").load_state_dict(weights)
