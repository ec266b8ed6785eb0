"""The order of raw samples in one stream of shards: seeded, numbered, and begun in the middle after a resume.

A *raw* sample is one that has been read and shuffled, but not decoded. Samples that cannot be decoded are dropped
later, and workers load ahead of the trainer, so only the number that a raw sample carries into its batch tells how
far a stream has been consumed. Skipping raw samples costs reading them; nothing is decoded twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import webdataset as wds
from torch.utils.data import get_worker_info

from arf_plugin.resume.rng import derive_seed, seed_loading


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
        """Lets an epoch begin in the middle; to be called before loader workers are started.

        Args:
            epoch: The epoch.
            consumed: Raw samples that each worker is to pass over.
        """
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


class Pipeline(wds.DataPipeline):
    """webdataset's pipeline, which tells an order of samples when an epoch begins."""

    def __init__(self, *stages: Any, order: SampleOrder | None = None) -> None:
        super().__init__(*stages)
        self.order = order

    def __iter__(self) -> Iterator[Any]:
        if self.order is not None:
            self.order.begin()
        iterator: Iterator[Any] = super().__iter__()
        return iterator
