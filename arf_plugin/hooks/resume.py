"""Runs that save step checkpoints, go on from one, or are deterministic: what open_clip's main is given for it.

What it does differently when a run goes on comes first, then what saves: `StepCheckpoints`.
"""

from __future__ import annotations

import atexit
import functools
import glob
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from arf_plugin.checks.inputs import Run
from arf_plugin.data.loader import TrainingLoader
from arf_plugin.errors import ArfError, CheckpointError
from arf_plugin.hooks.session import EpochListener, Session, Training, fix_buckets
from arf_plugin.hooks.table import trains_tasks
from arf_plugin.resume.checkpoint import (
    KEY,
    check_format,
    describe,
    file_name,
    is_truncated,
    remove_finished,
    remove_others,
    require_readable,
    resume_point,
    write,
)
from arf_plugin.resume.identity import content_of_data, data_identity
from arf_plugin.safe_loading import first_line, safe_loading
from arf_plugin.trainer_args import TrainerArgs
from arf_plugin.untrusted import printable

LATEST = "epoch_latest.pt"  # where open_clip's --save-most-recent saves, and --resume latest then looks


def get_latest_checkpoint(original: Callable[..., str | None], session: Session) -> Callable[..., str | None]:
    """Finds the newest checkpoint that is whole; puts a local truncated one aside. Folders are open_clip's affair."""

    @functools.wraps(original)
    def wrapped(path: str, remote: bool) -> str | None:
        while True:
            latest = original(path, remote) if remote else _latest(original, path)
            if remote or latest is None or Path(latest).is_dir() or not is_truncated(latest):
                return latest
            logging.warning(
                f"ARF: {latest} was not written to its end; it is put aside as {latest}.truncated"
            )
            try:
                Path(latest).replace(f"{latest}.truncated")
            except OSError as error:
                raise CheckpointError(
                    f"{latest} was not written to its end, and cannot be put aside: {error.strerror}. Remove it, then "
                    "start the same command again."
                ) from error

    return wrapped


def _latest(original: Callable[..., str | None], path: str) -> str | None:
    """What open_clip finds in a folder; its name is no pattern, though open_clip takes it for one.

    An average of weights is no checkpoint to go on from. Its name sorts first: it is found where nothing else is.
    """
    found = original(glob.escape(path), False)
    return None if found is not None and Path(found).name.startswith("average_") else found


def pt_load(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Loads the checkpoint that ``--resume`` names, whatever number of processes it comes from.

    Notes what a step checkpoint says beside its weights.
    """
    tasks = trains_tasks(session.version)

    @functools.wraps(original)
    def wrapped(path: str, *args: Any, **kwargs: Any) -> Any:
        require_readable(path)
        try:
            with safe_loading():
                checkpoint = original(path, *args, **kwargs)
        except ArfError:
            raise
        except Exception as error:  # torch, fsspec and the file system raise many kinds
            raise CheckpointError(
                f"--resume {path} is no checkpoint that can be read: {first_line(error)}\n"
                "Expected a whole file that open_clip or a step checkpoint has written. Name another one, or remove "
                "this one and use --resume latest."
            ) from error
        if found := _unlike_a_checkpoint(checkpoint, needs_optimizer=not tasks):
            raise CheckpointError(
                f"--resume {path} {found}, expected what open_clip's trainer saves: epoch, state_dict and optimizer, "
                "or weights alone. To start from weights of another kind, give them with --pretrained."
            )
        if not tasks and session.model is not None:  # a task has a say in names
            _check_architecture(session.model.model, checkpoint.get("state_dict", checkpoint), path)
        if "epoch" in checkpoint:
            checkpoint["state_dict"] = _named_for_this_run(checkpoint["state_dict"], tasks)
            if KEY in checkpoint:
                session.resumed = check_format(checkpoint[KEY], path)
                if checkpoint["epoch"] != session.resumed["epoch"]:
                    raise CheckpointError(
                        f"--resume {path} is of epoch {checkpoint['epoch']}, and its part of ours of epoch "
                        f"{session.resumed['epoch']}. Resume from an epoch's checkpoint: --resume epoch_E.pt"
                    )
        return checkpoint

    return wrapped


def _unlike_a_checkpoint(checkpoint: Any, needs_optimizer: bool) -> str | None:
    """What the trainer's main would stumble over; None if it is what the trainer saves, or bare weights."""
    if not isinstance(checkpoint, dict):
        return f"holds {type(checkpoint).__name__}"
    if "epoch" not in checkpoint:
        held = printable(", ".join(map(str, list(checkpoint)[:5]))) or "nothing"
        return None if _are_weights(checkpoint) else f"holds {held}"
    epoch, optimizer = checkpoint["epoch"], checkpoint.get("optimizer")
    if type(epoch) is not int or not 0 <= epoch < 1 << 31:
        return f"says that its epoch is {printable(repr(epoch))[:80]}"
    if not _are_weights(checkpoint.get("state_dict")):
        return "has no weights under state_dict"
    if optimizer is None and not needs_optimizer:  # open_clip 4 begins with a fresh one
        return None
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("param_groups"), list):
        return "has no state of an optimizer"
    return None


