"""Puts the parts of a resumable run together: orders, streams, the loader around them, and what saves."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from arf_plugin.anchors.task import is_csv
from arf_plugin.config import ArfConfig
from arf_plugin.data.anchor_steps import AnchorSteps
from arf_plugin.data.batch import BatchLayout
from arf_plugin.data.epoch import SharedEpoch
from arf_plugin.data.order import SampleOrder, take_numbers
from arf_plugin.data.resume import ResumableLoader
from arf_plugin.data.streams import RowStream, ShardStream, Stream
from arf_plugin.hooks.checkpoint import StepCheckpoints
from arf_plugin.hooks.session import Session
from arf_plugin.step_checkpoint import check_streams, resume_point

if TYPE_CHECKING:
    from arf_plugin.hooks.epoch import Training


def sample_orders(config: ArfConfig, args: Any, epoch: SharedEpoch) -> dict[str, SampleOrder]:
    """The order of both streams, where it is to be the same in every run."""
    if not config.deterministic:
        return {}
    return {name: SampleOrder(name, args.seed, epoch.get, args.rank) for name in ("task", "pairs")}


def task_stream(
    loader: Any,
    args: Any,
    config: ArfConfig,
    layout: BatchLayout,
    orders: dict[str, SampleOrder],
    workers: int,
) -> Stream:
    """The task loader of a deterministic run, with a position."""
    if is_csv(args.train_data, args.dataset_type):
        return RowStream(loader, args.seed, orders["task"].epoch)
    shape = () if config.head else (2, -1) if layout.captions else (-1,)

    def split(batch: Any) -> tuple[Any, int]:
        texts, number = take_numbers(batch[1], shape)
        return (batch[0], texts), number

    return ShardStream(loader, workers, orders["task"], split)


def pair_stream(loader: Any, workers: int, order: SampleOrder, steps: AnchorSteps) -> Stream:
    """The pair loader of a deterministic run, with a position."""
    return ShardStream(loader, workers, order, lambda batch: (batch[:2], int(batch[2][-1])), steps.count)


def resumable_loader(
    loader: Any, streams: dict[str, Stream], session: Session, args: Any, identity: dict[str, Any]
) -> ResumableLoader:
    """The loader of a run that saves or resumes in the middle of an epoch, or is deterministic."""
    config, point = session.config, None
    if session.resumed is not None:
        point = resume_point(
            session.resumed,
            data=identity,
            num_batches=loader.num_batches,
            accum_freq=args.accum_freq,
            rank=args.rank,
            deterministic=config.deterministic,
        )
        if point.process is not None:
            check_streams(
                point.process, {name: getattr(stream, "workers", 0) for name, stream in streams.items()}
            )
        if args.rank == 0:
            order = "exactly where it stopped" if config.deterministic else "with the data in a fresh order"
            logging.info(
                f"ARF: epoch {point.epoch} goes on after {point.batches} of {loader.num_batches} batches, {order}."
            )
    if config.deterministic and args.distributed and not getattr(args, "fsdp", False):
        session.listeners.append(FixedBuckets())
    seed = args.seed if config.deterministic else None
    resumable = ResumableLoader(loader, streams, seed, args.rank, point)
    if config.saves_steps:
        session.listeners.append(StepCheckpoints(session, args, resumable, identity))
    return resumable


class FixedBuckets:
    """Fixes in which order processes sum their gradients; an `EpochListener`.

    DistributedDataParallel arranges gradients in other buckets after the first step of a process, and where more than
    two processes sum, the order decides the last bits: a resumed run's first step would differ. Arranged by parameters
    before the first step, the buckets stay, at the price of less overlap between backward pass and communication.
    """

    def __init__(self) -> None:
        self._done = False

    def before_epoch(self, training: Training) -> None:
        """Arranges the buckets, once in a process."""
        if not self._done:
            getattr(training.model, "_orig_mod", training.model).reducer._push_all_rebuilt_params()
            self._done = True

    def after_epoch(self, training: Training) -> None:
        """Nothing to do."""
