"""Images in batches, of sets that are read in any order, in processes; :mod:`arf_plugin.images` has a stream's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import EvaluationError

if TYPE_CHECKING:
    import torch

    from arf_plugin.evaluation.sets import EvaluationSet


@dataclass(frozen=True)
class Batch:
    """Neighbouring images of one set; batches of a set do not depend on how many processes share them.

    Attributes:
        number: place among all batches of all sets.
        dataset: index of the set.
        start: first image.
        stop: the one behind the last.
    """

    number: int
    dataset: int
    start: int
    stop: int


def plan(sizes: Sequence[int], batch_size: int) -> list[Batch]:
    """Cuts sets of the given sizes into batches."""
    places = [
        (dataset, start, min(start + batch_size, size))
        for dataset, size in enumerate(sizes)
        for start in range(0, size, batch_size)
    ]
    return [Batch(number, *place) for number, place in enumerate(places)]


class _Decoder:
    """What worker processes run: a map-style data set whose items are whole batches."""

    def __init__(
        self,
        sets: Sequence[EvaluationSet],
        batches: Sequence[Batch],
        preprocess: Callable[[Any], torch.Tensor],
    ) -> None:
        self.sets, self.batches, self.preprocess = sets, batches, preprocess

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | EvaluationError:
        import torch
        from torch.utils.data import default_collate

        batch = self.batches[index]
        try:
            samples = [self.sets[batch.dataset].samples[i] for i in range(batch.start, batch.stop)]
        except EvaluationError as error:
            return error  # as a value: a worker's exception would come with its traceback in the message
        images = [self.preprocess(image) for image, _ in samples]
        # Stacks straight into shared memory.
        return default_collate(images), torch.tensor([number for _, number in samples])


def decode(
    sets: Sequence[EvaluationSet],
    batches: Sequence[Batch],
    preprocess: Callable[[Any], torch.Tensor],
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """Starts the workers and returns what they decode, in order: images [N, 3, H, W], class numbers [N], on the device.

    One set of workers serves all sets: they decode while classifiers are built.

    Raises:
        EvaluationError: while iterating, naming the first image that cannot be read.
    """
    from torch.utils.data import DataLoader

    decoder: Any = _Decoder(sets, batches, preprocess)
    gpu = device.type == "cuda"
    loader = DataLoader(decoder, batch_size=None, num_workers=min(workers, len(batches)), pin_memory=gpu)
    started = iter(loader)  # here: the generator would wait until the first batch is asked for

    def received() -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        for batch, item in zip(batches, started, strict=True):
            if isinstance(item, EvaluationError):
                raise item
            images, numbers = item
            yield batch, images.to(device, non_blocking=gpu), numbers.to(device, non_blocking=gpu)

    return received()
