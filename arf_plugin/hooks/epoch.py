"""open_clip_train.main.train_one_epoch: called with the trainer's own arguments, and told to those who listen.

The function itself is never replaced: the original runs, unchanged. What the wrapper adds is the moment before and
after, and a view of what the trainer holds: some parts of the plugin need the optimizer, or act once an epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from arf_plugin.hooks.session import Session


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
        listener.before_epoch(training)
    yield
    for listener in session.listeners:
        listener.after_epoch(training)