def _check_architecture(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: str) -> None:
    """Refuses weights that the trainer could not load into its model, in a sentence."""
    from arf_plugin.evaluation.checkpoints import difference

    named = {name.removeprefix("module."): weight for name, weight in weights.items()}
    problems = difference(model.state_dict(), named)
    if problems:
        raise CheckpointError(
            f"--resume {path} is of another model than this run's: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. Give the flags that it was trained "
            "with; to start a new run from its weights, use --pretrained."
        )


def _are_weights(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(each, torch.Tensor) for name, each in value.items())
    )


def _named_for_this_run(weights: dict[str, Any], tasks: bool) -> dict[str, Any]:
    """Names weights as this run's trainer expects them.

    A trainer of tasks has one name for any number of processes. The other knows how to take the prefix of several
    processes away where it runs in one, and not the other way round.
    """
    if tasks:
        return {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    if not torch.distributed.is_initialized() or next(iter(weights)).startswith("module."):
        return weights
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def enumerate_batches(
    original: type[enumerate[Any]], session: Session
) -> Callable[..., Iterator[tuple[int, Any]]]:
    """Counts the batches of a resumed epoch from where they go on; no other iterable has a `first_batch`."""

    def wrapped(iterable: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
        return original(iterable, getattr(iterable, "first_batch", start))

    return wrapped


def make_resumable(
    loader: TrainingLoader,
    session: Session,
    args: TrainerArgs,
    shape: Run,
    on_first_rank: Callable[[Callable[[], Any]], Any],
) -> None:
    """Lets a loader begin in the middle of an epoch, if the run goes on there, and save as the flags say.

    ``on_first_rank`` calls a function in the first process and hands its result to all.
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
            streams={name: len(stream.state_dict()) for name, stream in loader.streams.items()},
        )
        if args.rank == 0:
            order = "exactly where it stopped" if config.deterministic else "with the data in a fresh order"
            logging.info(
                f"ARF: epoch {point.epoch} goes on after {point.batches} of {loader.num_batches} batches, {order}."
            )
    if config.deterministic and args.distributed and not getattr(args, "fsdp", False):
        session.listeners.append(FixedBuckets())
    if config.saves_steps or session.stops_on_ctrl_c:
        session.listeners.append(StepCheckpoints(session, args, loader, identity))


class FixedBuckets(EpochListener):
    """Fixes in which order processes sum their gradients.

    DistributedDataParallel arranges gradients in other buckets after the first step of a process, and where more than
    two processes sum, the order decides the last bits: a resumed run's first step would differ. Arranged by parameters
    before the first step, the buckets stay, at the price of less overlap between backward pass and communication.
    """

    def begin(self, training: Training) -> None:
        """Arranges the buckets."""
        fix_buckets(training.model)


class StepCheckpoints(EpochListener):
    """Saves a checkpoint every so many optimizer steps of the run, or when the run is to stop.

    The moment to save is the one after a batch of the loader. ``data`` is what determines their order.
    """

    def __init__(
        self, session: Session, args: TrainerArgs, loader: TrainingLoader, data: Mapping[str, Any]
    ) -> None:
        self.session, self.args, self.loader, self.data = session, args, loader, data
        self.every = session.config.checkpoint_every
        self.stop_file = Path(session.config.stop_file) if session.config.stop_file else None
        self.command = session.command if session.stops_on_ctrl_c else None
        self.folder = Path(args.checkpoint_path)
        self.training: Training | None = None
        self.group: Any = None
        if args.distributed and self.stop_file:
            # Agreeing on the processor spares a GPU the wait for its queue at every step.
            self.group = torch.distributed.new_group(backend="gloo")
        loader.after_batch.append(self.after_batch)

    def begin(self, training: Training) -> None:
        """From here on there is something to save."""
        if self.command is not None:
            self.command.listen()

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
        """Saves, if an optimizer step that is due has just been made, and ends the process if it is to stop."""
        step = self.loader.steps.made(self.loader.epoch, batches)
        if step is None:
            return
        interrupted = self.command if self.command is not None and self.command.asked else None
        stop = interrupted is not None or self._must_stop()
        if stop or (self.every and step % self.every == 0):
            self.save(batches, step)
        if interrupted is not None:
            raise KeyboardInterrupt(f"step {step} is saved. This goes on: {interrupted.again}")
        if not stop:
            return
        if self.args.rank == 0 and self.stop_file is not None:  # the first process has obeyed
            self.stop_file.unlink(missing_ok=True)
            logging.info(
                f"ARF: {self.stop_file} asked to stop; step {step} is saved. Go on with --resume latest."
            )
        raise SystemExit(0)

    def _must_stop(self) -> bool:
        """Whether the stop file is there; all processes get the answer of the first one."""
        if self.stop_file is None:
            return False
        there = torch.tensor([self.args.rank == 0 and self.stop_file.exists()])
        if self.group is not None:
            torch.distributed.broadcast(there, 0, group=self.group)
        return bool(there)

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
                data=dict(self.data),
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
    """An optimizer's state with the numpy numbers that open_clip before 2.30 sets as learning rate as floats.

    They are the same numbers, and any torch loads them.
    """
    groups = [
        {name: float(value) if isinstance(value, float) else value for name, value in group.items()}
        for group in optimizer["param_groups"]
    ]
    return {**optimizer, "param_groups": groups}
