"""open_clip_train.main.train_one_epoch: called with the trainer's own arguments, and told to those who listen.

The function itself is never replaced: the original runs, unchanged. What the wrapper adds is the moment before and
after, and a view of what the trainer holds: some parts of the plugin need the optimizer, or act once an epoch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from arf_plugin.hooks.session import Session
from arf_plugin.hooks.training import Training


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
