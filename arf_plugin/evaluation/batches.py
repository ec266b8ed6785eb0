"""Images in batches, of sets that are read in any order, in processes; :mod:`arf_plugin.images` has a stream's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.distributed import Processes

if TYPE_CHECKING:
    import torch

    from arf_plugin.evaluation.sets import EvaluationSet

T = TypeVar("T")
Preprocess: TypeAlias = "Callable[[Any], torch.Tensor]"


class Batch(NamedTuple):
    """Images of a set; they do not depend on how many processes share the batches."""

    number: int  # place among all batches of all sets
    dataset: int  # index of the set
    start: int  # first image
    stop: int  # the one behind the last


def plan(sizes: Sequence[int], batch_size: int) -> list[Batch]:
    """Cuts sets of the given sizes into batches."""
    places = [
        (dataset, start, min(start + batch_size, size))
        for dataset, size in enumerate(sizes)
        for start in range(0, size, batch_size)
    ]
    return [Batch(number, *place) for number, place in enumerate(places)]


def _read(
    sets: Sequence[EvaluationSet], preprocess: Preprocess, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor] | EvaluationError:
    """What worker processes run."""
    import torch
    from torch.utils.data import default_collate

    try:
        samples = [sets[batch.dataset].samples[i] for i in range(batch.start, batch.stop)]
    except EvaluationError as error:
        return error  # as a value: a worker's exception would come with its traceback in the message
    images = [preprocess(image) for image, _ in samples]
    # Stacks straight into shared memory.
    return default_collate(images), torch.tensor([number for _, number in samples])


def decode(
    sets: Sequence[EvaluationSet],
    batches: Sequence[Batch],
    preprocess: Preprocess,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """Starts the workers and returns what they decode, in order: images [N, 3, H, W], class numbers [N], on the device.

    One set of workers serves all sets: they decode while classifiers are built.

    Raises:
        EvaluationError: while iterating, naming the first image that cannot be read.
    """
    from torch.utils.data import DataLoader

    listed: Any = batches
    gpu = device.type == "cuda"
    read = functools.partial(_read, sets, preprocess)
    loader = DataLoader(
        listed, batch_size=None, num_workers=min(workers, len(batches)), pin_memory=gpu, collate_fn=read
    )
    started = iter(loader)  # here: the generator would wait until the first batch is asked for

    def received() -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        for batch, item in zip(batches, started, strict=True):
            if isinstance(item, EvaluationError):
                raise item
            images, numbers = item
            yield batch, images.to(device, non_blocking=gpu), numbers.to(device, non_blocking=gpu)

    return received()


def shared(
    sets: Sequence[EvaluationSet],
    prepare: Callable[[EvaluationSet], Callable[[torch.Tensor, torch.Tensor], T]],
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    processes: Processes,
    advance: Callable[[int], object],
) -> Iterator[tuple[EvaluationSet, list[T]]]:
    """Shares the batches of all sets among processes, and yields set by set what became of its batches, in order.

    Args:
        sets: what to go through.
        prepare: called once a set; what it returns is called with images and class numbers of each batch.
        preprocess: the model's transform for evaluation.
        batch_size: images in a batch.
        workers: processes that decode.
        device: where images are to be.
        processes: those that take part; all of them have to iterate, and all get the results.
        advance: told of numbers of images, those of the other processes guessed.

    Raises:
        EvaluationError: while iterating, in every process, if one of them cannot read an image.
    """
    share = plan([dataset.images for dataset in sets], batch_size)[processes.rank :: processes.world]
    stream = decode(sets, share, preprocess, workers, device)
    for index, dataset in enumerate(sets):
        use = prepare(dataset)
        mine: list[tuple[int, T]] = []
        problem = None
        try:
            for batch, images, target in itertools.islice(stream, sum(b.dataset == index for b in share)):
                mine.append((batch.number, use(images, target)))
                advance(len(target) * processes.world)
        except EvaluationError as error:
            problem = error
        everyone = processes.gather((mine, problem))
        for _, found in everyone:
            if found is not None:
                raise found
        numbered = [each for theirs, _ in everyone for each in theirs]
        yield dataset, [found for _, found in sorted(numbered, key=lambda each: each[0])]
