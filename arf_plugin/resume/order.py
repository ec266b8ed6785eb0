"""The order of samples in a stream of data: seeded, numbered, and begun in the middle after a resume.

A *raw* sample is one that has been read and shuffled, but not decoded. Samples that cannot be decoded are dropped
later, and workers load ahead of the trainer, so only the number that a raw sample carries into its batch, as ``index``,
tells how far a stream has been consumed. Skipping raw samples costs reading them; nothing is decoded twice.

`SampleOrder` is what a loader worker draws from. `ShardStream` and `RowStream` are the main process's view: how far a
stream of batches is, and where it goes on. Loading from them leaves the trainer's random numbers alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import RandomSampler, get_worker_info

from arf_plugin.resume.rng import derive_seed, preserved_rng, seed_loading

Samples = Iterator[dict[str, Any]]


class SampleOrder:
    """What one stream's pipeline draws from, in the main process or in a loader worker.

    Args:
        name: Keeps the streams of a run apart.
        seed: The run's seed.
        epoch: Reads the current epoch, also in a loader worker.
        rank: This process among all.
    """

    def __init__(self, name: str, seed: int, epoch: Callable[[], int], rank: int) -> None:
        self.name = name
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self._start: tuple[int, Sequence[int]] = (-1, ())
        self._epoch = self._passes = self._count = self._skip = 0

    def start_at(self, epoch: int, consumed: Sequence[int]) -> None:
        """Lets an epoch begin after the raw samples that each worker has ``consumed``; before workers are started."""
        self._start = (epoch, list(consumed))

    def begin(self) -> None:
        """An iteration of the pipeline begins: an epoch of this consumer."""
        self._epoch = self.epoch()
        self._passes = self._count = 0
        epoch, consumed = self._start
        self._skip = consumed[self.worker()] if epoch == self._epoch else 0

    def shuffling(self) -> random.Random:
        """The generator of the next pass over the shards."""
        self._passes += 1
        return random.Random(derive_seed("shuffle", *self._place(), self._passes))

    def shard_seed(self) -> int:
        """A seed for shards that are sampled at random: one per consumer, the same in every run."""
        return derive_seed("shards", self.seed, self.rank, self.worker())

    def number(self, samples: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Counts raw samples through all passes, from 1; passes over those to skip, seeds what decodes the others."""
        for sample in samples:
            self._count += 1
            if self._count > self._skip:
                seed_loading("sample", *self._place(), self._count)
                yield self._count, sample

    def _place(self) -> tuple[object, ...]:
        return self.name, self.seed, self._epoch, self.rank, self.worker()

    def worker(self) -> int:
        """Number of the loader worker that this is called in; 0 in the main process."""
        worker = get_worker_info()
        return worker.id if worker else 0


def decoded(raw: Iterable[Any], decode: Callable[[Any], Any], order: SampleOrder | None) -> Samples:
    """Decodes raw samples, those left out of which ``decode`` makes None; with an order they have an ``index``."""
    if order is None:
        yield from (sample for each in raw if (sample := decode(each)) is not None)
        return
    for number, each in order.number(raw):
        if (sample := decode(each)) is not None:
            yield {**sample, "index": number}


class Pipeline(wds.DataPipeline):
    """webdataset's pipeline, which tells an order of samples when an epoch begins."""

    def __init__(self, *stages: Any, order: SampleOrder | None = None) -> None:
        super().__init__(*stages)
        self.order = order

    def __iter__(self) -> Samples:
        if self.order is not None:
            self.order.begin()
        iterator: Samples = super().__iter__()
        return iterator


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
        batches: Iterable[dict[str, Any]],
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
        """The next iteration begins an epoch at its first batch."""
        self._go_on([0] * self.workers, discard=0)

    def state_dict(self) -> list[int]:
        """Raw samples that each worker's stream had given when the last round was whole."""
        return list(self._round)

    def load_state_dict(self, state: list[int], epoch: int, batches: int) -> None:
        """The next iteration goes on in an epoch after so many of its micro-batches, with the state as it was then."""
        taken = self.count(epoch, batches)
        self._go_on(list(state), taken % self.workers)
        if taken:
            self.order.start_at(epoch, self._round)

    def _go_on(self, consumed: list[int], discard: int) -> None:
        self._round, self._now = consumed, list(consumed)
        self._discard, self._turn = discard, 0

    def __iter__(self) -> Samples:
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

    def __init__(self, batches: Iterable[dict[str, Any]], sampler: Any, seed: int) -> None:
        self.batches = batches
        self.sampler = sampler
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """See `ShardStream`."""
        self.load_state_dict([], epoch, 0)

    def state_dict(self) -> list[int]:
        """Nothing: the count of batches says it all."""
        return []

    def load_state_dict(self, state: list[int], epoch: int, batches: int) -> None:
        """See `ShardStream`."""
        self.sampler.skip = batches
        rows = self.sampler.sampler
        if isinstance(rows, RandomSampler):
            rows.generator = torch.Generator().manual_seed(derive_seed("rows", self.seed, epoch))

    def __iter__(self) -> Samples:
        return isolated(self.batches)


def isolated(iterable: Iterable[Any]) -> Samples:
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
