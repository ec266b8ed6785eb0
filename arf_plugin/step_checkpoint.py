"""Step checkpoints on disk: one file per checkpoint with open_clip's own keys, and one key of ours.

``checkpoints/epoch_E_step_S.pt`` is saved after S optimizer steps of the run, in the epoch that follows E whole ones.
Its name sorts between ``epoch_E.pt`` and the next epoch's, so open_clip's ``--resume latest`` finds the right file, and
its ``state_dict``, ``optimizer``, ``scaler``, ``epoch`` and ``name`` are what open_clip itself would have saved.
"""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from arf_plugin.data.resume import ResumePoint
from arf_plugin.errors import CheckpointError

KEY = "arf"
FORMAT = 1
PARTIAL = ".partial"  # open_clip looks for *.pt


def file_name(epoch: int, step: int) -> str:
    """Name of the checkpoint after ``epoch`` whole epochs and ``step`` optimizer steps of the run."""
    return f"epoch_{epoch}_step_{step}.pt"


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint that is there as a whole or not at all, even when the machine stops.

    Raises:
        CheckpointError: It cannot be written.
    """
    for left_over in path.parent.glob(f"*{PARTIAL}"):
        left_over.unlink()
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as stream:
            torch.save(dict(content), stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CheckpointError(
            f"The step checkpoint {path} cannot be written: {error}\n"
            "The one before is untouched. Make room, then start the same command with --resume latest."
        ) from error


def remove_others(path: Path) -> None:
    """Removes the step checkpoints beside a newer one."""
    for _, other in _step_checkpoints(path.parent):
        if other != path:
            other.unlink(missing_ok=True)


def remove_finished(folder: Path, completed: int) -> None:
    """Removes step checkpoints of epochs that are over, once ``epoch_COMPLETED.pt`` is there."""
    if (folder / f"epoch_{completed}.pt").exists():
        for epoch, path in _step_checkpoints(folder):
            if epoch < completed:
                path.unlink(missing_ok=True)


def is_torn(path: str) -> bool:
    """Whether a file begins like a checkpoint of torch's and does not end like one."""
    with Path(path).open("rb") as stream:
        start = stream.read(4)
    return not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path))


def describe(
    *,
    epoch: int,
    step: int,
    batches: int,
    num_batches: int,
    data: Mapping[str, Any],
    processes: list[Any] | None,
) -> dict[str, Any]:
    """What a step checkpoint holds under `KEY`.

    Args:
        epoch: Whole epochs.
        step: Optimizer steps of the run.
        batches: Micro-batches per process of the current epoch that were trained on.
        num_batches: Those of a whole epoch.
        data: What determines the order of data, by name; see `arf_plugin.data.identity`.
        processes: State of each process's data streams and random numbers; None without ``--arf-deterministic``.
    """
    return {
        "format": FORMAT,
        **{"epoch": epoch, "step": step, "batches": batches, "num_batches": num_batches},
        **{"data": dict(data), "processes": processes},
    }


def check_format(saved: Any, path: str) -> dict[str, Any]:
    """Refuses what another release, or nobody, has written.

    Raises:
        CheckpointError: The part of the checkpoint under `KEY` is not of this format.
    """
    found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is a step checkpoint of another format (found: {found}, expected: {FORMAT}).\n"
            "Resume with the release of arf-plugin that saved it, or from an epoch's checkpoint: --resume epoch_E.pt"
        )
    return saved


def resume_point(
    saved: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    num_batches: int,
    accum_freq: int,
    rank: int,
    deterministic: bool,
) -> ResumePoint:
    """Finds where a run goes on.

    Args:
        saved: What `describe` returned when the checkpoint was saved.
        data: What determines the order of data in this run.
        num_batches: Micro-batches of a whole epoch in this run.
        accum_freq: Micro-batches in an optimizer step.
        rank: This process among all.
        deterministic: Whether the run is to go on as if it had not been stopped.

    Raises:
        CheckpointError: It is to be deterministic, and cannot be.
    """
    if deterministic:
        if saved["processes"] is None:
            raise CheckpointError(
                "The step checkpoint was saved without --arf-deterministic, so it does not know the order of "
                "the data.\nResume without the flag, or from an epoch's checkpoint: --resume epoch_E.pt"
            )
        changed = [
            f"  {name}: {saved['data'].get(name)} then, {data.get(name)} now"
            for name in sorted({*saved["data"], *data})
            if saved["data"].get(name) != data.get(name)
        ]
        if changed or saved["num_batches"] != num_batches:
            raise CheckpointError(
                "The step checkpoint belongs to a run with other data or in another shape:\n"
                + "\n".join(
                    changed or [f"  batches in an epoch: {saved['num_batches']} then, {num_batches} now"]
                )
                + "\nWith --arf-deterministic they must be the same. Give the same flags as before; or drop "
                "--arf-deterministic, and the rest of the epoch sees data in a fresh order."
            )
        return ResumePoint(saved["epoch"], saved["batches"], saved["processes"][rank])
    # Another number of processes makes other batches of the same epoch: go on after the same share of it.
    batches = saved["batches"] * num_batches // saved["num_batches"]
    return ResumePoint(saved["epoch"], batches - batches % accum_freq)


def _step_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("epoch_*_step_*.pt")):
        match = re.fullmatch(r"epoch_(\d+)_step_\d+\.pt", path.name)
        if match:
            yield int(match[1]), path


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system has folders that can be synchronised
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
