"""The frontier's choice is made on validation figures, and what it writes becomes a table; how its ViT begins."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

from arf_plugin.evaluation.records import append_record

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import pretrain  # noqa: E402
from benchmarks.trainer import model_folder  # noqa: E402
from emojinet import frontier  # noqa: E402
from emojinet.split import MONO_VENDORS  # noqa: E402

VENDORS = ("twemoji", "openmoji", "fluent-emoji", "fluent-emoji-flat", "emojione", "emojione-v1", "fxemoji")


def arm(name: str, cost: float | None, validation: list[float], test: float = 40.0) -> dict:
    figures = dict.fromkeys(frontier.METRICS, test)
    return {
        "arm": name,
        "label": name.upper(),
        "cost": None if cost is None else {"median": cost, "min": cost, "max": cost},
        "mean": figures,
        "std": None if cost is None else dict.fromkeys(frontier.METRICS, 0.5),
        "per_seed": {},
        "validation": {str(seed): value for seed, value in enumerate(validation)},
    }


ARMS = [
    arm("before", None, [30.0]),
    arm("flyp", 0.9, [40.0, 40.0, 40.0]),
    arm("arf", 1.8, [39.0, 40.0, 41.0]),
    arm("a4", 1.2, [39.0, 39.0, 39.2], test=10.0),
    arm("every4", 1.1, [38.0, 38.9, 39.0], test=60.0),
]


def test_the_cheapest_arm_that_validation_cannot_tell_from_the_full_one_is_chosen():
    """Neither FLYP, however good it is, nor the arm with the best test figures."""
    assert frontier.choose(ARMS) == "a4"
    assert frontier.choose([entry for entry in ARMS if entry["arm"] != "a4"]) == "arf"
    assert frontier.choose([entry for entry in ARMS if entry["arm"] != "arf"]) is None


@pytest.mark.process  # draws with Matplotlib
def test_table_and_picture(tmp_path):
    result = {"metrics": list(frontier.METRICS), "arms": ARMS, "chosen": "a4"}
    lines = frontier.table(result).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["BEFORE", "FLYP", "EVERY4", "A4", "ARF"]
    assert lines[4].endswith("<- chosen") and "10.0 ± 0.5" in lines[4] and " 1.20" in lines[4]
    frontier.plot(result, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_validation_figures_are_read_by_arm_and_seed(tmp_path):
    """Of the runs themselves, not of their mixtures; the mean of ID, shift, mono and zero-shot."""
    sets = {"id": 80.0, "zero_shot": 20.0, "zero_shot_fine": 99.0}
    sets |= {f"shift/{vendor}": 40.0 for vendor in VENDORS} | {
        f"shift/{vendor}": 4.0 for vendor in MONO_VENDORS
    }
    shift = statistics.fmean(value for name, value in sets.items() if name.startswith("shift/"))
    for arm_name, seed, alpha in (("a4", 0, None), ("a4-every2", 1, None), ("a4", 0, 0.5)):
        for name, value in sets.items():
            row = {
                "format": 1,
                "set": name,
                "checkpoint": f"runs/{arm_name}-{seed}/weights.pt",
                "alpha": alpha,
            }
            append_record(
                tmp_path / "validation.jsonl", row | {"metrics": {"top1": value}, "headline": "top1"}
            )
    mean = round((80 + shift + 4 + 20) / 4, 3)
    found = frontier.validation_means(tmp_path, {"suite": "emojinet"})
    assert found == {"a4": {"0": mean}, "a4-every2": {"1": mean}}


@pytest.mark.process  # makes a model of full size
def test_the_vision_transformer_begins_with_the_texts_of_the_quickstarts_clip(tmp_path):
    import open_clip
    import torch
    from open_clip.transformer import VisionTransformer
    from safetensors.torch import save_file

    clip = open_clip.create_model(model_folder(tmp_path / "run" / "clip")).eval()
    save_file(clip.state_dict(), tmp_path / "run" / "clip" / pretrain.WEIGHTS)
    begun = open_clip.create_model(pretrain.start(tmp_path / "run", tmp_path / "begun")).eval()
    texts = open_clip.tokenize(["a red apple", "an owl"], context_length=clip.context_length)
    assert torch.equal(begun.encode_text(texts), clip.encode_text(texts))
    assert type(begun.visual) is VisionTransformer
    assert torch.equal(begun.logit_scale, clip.logit_scale)
