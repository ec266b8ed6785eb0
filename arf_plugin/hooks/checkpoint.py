"""Saves step checkpoints, with what the trainer holds while an epoch runs."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arf_plugin.data.resume import ResumableLoader
from arf_plugin.hooks.session import Session
from arf_plugin.step_checkpoint import KEY, describe, file_name, remove_finished, remove_others, write

if TYPE_CHECKING:
    from arf_plugin.hooks.epoch import Training

LATEST = "epoch_latest.pt"  # where open_clip's --save-most-recent saves, and --resume latest then looks


class StepCheckpoints:
    """Saves a checkpoint every so many optimizer steps of the run, or when the run is to stop; an `EpochListener`.

    Args:
        session: Of the run.
        args: The trainer's arguments.
        loader: The trainer's loader; the moment after each of its batches is the moment to save.
        data: What determines the order of data, for the checkpoint.
    """

    def __init__(self, session: Session, args: Any, loader: ResumableLoader, data: Mapping[str, Any]) -> None:
        self.session = session
        self.args = args
        self.loader = loader
        self.every = session.config.checkpoint_every
        self.stop_file = Path(session.config.stop_file) if session.config.stop_file else None
        self.data = data
        self.folder = Path(args.checkpoint_path)
        # Agreeing on the processor spares a GPU the wait for its queue at every step.
        self.group = (
            torch.distributed.new_group(backend="gloo") if args.distributed and self.stop_file else None
        )
        loader.after_batch = self.after_batch

    def before_epoch(self, training: Training) -> None:
        """The last epoch's checkpoint, if there is one, makes the step checkpoints before it superfluous."""
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
        start, training = time.perf_counter(), self.session.training
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
            ),
        }
        path = self.folder / (LATEST if self.args.save_most_recent else file_name(training.epoch, step))
        write(content, path)
        remove_others(path)
        size, seconds = path.stat().st_size, time.perf_counter() - start
        logging.info(f"ARF: step checkpoint {path} ({size / 1e6:.1f} MB, {seconds:.2f} s)")

    def _all_processes(self) -> list[Any]:
        own = self.loader.state()
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
