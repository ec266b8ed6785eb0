"""The main process's view of a deterministic stream of batches: how far it is, and where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, RandomSampler

from arf_plugin.data.order import SampleOrder
from arf_plugin.data.rng import derive_seed, preserved_rng, seed_loading


class Stream(Protocol):
    """A loader whose position can be told and set. Loading leaves the trainer's random numbers alone."""

    def begin(self, epoch: int, batches: int, consumed: list[int]) -> None:
        """Sets where the next iteration begins: after ``batches`` batches, with `consumed` as it was then."""

    def consumed(self) -> list[int]:
        """What `begin` needs to go on after the batch that was handed out last."""

    def __iter__(self) -> Iterator[Any]: ...


class ShardStream:
    """A loader of shards, whose batches carry the numbers of their raw samples.

    Workers hand in batches in turn. A resumed loader begins with its first worker, so it goes on at the last whole
    round of all workers, and the batches of the broken round are loaded again and thrown away.

    Args:
        loader: Yields batches from `order`'s pipeline.
        workers: Its workers; 0 for none.
        order: The pipeline's order.
        split: Takes a loader's batch apart: the batch without numbers, and the number of its last sample.
        count: How many of this loader's batches an epoch's first so many micro-batches took; None for as many.
    """

    def __init__(
        self,
        loader: Any,
        workers: int,
        order: SampleOrder,
        split: Callable[[Any], tuple[Any, int]],
        count: Callable[[int, int], int] | None = None,
    ) -> None:
        self.loader = loader
        self.workers = max(1, workers)
        self.order = order
        self.split = split
        self.count = count
        self.begin(-1, 0, [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def begin(self, epoch: int, batches: int, consumed: list[int]) -> None:
        """See `Stream`."""
        if self.count is not None:
            batches = self.count(epoch, batches)
        self._discard = batches % self.workers
        self._round = list(consumed) or [0] * self.workers
        self._now = list(self._round)
        self._turn = 0
        if batches:
            self.order.start_at(epoch, self._round)

    def consumed(self) -> list[int]:
        """Raw samples that each worker's stream had given when the last round was whole."""
        return list(self._round)

    def __iter__(self) -> Iterator[Any]:
        for numbered in fenced(self.loader):
            batch, self._now[self._turn] = self.split(numbered)
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
        loader: The trainer's loader.
        seed: The run's seed.
        epoch: Reads the current epoch, also in a loader worker.

    Attributes:
        dataset: The data set itself.
    """

    def __init__(self, loader: Any, seed: int, epoch: Callable[[], int]) -> None:
        self.seed = seed
        self.dataset = loader.dataset
        self.num_batches, self.num_samples = loader.num_batches, loader.num_samples
        self._batches = _LaterBatches(loader.batch_sampler)
        self._loader: DataLoader = DataLoader(
            _SeededRows(self.dataset, seed, epoch),
            batch_sampler=self._batches,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )

    def begin(self, epoch: int, batches: int, consumed: list[int]) -> None:
        """See `Stream`."""
        self._batches.skip = batches
        sampler = self._batches.batches.sampler
        if isinstance(sampler, RandomSampler):
            sampler.generator = torch.Generator().manual_seed(derive_seed("rows", self.seed, epoch))

    def consumed(self) -> list[int]:
        """Nothing: the count of batches says it all."""
        return []

    def __iter__(self) -> Iterator[Any]:
        return fenced(self._loader)


class _SeededRows(torch.utils.data.Dataset):
    """A data set whose row depends on seed and epoch alone, not on what its worker did before."""

    def __init__(self, rows: Any, seed: int, epoch: Callable[[], int]) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        seed_loading("row", self.seed, self.epoch(), row)
        return self.rows[row]


class _LaterBatches:
    """Batches of row numbers without the first ``skip`` ones."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.skip = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for number, batch in enumerate(self.batches):
            if number >= self.skip:
                yield batch


def fenced(iterable: Iterable[Any]) -> Iterator[Any]:
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
