"""Going on from a step checkpoint: what open_clip's main and its loop over batches do differently then."""

from __future__ import annotations

import functools
import glob
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from arf_plugin.errors import ArfError, CheckpointError
from arf_plugin.hooks.session import Session
from arf_plugin.hooks.versions import trains_tasks
from arf_plugin.resume.checkpoint import KEY, check_format, is_truncated, require_readable
from arf_plugin.safe_loading import first_line, safe_loading
from arf_plugin.untrusted import printable


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
        _check_content(checkpoint, path, needs_optimizer=not tasks)
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


def _check_content(checkpoint: Any, path: str, needs_optimizer: bool) -> None:
    """Refuses what the trainer's main would stumble over.

    Raises:
        CheckpointError: It is neither what the trainer saves nor bare weights.
    """

    def refuse(found: str) -> None:
        raise CheckpointError(
            f"--resume {path} {found}, expected what open_clip's trainer saves: epoch, state_dict and optimizer, or "
            "weights alone. To start from weights of another kind, give them with --pretrained."
        )

    if not isinstance(checkpoint, dict):
        refuse(f"holds {type(checkpoint).__name__}")
    if "epoch" not in checkpoint:
        if not checkpoint or not _are_weights(checkpoint):
            refuse(f"holds {printable(', '.join(map(str, list(checkpoint)[:5]))) or 'nothing'}")
        return
    epoch = checkpoint["epoch"]
    if type(epoch) is not int or not 0 <= epoch < 1 << 31:
        refuse(f"says that its epoch is {printable(repr(epoch))[:80]}")
    if not _are_weights(checkpoint.get("state_dict")):
        refuse("has no weights under state_dict")
    optimizer = checkpoint.get("optimizer")
    if optimizer is None and not needs_optimizer:  # open_clip 4 begins with a fresh one
        return
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("param_groups"), list):
        refuse("has no state of an optimizer")


def _check_architecture(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: str) -> None:
    """Refuses weights that the trainer could not load into its model, in a sentence.

    Raises:
        CheckpointError: They are of another architecture than the run.
    """
    from arf_plugin.evaluation.checkpoints import difference

    problems = difference(
        model.state_dict(), {name.removeprefix("module."): w for name, w in weights.items()}
    )
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
