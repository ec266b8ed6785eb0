"""open_clip 4: main.py builds a task (model and loss in one), batches are dictionaries, an epoch takes a state.

The one module that knows of that form; the rest of the plugin sees what it always sees. open_clip makes the task before
the data, so the task gets its loss when the data is there and the sizes of a batch are known.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from arf_plugin.data.batch import DeviceConcat, as_dictionary
from arf_plugin.errors import FlagError, IncompatibleUpstreamError
from arf_plugin.hooks.data import data_in_form
from arf_plugin.hooks.epoch import listening
from arf_plugin.hooks.loss import build_loss
from arf_plugin.hooks.session import Session
from arf_plugin.hooks.task_flags import VARIABLE_TEXT
from arf_plugin.hooks.training import Training

# Their loss takes what the model returns, so the anchored loss can take its place.
TASKS = ("CLIPTask", "SigLIPTask", "DistillCLIPTask")


def create_task(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Builds open_clip's own task, and lets it prepare batches with anchors in them."""

    @functools.wraps(original)
    def wrapped(args: Any, *rest: Any, **named: Any) -> Any:
        if getattr(args, "variable_text", False):
            raise FlagError(f"--model {args.model} {VARIABLE_TEXT}")
        task = original(args, *rest, **named)
        if type(task).__name__ not in TASKS:
            raise _unknown(f"a task of type {type(task).__name__}", " or ".join(TASKS))
        task.prepare_batch = functools.partial(_prepare_batch, task.prepare_batch)
        session.task = task
        return task

    return wrapped


def get_data(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Builds data as for the older releases, in batches of this one, and then the task's loss."""
    build = data_in_form(original, session, as_dictionary)

    @functools.wraps(original)
    def wrapped(args: Any, preprocess_fns: Any, **named: Any) -> dict[str, Any]:
        if named.pop("naflex_data_config", None) is not None:
            raise _unknown("a NaFlex data policy", "batches of plain images")
        task = session.task
        if task is None:
            raise _unknown("data that is built before the task", "the task first")
        built = build(args, preprocess_fns, **named)
        own = task.loss
        task.loss = build_loss(lambda: copy.deepcopy(own), session, args)
        return built

    return wrapped


def train_one_epoch(original: Callable[..., None], session: Session) -> Callable[..., None]:
    """Calls the original with what it was called with, between the listeners' two moments."""

    @functools.wraps(original)
    def wrapped(state: Any, batches: Any, args: Any, *rest: Any, **named: Any) -> None:
        parts = (state.task.trainable_module, state.optimizer, state.scaler, state.epoch)
        with listening(session, TaskTraining(*parts, args, named.get("tb_writer"), state)):
            original(state, batches, args, *rest, **named)

    return wrapped


@dataclasses.dataclass
class TaskTraining(Training):
    """What this trainer holds while an epoch runs.

    Attributes:
        state: The trainer's own view of it, with counters of steps and samples.
    """

    state: Any

    @property
    def wandb(self) -> Any:
        """The module that ``--report-to wandb``, or ``trackio``, reports to, or None."""
        from open_clip_train.train import get_wandb_backend

        return get_wandb_backend(self.args)

    @property
    def gathers(self) -> bool:
        """With FSDP, each process has a part of the weights."""
        return bool(self.args.fsdp)

    def content(self) -> dict[str, Any]:
        """See `Training.content`."""
        from open_clip.task import save_checkpoint

        counters = {"global_step": self.state.global_step, "samples_seen": self.state.samples_seen}
        content: dict[str, Any] = save_checkpoint(
            self.state.task, self.optimizer, self.epoch, self.scaler, self.args.name, **counters
        )
        return content


def _prepare_batch(
    original: Callable[..., dict[str, Any]], batch: dict[str, Any], *args: Any, **named: Any
) -> Any:
    """Has every part of a batch moved by open_clip, and joins them where they are then."""
    if not any(isinstance(value, DeviceConcat) for value in batch.values()):
        return original(batch, *args, **named)
    return {
        key: value.moved(lambda part, key=key: original({key: part}, *args, **named)[key])
        for key, value in batch.items()
    }


def _unknown(found: str, expected: str) -> IncompatibleUpstreamError:
    return IncompatibleUpstreamError(
        f"open_clip's trainer is not the one that the hooks were written for.\n  found:    {found}\n"
        f"  expected: {expected}\nTraining stops here rather than go on without anchors. Install a tested release "
        "(README.md of arf-plugin lists them), or train without --arf-* flags."
    )
