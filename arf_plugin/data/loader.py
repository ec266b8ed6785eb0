"""The task loader and the pair loader, zipped: what the trainer iterates over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from arf_plugin.data.anchor_steps import AnchorSteps
from arf_plugin.data.batch import BatchLayout, DeviceConcat
from arf_plugin.data.epoch import SharedEpoch
from arf_plugin.data.resume import ResumableLoader
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.errors import AnchorSetError, ArfError


def split_workers(
    workers: int, layout: BatchLayout, wanted: int | None, pair_shards: int, world_size: int
) -> tuple[int, int]:
    """Divides ``--workers`` between the two loaders instead of doubling it.

    Args:
        workers: Loader workers per process.
        layout: Sizes of a batch; the default share goes by images loaded.
        wanted: ``--arf-workers``; None for the default.
        pair_shards: Pair shards there are; the default never asks for more workers than can be fed.
        world_size: Number of processes.

    Returns:
        Workers of the task loader and of the pair loader. With a single worker each loader gets one.
    """
    if not layout.pairs:
        return workers, 0
    if wanted is not None:
        return max(workers - wanted, min(workers, 1)), wanted
    share = round(workers * layout.pairs / layout.images)
    share = min(max(share, 1), max(workers - 1, 1), max(pair_shards // world_size, 1)) if workers else 0
    return max(workers - share, min(workers, 1)), share


class AnchoredLoader:
    """Yields batches in the trainer's form, with anchors in them.

    Args:
        task: open_clip's loader: ``(images [B, 3, H, W], texts [B, L] or [B, 2, L])``.
        pairs: The loader of pair anchors, or None.
        layout: Sizes of a batch.
        trimmer: Finds the length that the texts of a batch are cut to; None leaves them whole.
        steps: Which steps have anchors; None for all.

    Attributes:
        num_batches: Micro-batches per epoch, as the task loader has them.
        num_samples: Images per epoch, anchors included, so that the trainer's progress counts add up: it
            multiplies batches by the images it sees in one. Of a step without anchors it counts fewer.
    """

    def __init__(
        self,
        task: Any,
        pairs: Any | None,
        layout: BatchLayout,
        trimmer: TextTrimmer | None = None,
        steps: AnchorSteps | None = None,
    ) -> None:
        self.task = task
        self.pairs = pairs
        self.layout = layout
        self.trimmer = trimmer
        self.steps = steps or AnchorSteps()
        self.num_batches: int = task.num_batches
        self.num_samples: int = task.num_samples * layout.images // layout.task

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[DeviceConcat, DeviceConcat]]:
        try:
            pairs = iter(self.pairs) if self.pairs is not None else None
            for number, (images, texts) in enumerate(self.task, self.steps.first_batch):
                image_parts, text_parts = [images], list(texts.unbind(1)) if self.layout.captions else [texts]
                anchored = self.steps.has_anchors(number)
                if not anchored:
                    del text_parts[1:]  # the captions that came along with the task data
                if anchored and pairs is not None:
                    pair = next(pairs, None)
                    if pair is None:
                        raise AnchorSetError(
                            "The pair anchors ended before the epoch did; check the set with: arf check"
                        )
                    image_parts.append(pair[0])
                    text_parts.append(pair[1])
                columns = self.trimmer.length(*text_parts) if self.trimmer else None
                yield DeviceConcat(*image_parts), DeviceConcat(*text_parts, columns=columns)
        except ArfError as error:
            raise _from_worker(error) from None


class AnchoredData:
    """What the trainer calls ``data["train"]``: a loader, and a way to begin an epoch.

    Args:
        task: open_clip's ``DataInfo`` of the task data.
        dataloader: Its loader, the anchored one, or a resumable one around either.
        epoch: The epoch shared with our loader workers.
        steps: Which steps have anchors; None for all.
    """

    def __init__(
        self, task: Any, dataloader: Any, epoch: SharedEpoch, steps: AnchorSteps | None = None
    ) -> None:
        self.task = task
        self.dataloader = dataloader
        self.epoch = epoch
        self._resumable = dataloader if isinstance(dataloader, ResumableLoader) else None
        self.steps = steps or AnchorSteps()

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch in both loaders."""
        self.task.set_epoch(epoch)
        self.epoch.set(epoch)
        first_batch = 0
        if self._resumable is not None:
            self._resumable.begin_epoch(epoch)
            first_batch = self._resumable.first_batch
        self.steps.begin(epoch, first_batch)


def _from_worker(error: ArfError) -> ArfError:
    """Undoes the wrapping of an error that came from a loader worker, whose message holds a whole traceback."""
    marker = f"{type(error).__module__}.{type(error).__qualname__}: "
    return type(error)(str(error).rpartition(marker)[2].strip())
