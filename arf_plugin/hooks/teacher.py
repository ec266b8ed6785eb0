"""The teacher in a run: where it runs, when its weights are averaged, and where the average is kept.

open_clip's own distillation (``--distill-model``) would run its teacher on anchors, too, on every step, without
accumulation and without SigLIP; and what it learns from are similarities. So ours runs where a micro-batch is handed
out: there its task images and texts have names, in every form of the trainer, before anything is compiled or
accumulated; and asking for the next batch is the sign that an optimizer step has been made.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from open_clip import get_input_dtype
from torch import nn

from arf_plugin.data.batch import Batch, DeviceConcat
from arf_plugin.data.loader import AnchorSteps, TrainingLoader
from arf_plugin.errors import CheckpointError
from arf_plugin.hooks.session import EpochListener, Session, Training, autocast_of
from arf_plugin.losses.average import WeightAverage
from arf_plugin.losses.teacher import teach
from arf_plugin.safe_loading import first_line
from arf_plugin.trainer_args import TrainerArgs

NAME = "average_{}.pt"  # beside epoch_{}.pt; sorts before it, so --resume latest finds that


def add_teacher(loader: TrainingLoader, session: Session, args: TrainerArgs, epoch: int) -> None:
    """Lets a loader run the teacher, and average its weights, as the flags say.

    ``epoch`` counts whole epochs that have been trained.

    Raises:
        CheckpointError: The run goes on from a checkpoint that has no average.
    """
    config, facts = session.config, session.model
    assert facts is not None and facts.copy is not None, "the model is built before its data"
    if config.teacher_weight:
        loader.before_batch = RunningTeacher(facts.copy, loader, args, config.teacher_every)
    if config.teacher == "average":
        steps = loader.steps.steps_per_epoch * args.epochs
        session.average = WeightAverage(facts.copy, facts.model, steps)
        averaging = Averaging(session.average, loader, args)
        averaging.start(session.resumed, epoch)
        loader.after_batch.insert(0, averaging.after_batch)  # before step checkpoints, which keep it
        if config.save_average:
            session.listeners.append(averaging)
    if args.rank == 0:
        names = {"start": "the starting model", "average": "the average of the weights so far"}
        rarely = f", on one step in {config.teacher_every}" if config.teacher_every > 1 else ""
        logging.info(
            f"ARF: the teacher on the task batch is {names[config.teacher or '']} (weight "
            f"{config.teacher_weight:g}{rarely}); it is a copy of the model in memory."
        )


class RunningTeacher:
    """Gives a micro-batch the teacher's features, on the steps that have the term: one in ``every``."""

    def __init__(self, model: nn.Module, loader: TrainingLoader, args: TrainerArgs, every: int) -> None:
        self.model, self.loader = model, loader
        self.steps = AnchorSteps(every, args.accum_freq, loader.num_batches)
        self.device = torch.device(args.device)
        self.dtype = get_input_dtype(args.precision)
        self.autocast = autocast_of(args.precision, self.device)

    def __call__(self, number: int, batch: Batch) -> None:
        """Adds the features to the batch, and leaves its images on the device, where the trainer wants them next."""
        if not self.steps.has_anchors(self.loader.epoch, number):
            return
        trimmer, text = self.loader.trimmer, batch["text"]
        texts = DeviceConcat(text, columns=trimmer.length(text) if trimmer else None)
        batch["image"] = batch["image"].to(device=self.device, dtype=self.dtype, non_blocking=True)
        moved = texts.to(device=self.device, non_blocking=True)
        batch |= teach(self.model, batch["image"], moved, self.autocast)


class Averaging(EpochListener):
    """Keeps the average up to date, after the last micro-batch of each step, and saves it."""

    def __init__(self, average: WeightAverage, loader: TrainingLoader, args: TrainerArgs) -> None:
        self.average, self.loader, self.args = average, loader, args

    def start(self, resumed: Any, epoch: int) -> None:
        """Starts from the model as it is, or from the average as it was: in a step checkpoint, or beside an epoch's."""
        if not epoch and resumed is None:
            self.average.update(0)
            return
        # What training shares with evaluation is the format of weights; no other run imports it.
        from arf_plugin.evaluation.checkpoints import read_weights

        path = Path(self.args.resume or "")
        if resumed is None:  # from open_clip's own checkpoint, which does not know it
            path = path.with_name(NAME.format(epoch))
            saved = read_weights(path) if path.is_file() else None
        else:
            saved = resumed.get("average")
        if saved is None:
            raise CheckpointError(
                f"--arf-teacher average goes on with the average of the weights so far, and {path} has none.\n"
                "Resume from a checkpoint of a run with the same flags (an epoch's needs its average_E.pt beside it, "
                "which --arf-save-average writes), or start anew from its weights with --pretrained."
            )
        try:
            self.average.load_state_dict(saved)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"The averaged weights in {path} are not of this run's model: {first_line(error)}\n"
                "Resume with the flags that it was trained with."
            ) from error

    def after_batch(self, batches: int) -> None:
        """Takes in the weights, if an optimizer step has just been made."""
        step = self.loader.steps.made(self.loader.epoch, batches)
        if step is not None:
            self.average.update(step)

    def after_epoch(self, training: Training) -> None:
        """Saves the average when the trainer is about to save its own checkpoint."""
        args, done = self.args, training.epoch + 1
        if not args.save_logs:
            return
        from arf_plugin.evaluation.checkpoints import write_weights

        folder = Path(args.checkpoint_path)
        if self._stays(done) or args.save_most_recent:
            write_weights(folder / NAME.format(done), self.average.state_dict(), args.name)
        # The one before belongs to the checkpoint that is there until the trainer has saved the new one.
        if args.delete_previous_checkpoint or (args.save_most_recent and not self._stays(done - 2)):
            (folder / NAME.format(done - 2)).unlink(missing_ok=True)

    def _stays(self, epoch: int) -> bool:
        """Whether open_clip saves a checkpoint of its own for an epoch."""
        frequency = self.args.save_frequency
        return bool(epoch == self.args.epochs or (frequency > 0 and epoch % frequency == 0))
