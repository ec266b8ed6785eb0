"""What a fit will take: what an arm computes in a step, and how large a pool is."""

from __future__ import annotations

import pytest
import torch
from support import building

from arf_plugin.anchors.task import expand_urls
from arf_plugin.evaluation.candidates import build
from arf_plugin.fitting import speed
from arf_plugin.fitting.recipe import PRESETS

ANCHORS = ["--arf-anchors", "A"]


@pytest.mark.parametrize(
    ("terms", "captions", "images", "texts", "teacher"),
    [
        ([], True, 8, 8, 0),  # FLYP
        (ANCHORS, True, 8 + 4, 8 + 8 + 4, 0),
        ([*ANCHORS, *PRESETS["recommended"][0]], False, 8 + 4, 8 + 4, 0),
        ([*ANCHORS, *PRESETS["fast"][0]], False, 8 + 2, 8 + 2, 0),
        (["--arf-teacher", "start", "--arf-teacher-every", "4"], False, 8, 8, 2),
    ],
)
def test_what_a_step_computes(terms, captions, images, texts, teacher):
    assert speed.step_of(terms, 8, 4, captions) == (images, texts, teacher)


def test_a_pool_is_counted_by_its_first_tar(tmp_path):
    urls = expand_urls(building.write_pool(tmp_path, shards=3, per_shard=30))
    assert speed.pool_size(urls) == pytest.approx(90, rel=0.1)
    assert speed.pool_size(["s3://bucket/pool.tar"]) is None


def test_steps_are_timed_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.02)
    built = build(building.save_tiny_clip(tmp_path / "clip"), None, torch.device("cpu"))
    before = {name: weight.clone() for name, weight in built[0].state_dict().items()}
    threads = torch.get_num_threads()
    steps = {"small": speed.Step(4, 4), "large": speed.Step(64, 64, 16.0)}
    of_steps, of_image = speed.measure(built, steps, torch.device("cpu"), "fp32", 1)
    assert of_steps.keys() == steps.keys() and min(of_steps.values()) > 0 and of_image > 0
    assert torch.get_num_threads() == threads
    assert all(torch.equal(weight, before[name]) for name, weight in built[0].state_dict().items())
