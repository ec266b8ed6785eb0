"""The main process's view of a deterministic stream of batches: how far it is, and where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import RandomSampler

from arf_plugin.resume.order import SampleOrder
from arf_plugin.resume.rng import derive_seed, preserved_rng


class Stream(Protocol):
    """Batches whose position can be told and set. Loading them leaves the trainer's random numbers alone."""

    def set_epoch(self, epoch: int) -> None:
        """The next iteration begins an epoch at its first batch."""

    def state_dict(self) -> list[int]:
        """What `load_state_dict` needs to go on after the batch that was handed out last."""

    def load_state_dict(self, state: list[int], epoch: int, batches: int) -> None:
        """The next iteration goes on in an epoch after so many of its micro-batches, with the state as it was then."""

    def __iter__(self) -> Iterator[Any]: ...


class ShardStream:
    """A loader of shards, whose batches carry the numbers of their raw samples as ``index``.

    Workers hand in batches in turn. A resumed loader begins with its first worker, so it goes on at the last whole
    round of all workers, and the batches of the broken round are loaded again and thrown away.

    Args:
        batches: The loader; its pipeline has `order`.
        workers: Its workers; 0 for none.
        order: The pipeline's order.
        count: How many of this loader's batches an epoch's first so many micro-batches took; None for as many.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, torch.Tensor]],
        workers: int,
        order: SampleOrder,
        count: Callable[[int, int], int] | None = None,
    ) -> None:
        self.batches = batches
        self.workers = max(1, workers)
        self.order = order
        self.count = count or (lambda epoch, batches: batches)
        self.set_epoch(-1)

    def set_epoch(self, epoch: int) -> None:
        """See `Stream`."""
        self._go_on([0] * self.workers, discard=0)

    def state_dict(self) -> list[int]:
        """Raw samples that each worker's stream had given when the last round was whole."""
        return list(self._round)

    def load_state_dict(self, state: list[int], epoch: int, batches: int) -> None:
        """See `Stream`."""
        taken = self.count(epoch, batches)
        self._go_on(list(state), taken % self.workers)
        if taken:
            self.order.start_at(epoch, self._round)

    def _go_on(self, consumed: list[int], discard: int) -> None:
        self._round, self._now = consumed, list(consumed)
        self._discard, self._turn = discard, 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in isolated(self.batches):
            self._now[self._turn] = int(batch.pop("index")[-1])
            self._turn = (self._turn + 1) % self.workers
            if not self._turn:
                self._round = list(self._now)
            if self._discard:
                self._discard -= 1
            else:
                yield batch


class RowStream:
    """A loader of a data set with a length (CSV): its order is that of its sampler, its position a count of batches.

    Args:
        batches: The loader.
        sampler: Its batches of row numbers, of which it can leave out the first ``skip``.
        seed: The run's seed.
    """

    def __init__(self, batches: Iterable[dict[str, torch.Tensor]], sampler: Any, seed: int) -> None:
        self.batches = batches
        self.sampler = sampler
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """See `Stream`."""
        self.load_state_dict([], epoch, 0)

    def state_dict(self) -> list[int]:
        """Nothing: the count of batches says it all."""
        return []

    def load_state_dict(self, state: list[int], epoch: int, batches: int) -> None:
        """See `Stream`."""
        self.sampler.skip = batches
        rows = self.sampler.sampler
        if isinstance(rows, RandomSampler):
            rows.generator = torch.Generator().manual_seed(derive_seed("rows", self.seed, epoch))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return isolated(self.batches)


def isolated(iterable: Iterable[Any]) -> Iterator[Any]:
    """Iterates without a trace in this process's random numbers, from which the model may draw."""
    with preserved_rng():
        iterator = iter(iterable)
    while True:
        with preserved_rng():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
