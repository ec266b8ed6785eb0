"""open_clip 4: main.py builds a task (model and loss in one), batches are dictionaries, an epoch takes a state.

The one module that knows of that form; the rest of the plugin sees what it always sees. open_clip makes the task before
the data, so the task gets its loss when the data is there and the sizes of a batch are known.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from arf_plugin.anchors.task import is_csv
from arf_plugin.data.batch import DeviceConcat
from arf_plugin.data.order import SampleOrder
from arf_plugin.errors import FlagError, IncompatibleUpstreamError
from arf_plugin.hooks import data as tuples
from arf_plugin.hooks.epoch import Training, listening
from arf_plugin.hooks.loss import build_loss
from arf_plugin.hooks.order import ordered
from arf_plugin.hooks.resume import loading
from arf_plugin.hooks.session import Session
from arf_plugin.hooks.task_flags import VARIABLE_TEXT

IMAGE, TEXT = "image", "text"

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
    build = tuples.get_data(_with_tuples(original), session)

    @functools.wraps(original)
    def wrapped(args: Any, preprocess_fns: Any, **named: Any) -> dict[str, Any]:
        if named.pop("naflex_data_config", None) is not None:
            raise _unknown("a NaFlex data policy", "batches of plain images")
        task = session.task
        if task is None:
            raise _unknown("data that is built before the task", "the task first")
        data = build(args, preprocess_fns, **named)
        train = data["train"]
        if is_csv(args.train_data, args.dataset_type):
            dataset = train.task.dataloader.dataset
            dataset.captions = _ByPosition(dataset.captions)
        train.dataloader = _Dictionaries(train.dataloader)
        own = task.loss
        task.loss = build_loss(lambda: copy.deepcopy(own), session, args)
        return data

    return wrapped


def train_one_epoch(original: Callable[..., None], session: Session) -> Callable[..., None]:
    """Calls the original with what it was called with, between the listeners' two moments."""

    @functools.wraps(original)
    def wrapped(state: Any, data: Any, args: Any, *rest: Any, **named: Any) -> None:
        parts = (state.task.trainable_module, state.optimizer, state.scaler, state.epoch)
        with listening(session, TaskTraining(*parts, args, named.get("tb_writer"), state)):
            original(state, data, args, *rest, **named)

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


def pt_load(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Loads a checkpoint as for the older releases; here its weights have one name for any number of processes."""
    return loading(
        original,
        session,
        lambda weights: {name.removeprefix("module."): tensor for name, tensor in weights.items()},
    )


def webdataset(original: Any, order: SampleOrder) -> SimpleNamespace:
    """As for the older releases; a sample with an empty text gets no number, which open_clip would take for one."""
    return ordered(original, order, lambda sample: bool(sample.get("txt", b"").decode().strip()))


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


def _with_tuples(original: Callable[..., Any]) -> Callable[..., Any]:
    """open_clip's ``get_data`` as the older releases have it."""

    @functools.wraps(original)
    def wrapped(*args: Any, **named: Any) -> dict[str, Any]:
        data = original(*args, **named)
        if "train" in data:
            data["train"].dataloader = _Tuples(data["train"].dataloader)
        return data

    return wrapped


class _Loader:
    """Another loader's batches in another form; its sizes and its data set are the other's."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not yet set while unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return self.num_batches


class _Tuples(_Loader):
    """``{"image": images, "text": texts}`` as ``(images, texts)``."""

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return map(_as_tuple, self.loader)

    def collate_fn(self, samples: list[Any]) -> tuple[Any, Any]:
        """Makes a batch, for who loads the data set otherwise."""
        return _as_tuple(self.loader.collate_fn(samples))


def _as_tuple(batch: dict[str, Any]) -> tuple[Any, Any]:
    if set(batch) != {IMAGE, TEXT}:
        raise _unknown(f"a batch of {', '.join(sorted(batch))}", f"a batch of {IMAGE}, {TEXT}")
    return batch[IMAGE], batch[TEXT]


class _Dictionaries(_Loader):
    """``(images, texts)`` as ``{"image": images, "text": texts}``."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for images, texts in self.loader:
            yield {IMAGE: images, TEXT: texts}


class _ByPosition:
    """A list of texts, read as open_clip 4 reads a column of its CSV."""

    def __init__(self, texts: Any) -> None:
        self.iloc = texts


def _unknown(found: str, expected: str) -> IncompatibleUpstreamError:
    return IncompatibleUpstreamError(
        f"open_clip's trainer is not the one that the hooks were written for.\n  found:    {found}\n"
        f"  expected: {expected}\nTraining stops here rather than go on without anchors. Install a tested release "
        "(README.md of arf-plugin lists them), or train without --arf-* flags."
    )
