"""The loader that the trainer iterates over when an epoch can begin in the middle."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from arf_plugin.data.rng import restore_rng, rng_state, seed_everything
from arf_plugin.data.streams import Stream


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where training goes on.

    Attributes:
        epoch: The epoch that was not finished, from 0.
        batches: Its batches per process that were trained on.
        process: What `ResumableLoader.state` said in this process; None where data order is fresh.
    """

    epoch: int
    batches: int
    process: Mapping[str, Any] | None = None


class ResumableLoader:
    """A loader that begins an epoch in the middle, and tells after each step how far it is.

    Args:
        loader: The task or anchored loader.
        streams: The streams behind it, by name; empty where data order is fresh in each run.
        seed: The run's seed; None where random numbers are left alone.
        rank: This process among all.
        resume: Where the run goes on, or None.

    Attributes:
        num_batches: Micro-batches in a whole epoch.
        num_samples: Images in a whole epoch.
        epoch: The current epoch.
        first_batch: The number that the trainer is to count the first batch of this epoch with.
        after_batch: Called with the number of batches of this epoch that have been trained on.
    """

    def __init__(
        self,
        loader: Any,
        streams: Mapping[str, Stream],
        seed: int | None,
        rank: int,
        resume: ResumePoint | None = None,
    ) -> None:
        self.loader = loader
        self.streams = streams
        self.seed = seed
        self.rank = rank
        self.resume = resume
        self.num_batches: int = loader.num_batches
        self.num_samples: int = loader.num_samples
        self.epoch = 0
        self.first_batch = 0
        self.after_batch: Callable[[int], None] = lambda batches: None

    def __len__(self) -> int:
        return self.num_batches

    def begin_epoch(self, epoch: int) -> None:
        """Begins an epoch, at its first batch or where the run was stopped."""
        self.epoch = epoch
        resume = self.resume if self.resume is not None and self.resume.epoch == epoch else None
        self.first_batch = resume.batches if resume else 0
        process = resume.process if resume else None
        if self.seed is not None:
            seed_everything("epoch", self.seed, epoch, self.rank)
        if process is not None:
            restore_rng(process["rng"])
        for name, stream in self.streams.items():
            stream.begin(epoch, self.first_batch, list(process["streams"][name]) if process else [])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this process, between two steps."""
        return {
            "rng": rng_state(),
            "streams": {name: stream.consumed() for name, stream in self.streams.items()},
        }

    def __iter__(self) -> Iterator[Any]:
        remaining = self.num_batches - self.first_batch
        for number, batch in enumerate(itertools.islice(self.loader, remaining), self.first_batch + 1):
            yield batch
            # The trainer asks for the next batch when it is done with this one.
            self.after_batch(number)
