"""Runs of the trainer that are killed and resumed, and what must be equal in the end."""

from __future__ import annotations

import random
import re
import signal
from typing import Any

import torch

from arf_plugin.safe_loading import plain_numbers
from support.trainer import Run, Trainer


def last_checkpoint(run: Run, epoch: int) -> dict[str, Any]:
    """open_clip's own checkpoint after an epoch."""
    with torch.serialization.safe_globals(plain_numbers()):
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
    """Schedule and losses of the logged steps, by epoch and percent; the last line of a repeated step.

    open_clip 4 counts the samples of an epoch from where the run goes on, and percent from the epoch's begin.
    """
    pattern = r"Train Epoch: (\d+) \[.*?\((\d+)%\).*(LR: [\d.]+) (Logit Scale: [\d.]+) (.*)"
    return {
        (int(epoch), int(percent)): f"{rate} {scale} {re.sub(r' [(][^)]*[)]', '', losses)}"
        for epoch, percent, rate, scale, losses in re.findall(pattern, output)
    }


def run_until(train: Trainer, flags: list[Any], moment: float, action: str, **options: Any) -> Run:
    """Runs the trainer, and does something to it at a moment of the run, in epochs.

    The process does it to itself right after it has logged the moment, so that no load of the machine moves it.

    Args:
        train: The trainer.
        flags: Its flags.
        moment: 1.5 is the middle of the second epoch.
        action: One of tests/shim's: ``kill SECONDS``, ``kill-in-fsync``, ``touch FILE`` or ``interrupt``.
        **options: Of the run.
    """
    started = train.start(*flags, env={"ARF_TEST_AT": str(moment), "ARF_TEST_DO": action}, **options)
    return started.wait(patience=0 if action.startswith("kill") else 1)


def run_killed(
    train: Trainer, flags: list[Any], moment: float, action: str = "kill 0", **options: Any
) -> Run:
    """Runs the trainer and kills it; fails if it ends before."""
    run = run_until(train, flags, moment, action, **options)
    assert run.status == -signal.SIGKILL, run.output
    return run


def run_with_kills(
    train: Trainer, flags: list[Any], kills: list[float], seed: int = 0, check: bool = True, **options: Any
) -> Run:
    """Runs the trainer, killed shortly after each of some moments, and resumed each time.

    Returns:
        The last run, with the output of all.
    """
    rng, output = random.Random(seed), ""
    for moment in kills:
        action = f"kill {rng.uniform(0, 0.05)}"
        output += run_killed(train, [*flags, "--resume", "latest"], moment, action, **options).output
    last = train.forked(*flags, "--resume", "latest", check=check, **options)
    return Run(last.status, output + last.output, last.folder)
