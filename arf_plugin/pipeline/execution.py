"""Who executes a stage and how: this process's share of the work, its device, threads and batches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arf_plugin.errors import FlagError, StageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Execution:
    """How a stage is executed; nothing here changes the bytes of the result.

    Attributes:
        rank, world: this process's share of the shards: every ``world``-th from ``rank`` on.
        local_rank: its number on this machine, which picks its GPU.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: threads that decode images.
        batch_size: images or texts per batch.
        restart: throw earlier work away.
        max_bad_fraction: stop when more than this fraction of the samples is rejected.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: str = "auto"
    workers: int = 2
    batch_size: int = 32
    restart: bool = False
    max_bad_fraction: float = 0.01

    def torch_device(self) -> torch.device:
        """The device; see :func:`pick_device`."""
        return pick_device(self.device, self.local_rank)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the device of a name; ``auto`` is this process's GPU if there is one, else the CPU.

    ``cuda`` without a number is this process's GPU, too, and gets its number: `torch.cuda.set_device` wants one.

    Raises:
        FlagError: if the device does not exist here.
    """
    import torch

    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise FlagError(f"--device {name} is no torch device. Expected auto, cpu, cuda or cuda:N.") from cause
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FlagError(f"--device {name}: torch sees no GPU here. Use --device cpu, or auto.")
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a precision; ``auto`` is fp16 on a GPU and fp32 elsewhere."""
    import torch

    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns (rank, world size) as torchrun, srun or a SLURM array tells them; (0, 1) otherwise.

    Raises:
        StageError: for an array with gaps, and for values that make no sense.
    """
    env = environment
    try:
        if "RANK" in env and "WORLD_SIZE" in env:
            return int(env["RANK"]), int(env["WORLD_SIZE"])
        rank, world = 0, 1
        if "SLURM_STEP_NUM_TASKS" in env:  # set by srun alone; SLURM_NTASKS is also set in the batch script
            rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        if "SLURM_ARRAY_TASK_COUNT" in env:
            step = int(env.get("SLURM_ARRAY_TASK_STEP", "1") or 1)
            low, count = int(env.get("SLURM_ARRAY_TASK_MIN", "0")), int(env["SLURM_ARRAY_TASK_COUNT"])
            high = int(env.get("SLURM_ARRAY_TASK_MAX", low + (count - 1) * step))
            if (high - low) // step + 1 != count:  # their shares would overlap, and other shards be nobody's
                raise StageError(
                    f"This SLURM array has {count} tasks with numbers from {low} to {high}: there are gaps between "
                    "them.\nSubmit it with numbers in a row, such as --array=0-7; what is finished is skipped."
                )
            rank, world = (int(env["SLURM_ARRAY_TASK_ID"]) - low) // step * world + rank, count * world
        return rank, world
    except (KeyError, ValueError) as cause:
        raise StageError(
            f"The environment's rank variables (RANK or SLURM_*) make no sense: {cause!r}."
        ) from cause
