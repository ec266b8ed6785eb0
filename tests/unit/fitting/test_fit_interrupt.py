"""Ctrl-C while runs train side by side."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from arf_plugin.fitting.run import Fit, Interrupted
from arf_plugin.fitting.settings import FitSettings


def test_ctrl_c_waits_for_runs_that_have_begun_and_for_no_others(tmp_path, monkeypatch):
    said: list[str] = []
    settings = FitSettings(images="images", model="local-dir:clip", out=str(tmp_path), seeds=4, jobs=2)
    fit = Fit(settings, said.append)
    begun: list[int] = []

    def train(arm, seed, values):
        begun.append(seed)
        while not (tmp_path / "stop").exists():
            time.sleep(0.01)
        raise Interrupted("stopped")

    monkeypatch.setattr(fit, "_train", train)
    pressed = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)) for after in (0.3, 30)]
    for timer in pressed:
        timer.start()
    try:
        with pytest.raises(Interrupted, match="this goes on"):
            fit._train_all({})
        assert pressed[1].is_alive() and sorted(begun) == [0, 1]
    finally:
        for timer in pressed:
            timer.cancel()
    assert "stopping after this step" in said[-1]
