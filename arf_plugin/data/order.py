"""The order of raw samples in one stream of shards: seeded, numbered, and begun in the middle after a resume.

A *raw* sample is one that has been read and shuffled, but not decoded. Samples that cannot be decoded are dropped
later, and workers load ahead of the trainer, so only the number that a raw sample carries into its batch tells how
far a stream has been consumed. Skipping raw samples costs reading them; nothing is decoded twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from arf_plugin.data.rng import derive_seed, seed_loading
from arf_plugin.data.texts import SEPARATOR


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
        self._skip = consumed[_worker()] if epoch == self._epoch else 0

    def shuffling(self) -> random.Random:
        """The generator of the next pass over the shards."""
        self._passes += 1
        return random.Random(derive_seed("shuffle", *self._place(), self._passes))

    def number(self, samples: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Counts raw samples through all passes, from 1; passes over those to skip, seeds what decodes the others."""
        for sample in samples:
            self._count += 1
            if self._count > self._skip:
                seed_loading("sample", *self._place(), self._count)
                yield self._count, sample

    def _place(self) -> tuple[object, ...]:
        return self.name, self.seed, self._epoch, self.rank, _worker()


class ShardSeed:
    """A seed per consumer that is the same in every run, for shards that are drawn at random."""

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank

    def __call__(self) -> int:
        """Returns it."""
        return derive_seed("shards", self.seed, self.rank, _worker())


def with_number(text: bytes, number: int) -> bytes:
    """Appends a raw sample's number to its text, for `NumberedTokenizer` to take off again."""
    return text + f"{SEPARATOR}{number}".encode()


class NumberedTokenizer:
    """Tokenizes a numbered text into ``[1, n + 1]``: the n tokens of all its texts, and the number.

    Args:
        tokenizer: The tokenizer of the text without the number: one text -> ``[1, ...]``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: str | list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tokenizes one text, alone or in a list."""
        text, _, number = (texts if isinstance(texts, str) else texts[0]).rpartition(SEPARATOR)
        tokens = self.tokenizer(text, *args, **kwargs)
        return torch.cat([tokens.reshape(1, -1), torch.tensor([[int(number)]])], 1)


def take_numbers(tokens: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """Undoes `NumberedTokenizer` for a batch.

    Args:
        tokens: ``[B, n + 1]``.
        shape: The tokens' shape for one sample.

    Returns:
        The tokens, ``[B, *shape]``, and the number of the batch's last sample.
    """
    return tokens[:, :-1].reshape(len(tokens), *shape), int(tokens[-1, -1])


def _worker() -> int:
    worker = get_worker_info()
    return worker.id if worker else 0
