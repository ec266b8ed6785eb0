"""Which optimizer steps of a run have anchors: all of them, or every n-th.

With ``--arf-every N`` a step has anchors if its number, counted from 0 over the whole run, is a multiple of N. Their
terms then weigh N times as much, so the expected gradient is that of anchors on every step; the other steps are FLYP's,
and cost as much. Ours, not the paper's.
"""

from __future__ import annotations


class AnchorSteps:
    """Tells of each micro-batch of an epoch whether it has anchors; the same in all processes.

    Args:
        every: N; 1 for anchors on every step.
        accum_freq: Micro-batches in an optimizer step, which is with anchors or without as a whole.
        num_batches: Micro-batches of an epoch. The trainer drops those at its end that fill no step.

    Attributes:
        first_batch: Number of the first micro-batch of this epoch, which is not 0 where a run was resumed.
    """

    def __init__(self, every: int = 1, accum_freq: int = 1, num_batches: int = 0) -> None:
        self.every = every
        self.accum_freq = accum_freq
        self.steps_per_epoch = num_batches // accum_freq
        self.epoch = 0
        self.first_batch = 0

    def begin(self, epoch: int, first_batch: int = 0) -> None:
        """Begins an epoch, at its first micro-batch or a later one."""
        self.epoch = epoch
        self.first_batch = first_batch

    def has_anchors(self, batch: int) -> bool:
        """Whether a micro-batch of this epoch, counted from 0, has anchors."""
        return self._has_anchors(self.epoch, batch)

    def count(self, epoch: int, batches: int) -> int:
        """How many of an epoch's first micro-batches have anchors."""
        if self.every == 1:
            return batches
        return sum(self._has_anchors(epoch, batch) for batch in range(batches))

    def _has_anchors(self, epoch: int, batch: int) -> bool:
        return (self.steps_per_epoch * epoch + batch // self.accum_freq) % self.every == 0
