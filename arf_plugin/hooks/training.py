"""What the trainer holds while an epoch runs, and who is told of it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from open_clip_train.precision import get_autocast


def autocast_of(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The trainer's own autocast for a precision; up to 2.28 it knows no devices."""
    known = inspect.signature(get_autocast).parameters
    named = {"device_type": device.type} if "device_type" in known else {}
    autocast: Callable[[], AbstractContextManager[Any]] = get_autocast(precision, **named)
    return autocast


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
    args: Any
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
            # What torch.compile made shares its weights with the model it was made of, without a prefix to names.
            "state_dict": getattr(self.model, "_orig_mod", self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({"scaler": self.scaler.state_dict()} if self.scaler is not None else {}),
        }


class EpochListener(Protocol):
    """Is told of every epoch that trains; `Session.listeners` holds them."""

    def before_epoch(self, training: Training) -> None:
        """The epoch is about to begin."""

    def after_epoch(self, training: Training) -> None:
        """The epoch's last step has been made; the trainer has not saved its checkpoint yet."""
