"""All hyper-parameters in one place."""

from __future__ import annotations

from benchmarks.recipe import FAST, Recipe, Training

__all__ = ["FAST", "FULL"]

FULL = Recipe(
    pretraining=Training(epochs=12, batch_size=64, lr=1e-3, warmup=100, scale=0.6, samples=10240),
    captioner_steps=400,
    neighbours=10,
    fine_tuning=Training(epochs=15, batch_size=64, lr=5e-4, warmup=10, scale=0.6),
)
