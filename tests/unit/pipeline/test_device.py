"""Which device a name means. There is no GPU here, so torch is told of two."""

from __future__ import annotations

import pytest
import torch

from arf_plugin.pipeline.execution import pick_device


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_without_a_number_gets_that_of_the_process(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device(name, rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(pick_device("cuda:1")) == "cuda:1"
