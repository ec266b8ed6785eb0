"""What a user sets is what the trainer gets, however it is spelt; and a hub's model is found where open_clip put it."""

from __future__ import annotations

import math

import pytest
import torch

from arf_plugin.fitting import outcome
from arf_plugin.fitting.recipe import Machine, recipe
from arf_plugin.fitting.run import Fit
from arf_plugin.fitting.settings import FitSettings, overrides_of, seconds


@pytest.mark.parametrize("name", ["batch-size", "batch_size", "--batch-size"])
def test_a_flag_of_ones_own_wins_however_it_is_spelt(tmp_path, name):
    own = FitSettings(images="x", model="M@t", out=str(tmp_path), set={name: 8, "siglip": True, "no": False})
    assert own.overrides() == ["--batch-size", "8", "--siglip"]
    fit = Fit(own)
    assert fit._setting("--batch-size", {"--epochs": ("2", "why")}) == "8"
    assert fit._setting("--epochs", {"--epochs": ("2", "why")}) == "2"


def test_a_run_is_finished_by_the_whole_checkpoint_of_its_last_epoch(tmp_path):
    fit = Fit(FitSettings(images="x", model="M@t", out=str(tmp_path)))
    folder = tmp_path / "runs" / "flyp-0" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("epoch_9.pt", "epoch_10.pt", "epoch_10_step_70.pt", "epoch_latest.pt"):
        torch.save({}, folder / name)
    (folder / "epoch_11.pt").write_bytes(b"PK truncated")
    assert fit._finished("flyp-0") == folder / "epoch_10.pt" and fit._finished("flyp-1") is None


def test_set_on_the_command_line():
    own = FitSettings(images="x", model="M@t", set=overrides_of(["lr=1e-5", "--force-quick-gelu"]))
    assert own.set == {"lr": "1e-5", "force_quick_gelu": True}


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("0.5h", 1800)])
def test_times(text, expected):
    assert seconds(text) == expected


def test_the_weights_of_a_hubs_model_are_those_that_were_fetched(tmp_path, monkeypatch):
    hub = tmp_path / "hub" / "models--some--clip"
    folder = hub / "snapshots" / "1"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("1")
    folder.mkdir(parents=True)
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert outcome._original("hf-hub:some/clip") == folder / "open_clip_model.safetensors"


def test_a_batch_of_ones_own_is_the_step():
    model = {
        "parameters": 150_000_000,
        "pixels": 224,
        "samples": 415,
        "shards": 8,
        "preset": "paper",
        "pairs": True,
    }
    chosen = recipe(**model, machine=Machine(0, 0, 2))
    assert (chosen["--batch-size"][0], chosen["--accum-freq"][0]) == ("64", "2")
    own = recipe(**model, machine=Machine(0, 0, 2), batch=64)
    assert own["--batch-size"][0] == "64" and "--accum-freq" not in own
    assert own["--lr"][0] == f"{1e-5 * math.sqrt(64 / 512):.2g}" and "6 steps each" in own["--epochs"][1]


def test_what_fell_is_said_though_the_mean_did_not():
    rows = {
        "before": {"own": 40.0, "r@1": 11.0, "r@5": 20.0, "cka": 1.0, "held-out": 30.0, "kept": 20.5},
        "flyp, alpha 0.5": {"own": 50.0, "r@1": 1.0, "r@5": 2.0, "cka": 0.5, "held-out": 20.0, "kept": 10.5},
        "paper, alpha 0.75": {
            "own": 45.0,
            "r@1": 8.0,
            "r@5": 16.0,
            "cka": 0.9,
            "held-out": 37.0,
            "kept": 22.5,
        },
    }
    verdicts: dict = {"flyp": {}, "paper": {}}
    found = {"rows": rows, "best": "paper-0", "alpha": 0.75, "forgot": -2.0, "verdicts": verdicts}
    said = outcome.verdict(found)
    assert "from 40.0 to 45.0 %" in said and said.endswith("(+2.0 points), but r@1 fell by 3.0.")
