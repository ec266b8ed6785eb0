"""Runs of the trainer that are killed and resumed, and what must be equal in the end."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import torch

from support.trainer import Run, Started, Trainer


def last_checkpoint(run: Run, epoch: int) -> dict[str, Any]:
    """open_clip's own checkpoint after an epoch."""
    return torch.load(run.folder / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)


def equal(one: Any, other: Any) -> bool:
    """Whether two nests of tensors and values are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def assert_same_end(run: Run, other: Run, epochs: int) -> None:
    """Weights and optimizer of two runs are the same to the bit after their last epoch."""
    one, two = (last_checkpoint(each, epochs) for each in (run, other))
    for part in ("epoch", "state_dict", "optimizer"):
        assert equal(one[part], two[part]), f"{part} differs"


def steps(output: str) -> dict[tuple[int, int], str]:
    """Schedule and losses of the logged steps, by epoch and samples seen; the last line of a repeated step."""
    pattern = r"Train Epoch: (\d+) \[ *(\d+)/.*(LR: [\d.]+) (Logit Scale: [\d.]+) (.*)"
    return {
        (int(epoch), int(seen)): f"{rate} {scale} {re.sub(r' [(][^)]*[)]', '', losses)}"
        for epoch, seen, rate, scale, losses in re.findall(pattern, output)
    }


def progress(output: str) -> float:
    """Epochs that are done, as the last logged step counts them: 1.5 is the middle of the second."""
    logged = re.findall(r"Train Epoch: (\d+) \[.*?\((\d+)%\)", output)
    return int(logged[-1][0]) + int(logged[-1][1]) / 100 if logged else 0.0


def kill_after(started: Started, epochs: float, delay: float) -> bool:
    """Kills a run ``delay`` seconds after it has logged so many epochs; False if it ended before."""
    end = time.monotonic() + 240
    while not started.output.exists() or progress(started.output.read_text()) < epochs:
        if not started.running or time.monotonic() > end:
            return False
        time.sleep(0.005)
    time.sleep(delay)
    landed = started.running
    started.kill()
    return landed


def run_with_kills(
    train: Trainer, flags: list[Any], kills: list[float], seed: int = 0, **options: Any
) -> Run:
    """Runs the trainer, killed at random moments after so many epochs, and resumed each time.

    Returns:
        The last run, with the output of all.
    """
    rng, output = random.Random(seed), ""
    for epochs in kills:
        started = train.start(*flags, "--resume", "latest", **options)
        landed = kill_after(started, epochs, rng.uniform(0, 0.2))
        text = started.output.read_text()
        output += text
        assert landed, text
    last = train.forked(*flags, "--resume", "latest", **options)
    return Run(last.status, output + last.output, last.folder)
