"""Going on from a step checkpoint: what open_clip's main and its loop over batches do differently then."""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from arf_plugin.errors import CheckpointError
from arf_plugin.evaluation.tensor_files import plain_numbers
from arf_plugin.hooks.session import Session
from arf_plugin.step_checkpoint import KEY, check_format, is_torn


def get_latest_checkpoint(original: Callable[..., str | None], session: Session) -> Callable[..., str | None]:
    """Finds the newest checkpoint that is whole; a local torn one is put aside. Folders are open_clip's own affair."""

    @functools.wraps(original)
    def wrapped(path: str, remote: bool) -> str | None:
        while True:
            latest = original(path, remote)
            if remote or latest is None or Path(latest).is_dir() or not is_torn(latest):
                return latest
            logging.warning(f"ARF: {latest} was not written to its end; it is put aside as {latest}.torn")
            Path(latest).replace(f"{latest}.torn")

    return wrapped


def pt_load(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Loads the checkpoint that ``--resume`` names, whatever number of processes it comes from.

    Notes what a step checkpoint says beside its weights.
    """
    return loading(original, session, _named_for_this_run)


def loading(
    original: Callable[..., Any], session: Session, named: Callable[[dict[str, Any]], dict[str, Any]]
) -> Callable[..., Any]:
    """What `pt_load` does, with weights named as a form of the trainer expects them."""

    @functools.wraps(original)
    def wrapped(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            with torch.serialization.safe_globals(plain_numbers()):
                checkpoint = original(path, *args, **kwargs)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointError(
                f"--resume {path} is no checkpoint that can be read: {reason}\n"
                "Expected a whole file that open_clip or a step checkpoint has written. Name another one, or remove "
                "this one and use --resume latest."
            ) from error
        if isinstance(checkpoint, dict) and "epoch" in checkpoint:
            checkpoint["state_dict"] = named(checkpoint["state_dict"])
            if KEY in checkpoint:
                session.resumed = check_format(checkpoint[KEY], path)
        return checkpoint

    return wrapped


def _named_for_this_run(weights: dict[str, Any]) -> dict[str, Any]:
    """Names weights as several processes do, if they come from a single one; open_clip knows the other way alone."""
    if not torch.distributed.is_initialized() or next(iter(weights)).startswith("module."):
        return weights
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def enumerate_batches(
    original: type[enumerate], session: Session
) -> Callable[..., Iterator[tuple[int, Any]]]:
    """Counts the batches of a resumed epoch from where they go on; no other iterable has a `first_batch`."""

    def wrapped(iterable: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
        return original(iterable, getattr(iterable, "first_batch", start))

    return wrapped
