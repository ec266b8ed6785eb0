"""Several processes evaluate together, as torchrun starts them: each takes a share of the batches.

Images and weights never travel; counts and confidences do, over gloo, which works with and without GPUs.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


class Processes:
    """The processes that torchrun started, or this one alone. A context: leaving it leaves the group.

    `rank` of `world` processes; `local_rank`, which picks the GPU, of `local_world` on this machine.
    """

    def __init__(self) -> None:
        env = os.environ
        # MASTER_ADDR tells torchrun from a stage's --processes and from SLURM, whose tasks evaluate on their own.
        together = "MASTER_ADDR" in env and "RANK" in env and int(env.get("WORLD_SIZE", "1")) > 1
        self.world = int(env["WORLD_SIZE"]) if together else 1
        self.rank = int(env["RANK"]) if together else 0
        self.local_rank = int(env.get("LOCAL_RANK", "0")) if together else 0
        self.local_world = int(env.get("LOCAL_WORLD_SIZE", "1")) if together else 1
        self._joined = False

    @classmethod
    def joined(cls) -> Processes:
        """The processes of the group that this one has joined already, or this one alone."""
        import torch.distributed as dist

        here = cls()
        grouped = dist.is_available() and dist.is_initialized()
        here.rank, here.world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        return here

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes results."""
        return self.rank == 0

    def __enter__(self) -> Processes:
        if self.world > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo")
                self._joined = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._joined:
            import torch.distributed as dist

            if error[0] is None:
                dist.barrier()
            dist.destroy_process_group()

    def share(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        boxes: list[T | None] = [None] * self.world
        dist.all_gather_object(boxes, value)
        return [box for box in boxes if box is not None]
