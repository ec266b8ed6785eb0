"""Runs that save step checkpoints, go on from one, or are deterministic: what open_clip's main is given for it."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arf_plugin.checks.inputs import Run
from arf_plugin.data.loader import TrainingLoader
from arf_plugin.hooks.session import Session
from arf_plugin.resume.checkpoint import (
    KEY,
    check_streams,
    describe,
    file_name,
    remove_finished,
    remove_others,
    resume_point,
    write,
)
from arf_plugin.resume.identity import content_of_data, data_identity
from arf_plugin.resume.streams import ShardStream

if TYPE_CHECKING:
    from arf_plugin.hooks.training import Training

LATEST = "epoch_latest.pt"  # where open_clip's --save-most-recent saves, and --resume latest then looks


def make_resumable(
    loader: TrainingLoader,
    session: Session,
    args: Any,
    shape: Run,
    on_first_rank: Callable[[Callable[[], Any]], Any],
) -> None:
    """Lets a loader begin in the middle of an epoch, if the run goes on there, and save as the flags say.

    Args:
        loader: The loader of the run.
        session: The run.
        args: The trainer's arguments.
        shape: Which data this process gets.
        on_first_rank: Calls a function in the first process and hands its result to all.
    """
    config = session.config
    contents = on_first_rank(lambda: content_of_data(args, config)) if config.deterministic else {}
    identity = data_identity(args, config, shape, contents)
    if session.resumed is not None:
        point = loader.resume = resume_point(
            session.resumed,
            data=identity,
            num_batches=loader.num_batches,
            accum_freq=args.accum_freq,
            rank=args.rank,
            deterministic=config.deterministic,
        )
        if point.process is not None:
            counts = {
                name: stream.workers if isinstance(stream, ShardStream) else 0
                for name, stream in loader.streams.items()
            }
            check_streams(point.process, counts)
        if args.rank == 0:
            order = "exactly where it stopped" if config.deterministic else "with the data in a fresh order"
            logging.info(
                f"ARF: epoch {point.epoch} goes on after {point.batches} of {loader.num_batches} batches, {order}."
            )
    if config.deterministic and args.distributed and not getattr(args, "fsdp", False):
        session.listeners.append(FixedBuckets())
    if config.saves_steps:
        session.listeners.append(StepCheckpoints(session, args, loader, identity))


class FixedBuckets:
    """Fixes in which order processes sum their gradients; an `EpochListener`.

    DistributedDataParallel arranges gradients in other buckets after the first step of a process, and where more than
    two processes sum, the order decides the last bits: a resumed run's first step would differ. Arranged by parameters
    before the first step, the buckets stay, at the price of less overlap between backward pass and communication.
    """

    def __init__(self) -> None:
        self._done = False

    def before_epoch(self, training: Training) -> None:
        """Arranges the buckets, once in a process. torch has no public way to it."""
        if not self._done:
            getattr(training.model, "_orig_mod", training.model).reducer._push_all_rebuilt_params()
            self._done = True

    def after_epoch(self, training: Training) -> None:
        """Nothing to do."""


class StepCheckpoints:
    """Saves a checkpoint every so many optimizer steps of the run, or when the run is to stop; an `EpochListener`.

    Args:
        session: The run.
        args: The trainer's arguments.
        loader: The trainer's loader; the moment after each of its batches is the moment to save.
        data: What determines the order of data, for the checkpoint.
    """

    def __init__(self, session: Session, args: Any, loader: TrainingLoader, data: Mapping[str, Any]) -> None:
        config = session.config
        self.session = session
        self.args = args
        self.loader = loader
        self.every = config.checkpoint_every
        self.stop_file = Path(config.stop_file) if config.stop_file else None
        self.data = data
        self.folder = Path(args.checkpoint_path)
        self.training: Training | None = None
        # Agreeing on the processor spares a GPU the wait for its queue at every step.
        self.group = (
            torch.distributed.new_group(backend="gloo") if args.distributed and self.stop_file else None
        )
        loader.after_batch.append(self.after_batch)

    def before_epoch(self, training: Training) -> None:
        """The last epoch's checkpoint, if there is one, makes the step checkpoints before it superfluous."""
        self.training = training
        if self.args.rank == 0:
            remove_finished(self.folder, training.epoch)

    def after_epoch(self, training: Training) -> None:
        """open_clip saves its last checkpoint after the last epoch, and then tells nobody."""
        if self.args.rank == 0 and training.epoch + 1 == self.args.epochs:
            atexit.register(remove_finished, self.folder, self.args.epochs)

    def after_batch(self, batches: int) -> None:
        """Saves, if an optimizer step that is due has just been made."""
        accum = self.args.accum_freq
        step = self.loader.num_batches // accum * self.loader.epoch + batches // accum
        if batches % accum:
            return
        stop = self._must_stop()
        if stop or (self.every and step % self.every == 0):
            self.save(batches, step)
        if stop:
            self._stop(step)

    def _must_stop(self) -> bool:
        """Whether the stop file is there; all processes get the answer of the first one."""
        if self.stop_file is None:
            return False
        there = torch.tensor([self.args.rank == 0 and self.stop_file.exists()])
        if self.group is not None:
            torch.distributed.broadcast(there, 0, group=self.group)
        return bool(there)

    def _stop(self, step: int) -> None:
        """Ends this process, after the first one has obeyed and removed the file."""
        if self.args.rank == 0 and self.stop_file is not None:
            self.stop_file.unlink(missing_ok=True)
            logging.info(
                f"ARF: {self.stop_file} asked to stop; step {step} is saved. Go on with --resume latest."
            )
        raise SystemExit(0)

    def save(self, batches: int, step: int) -> None:
        """Saves on the first process, with the state of all; every process must call it after the same step."""
        start, training = time.perf_counter(), self.training
        assert training is not None, "the trainer runs an epoch"
        processes = self._all_processes() if self.session.config.deterministic else None
        content = training.content() if training.gathers or not self.args.rank else {}
        if self.args.rank:
            return
        content |= {
            "optimizer": _plain(content["optimizer"]),
            KEY: describe(
                epoch=training.epoch,
                step=step,
                batches=batches,
                num_batches=self.loader.num_batches,
                data=self.data,
                processes=processes,
                average=self.session.average.state_dict() if self.session.average is not None else None,
            ),
        }
        path = self.folder / (LATEST if self.args.save_most_recent else file_name(training.epoch, step))
        write(content, path)
        remove_others(path)
        size, seconds = path.stat().st_size, time.perf_counter() - start
        logging.info(f"ARF: step checkpoint {path} ({size / 1e6:.1f} MB, {seconds:.2f} s)")

    def _all_processes(self) -> list[Any]:
        own = self.loader.state_dict()
        if not self.args.distributed:
            return [own]
        gathered: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(gathered, own)
        return gathered


def _plain(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without the numpy numbers that open_clip before 2.30 sets as learning rate.

    They are the same numbers, and as floats any torch loads them.
    """
    groups = [
        {name: float(value) if isinstance(value, float) else value for name, value in group.items()}
        for group in optimizer["param_groups"]
    ]
    return {**optimizer, "param_groups": groups}
