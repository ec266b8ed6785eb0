"""One training run: what its hooks hand on, what the trainer holds while an epoch runs, and who is told of it.

Each hook finds its part when the trainer calls it, and others read it. ``open_clip_train.main.train_one_epoch`` itself
is never replaced: the original runs with the trainer's own arguments, between the listeners' two moments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from open_clip_train.precision import get_autocast
from torch import nn

from arf_plugin.checks.inputs import StartingModel
from arf_plugin.config import ArfConfig
from arf_plugin.data.loader import TrainingLoader
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.errors import ArfError
from arf_plugin.hooks.command import Command
from arf_plugin.losses.average import WeightAverage
from arf_plugin.trainer_args import TrainerArgs


@dataclasses.dataclass
class ModelFacts:
    """What is known of the run's models once they have been built.

    Attributes:
        model: The model that trains.
        random_parts: Names of weights, of it or of a teacher, that have come from no file.
        trimmer: How the texts of a batch can be cut for all models that read them, or why they cannot.
        start: Its parameters as training starts from them, by name, until the loss has taken them.
        starting: How its features compare with those in the anchor set, or the error that this has met; in the first
            process, if anchors are held by them.
        copy: A frozen copy of it as training starts from it, if ``--arf-teacher`` needs one.
    """

    model: nn.Module
    random_parts: tuple[str, ...]
    trimmer: TextTrimmer | str
    start: dict[str, torch.Tensor] | None = None
    starting: StartingModel | ArfError | None = None
    copy: nn.Module | None = None

    def add_teacher(self, random_parts: tuple[str, ...], trimmer: TextTrimmer | str) -> None:
        """Takes in what is known of a distillation teacher, which reads the same texts."""
        self.random_parts += random_parts
        if isinstance(self.trimmer, str) or self.trimmer == trimmer:
            return
        different = "student and teacher end their texts differently"
        self.trimmer = trimmer if isinstance(trimmer, str) else different


@dataclasses.dataclass
class Session:
    """One training run.

    Attributes:
        config: The ARF flags.
        version: Upstream's version.
        model: Set by the hook of the models.
        resumed: What the step checkpoint that the run goes on from says beside its weights; set by the hook that
            loads checkpoints.
        task: The task that trains the model; set by its hook, in releases that build one.
        loader: The training data; set by their hook.
        average: The average of the weights so far, for step checkpoints; set with the data if the run has one.
        listeners: Who is told of every epoch.
        command: The `arf train` that runs it; None under torchrun and ``python -m``.
    """

    config: ArfConfig
    version: str
    model: ModelFacts | None = None
    resumed: Mapping[str, Any] | None = None
    task: Any = None
    loader: TrainingLoader | None = None
    average: WeightAverage | None = None
    listeners: list[EpochListener] = dataclasses.field(default_factory=list)
    command: Command | None = None

    @property
    def stops_on_ctrl_c(self) -> bool:
        """Whether Ctrl-C saves a step checkpoint, in any run of an `arf train` that has a place for it."""
        return self.command is not None and self.command.saves


@dataclasses.dataclass
class Training:
    """What the trainer holds while an epoch runs.

    Attributes:
        model: The model as it trains, wrapped for several processes or not.
        optimizer: Its optimizer.
        scaler: The gradient scaler of ``--precision amp``, or None.
        epoch: Number of the epoch, from 0.
        args: The trainer's arguments.
        tb_writer: TensorBoard's writer, or None.
    """

    model: Any
    optimizer: Any
    scaler: Any
    epoch: int
    args: TrainerArgs
    tb_writer: Any

    @property
    def wandb(self) -> Any:
        """The module that ``--report-to wandb`` reports to, or None."""
        return importlib.import_module("wandb") if self.args.wandb else None

    @property
    def gathers(self) -> bool:
        """Whether `content` takes all processes."""
        return False

    def content(self) -> dict[str, Any]:
        """What open_clip itself would save now, in the middle of the epoch."""
        return {
            "epoch": self.epoch,
            "name": self.args.name,
            "state_dict": uncompiled(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({"scaler": self.scaler.state_dict()} if self.scaler is not None else {}),
        }


class EpochListener:
    """Is told of every epoch that trains; `Session.listeners` holds them."""

    begun = False

    def begin(self, training: Training) -> None:
        """The first epoch of this process is about to begin."""

    def before_epoch(self, training: Training) -> None:
        """The epoch is about to begin."""

    def after_epoch(self, training: Training) -> None:
        """The epoch's last step has been made; the trainer has not saved its checkpoint yet."""


def train_one_epoch(original: Callable[..., None], session: Session) -> Callable[..., None]:
    """Calls the original with what it was called with, between the listeners' two moments."""

    @functools.wraps(original)
    def wrapped(
        model: Any, data: Any, loss: Any, epoch: int, optimizer: Any, scaler: Any, *rest: Any, **named: Any
    ) -> None:
        _, _, args = rest[:3]  # scheduler, dist_model, args
        with listening(session, Training(model, optimizer, scaler, epoch, args, named.get("tb_writer"))):
            original(model, data, loss, epoch, optimizer, scaler, *rest, **named)

    return wrapped


@contextlib.contextmanager
def listening(session: Session, training: Training) -> Iterator[None]:
    """Tells the listeners before an epoch, and after it if it ends well."""
    for listener in session.listeners:
        if not listener.begun:
            listener.begun = True
            listener.begin(training)
        listener.before_epoch(training)
    yield
    for listener in session.listeners:
        listener.after_epoch(training)


def autocast_of(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The trainer's own autocast for a precision; up to 2.28 it knows no devices."""
    known = inspect.signature(get_autocast).parameters
    named = {"device_type": device.type} if "device_type" in known else {}
    autocast: Callable[[], AbstractContextManager[Any]] = get_autocast(precision, **named)
    return autocast


# torch has no public way to do these two; no other code of training uses a private name of it.


def uncompiled(model: Any) -> Any:
    """What ``torch.compile`` made a model of; it shares the weights, without a prefix to their names."""
    return getattr(model, "_orig_mod", model)


def fix_buckets(model: Any) -> None:
    """Arranges the gradients of DistributedDataParallel by parameters, once and for all: the buckets then stay."""
    uncompiled(model).reducer._push_all_rebuilt_params()
