"""This process's share of a stage's work, as torchrun, srun or a SLURM array tells it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from arf_plugin.errors import StageError


def ranks(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Returns (rank, world size) as torchrun, srun or a SLURM array tells them; (0, 1) otherwise."""
    env = os.environ if environment is None else environment
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
