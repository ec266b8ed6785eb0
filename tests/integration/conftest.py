"""Fixtures of the tests that run whole commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.building_fixtures import arf, inputs  # noqa: F401 - pytest finds fixtures here


@pytest.fixture
def named(model_configs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the tiny ViT, which this process and `arf` in forks of it then know."""
    import open_clip

    open_clip.add_model_config(model_configs)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "shim"))
    monkeypatch.setenv("ARF_TEST_SHIM_ALWAYS", "1")
    monkeypatch.setenv("ARF_TEST_MODEL_CONFIGS", str(model_configs))
    return "tiny-vit"


@pytest.fixture
def start(tmp_path: Path, model_configs: Path) -> Path:
    """Starting weights as a checkpoint."""
    import open_clip
    import torch

    open_clip.add_model_config(model_configs)
    torch.manual_seed(3)
    path = tmp_path / "start.pt"
    torch.save(open_clip.create_model("tiny-vit").state_dict(), path)
    return path
