"""Step checkpoints on disk: one file per checkpoint with open_clip's own keys, and one key of ours.

``checkpoints/epoch_E_step_S.pt`` is saved after S optimizer steps of the run, in the epoch that follows E whole ones.
Its name sorts between ``epoch_E.pt`` and the next epoch's, so open_clip's ``--resume latest`` finds the right file, and
its ``state_dict``, ``optimizer``, ``scaler``, ``epoch`` and ``name`` are what open_clip itself would have saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue, model_validator

from arf_plugin.errors import CheckpointError
from arf_plugin.files import TEMPORARY, list_files, remove_incomplete, replacing
from arf_plugin.resume.rng import preserved_rng, restore_rng
from arf_plugin.safe_loading import first_line
from arf_plugin.untrusted import printable
from arf_plugin.validation import Strict, validated

KEY = "arf"
FORMAT = 1
_MOST = 1 << 53  # of anything that is counted
_INSTEAD = "Resume from an epoch's checkpoint, which has no part of ours: --resume epoch_E.pt"


Count = Annotated[int, Field(ge=0, le=_MOST)]


class _Process(Strict):
    """What a loader's ``state_dict`` says; a stream has a count for each of its workers."""

    rng: dict[str, Any]
    streams: dict[str, list[Count]]


class _Saved(Strict):
    """What a step checkpoint holds under `KEY`."""

    format: int
    epoch: Count  # whole epochs
    step: Count  # optimizer steps of the run
    batches: Count  # micro-batches per process of the current epoch that were trained on
    num_batches: Annotated[int, Field(ge=1, le=_MOST)]  # those of a whole epoch
    data: dict[str, JsonValue]  # what determines their order, by name; see `arf_plugin.resume.identity`
    processes: list[_Process] | None  # None without --arf-deterministic
    average: dict[str, Any] | None = None  # of the weights over the run so far, if the run has one

    @model_validator(mode="after")
    def _batches_are_some_of_all(self) -> _Saved:
        if self.batches > self.num_batches:
            raise ValueError(f"saved after {self.batches} of {self.num_batches} batches, which cannot be.")
        return self


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where training goes on.

    Attributes:
        epoch: The epoch that was not finished, from 0.
        batches: Its batches per process that were trained on.
        process: The loader's ``state_dict`` in this process; None where data order is fresh.
    """

    epoch: int
    batches: int
    process: Mapping[str, Any] | None = None


def file_name(epoch: int, step: int) -> str:
    """Name of the checkpoint after ``epoch`` whole epochs and ``step`` optimizer steps of the run."""
    return f"epoch_{epoch}_step_{step}.pt"


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint that is there as a whole or not at all, even when the machine stops.

    Raises:
        CheckpointError: It cannot be written.
    """
    _remove_left_overs(path.parent)
    try:
        # Under a hidden name, which open_clip's --resume latest passes over, until it is whole.
        with replacing(path) as temporary, temporary.open("wb") as stream:
            torch.save(dict(content), stream)
        with contextlib.suppress(OSError):  # not every file system has folders that can be synchronised
            _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The step checkpoint {path} cannot be written: {error}\n"
            "The one before is untouched. Make room, then start the same command with --resume latest."
        ) from error


def remove_others(path: Path) -> None:
    """Removes the step checkpoints beside a newer one."""
    for _, other in _step_checkpoints(path.parent):
        if other != path:
            _remove(other)


def remove_finished(folder: Path, completed: int) -> None:
    """Removes step checkpoints of epochs that are over, once ``epoch_COMPLETED.pt`` is there."""
    if (folder / f"epoch_{completed}.pt").exists():
        for epoch, path in _step_checkpoints(folder):
            if epoch < completed:
                _remove(path)


def is_truncated(path: str) -> bool:
    """Whether a file begins like a checkpoint of torch's and does not end like one.

    Raises:
        CheckpointError: It cannot be read, or is no file.
    """
    require_readable(path)
    try:
        with Path(path).open("rb") as stream:
            start = stream.read(4)
        return not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error.strerror or error}") from error


def require_readable(path: str) -> None:
    """Refuses what would block, or never end, when it is read as a checkpoint. A missing file and a folder pass.

    Raises:
        CheckpointError: It is a pipe, a socket or a device.
    """
    with contextlib.suppress(OSError, ValueError):
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(
                f"The checkpoint {path} is a pipe, a socket or a device, expected a file. Remove it, or name another "
                "one with --resume."
            )


def describe(**fields: Any) -> dict[str, Any]:
    """What a step checkpoint holds under `KEY`: the fields of `_Saved`; without an average where there is none."""
    if fields.get("average") is None:
        fields.pop("average", None)
    return {"format": FORMAT, **fields}


def check_format(saved: Any, path: str) -> dict[str, Any]:
    """Refuses what another release, or nobody, has written, and what is damaged.

    Raises:
        CheckpointError: The part of the checkpoint under `KEY` is not of this format.
    """
    found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
    if isinstance(found, bool) or not isinstance(found, int) or found != FORMAT:
        raise CheckpointError(
            f"{path} is a step checkpoint of another format (found: {printable(str(found))[:80]}, expected: "
            f"{FORMAT}).\n"
            "Resume with the release of arf-plugin that saved it, or from an epoch's checkpoint: --resume epoch_E.pt"
        )
    where = f"The step checkpoint {path}"
    checked = validated(_Saved, saved, where, CheckpointError, _INSTEAD)
    for rank, process in enumerate(checked.processes or ()):
        try:
            _check_rng(process.rng)
        except Exception as error:  # torch, numpy and Python each have their own
            raise CheckpointError(
                f"{where}, process {rank}: the state of its random numbers cannot be set: "
                f"{printable(first_line(error))[:200]}. {_INSTEAD}"
            ) from error
    content: dict[str, Any] = saved
    return content


def _check_rng(state: dict[str, Any]) -> None:
    """Sets the generators of this process once, after what they do not check, or read beyond their state."""
    keys, position, has_gauss, gauss = state["numpy"]
    if keys.dtype != torch.int64 or keys.shape != (624,) or not 0 <= keys.min() <= keys.max() < 1 << 32:
        raise ValueError("NumPy's has other keys than 624 numbers of 32 bits")
    if type(position) is not int or not 0 <= position <= 624 or has_gauss not in (0, 1):
        raise ValueError(f"NumPy's is at {position!r}")
    if not isinstance(gauss, float) or not isinstance(state["python"][2], float | type(None)):
        raise ValueError("a number that a generator has held back is none")
    if not isinstance(state["cuda"], list):
        raise ValueError("a part is of another type")
    if not all(isinstance(each, torch.Tensor) and each.dtype == torch.uint8 for each in state["cuda"]):
        raise ValueError("a GPU's is no tensor of bytes")
    with preserved_rng():
        restore_rng({**state, "cuda": []})


def resume_point(
    saved: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    num_batches: int,
    accum_freq: int,
    rank: int,
    deterministic: bool,
    streams: Mapping[str, int] = MappingProxyType({}),
) -> ResumePoint:
    """Finds where a run goes on.

    Args:
        saved: What `describe` returned when the checkpoint was saved.
        data: What determines the order of data in this run.
        num_batches: Micro-batches of a whole epoch in this run.
        accum_freq: Micro-batches in an optimizer step.
        rank: This process among all.
        deterministic: Whether the run is to go on as if it had not been stopped.
        streams: How many counts each stream of data keeps, by its name.

    Raises:
        CheckpointError: It is to be deterministic, and cannot be.
    """
    if not deterministic:
        # Another number of processes makes other batches of the same epoch: go on after the same share of it.
        batches = saved["batches"] * num_batches // saved["num_batches"]
        return ResumePoint(saved["epoch"], batches - batches % accum_freq)
    processes = saved["processes"]
    if processes is None:
        raise CheckpointError(
            "The step checkpoint was saved without --arf-deterministic, so it does not know the order of "
            "the data.\nResume without the flag, or from an epoch's checkpoint: --resume epoch_E.pt"
        )
    changed = [
        printable(f"  {name}: {_short(saved['data'].get(name))} then, {_short(data.get(name))} now")
        for name in sorted({*saved["data"], *data})
        if saved["data"].get(name) != data.get(name)
    ]
    if not changed and saved["num_batches"] != num_batches:
        changed = [f"  batches in an epoch: {saved['num_batches']} then, {num_batches} now"]
    if changed:
        raise CheckpointError(
            "The step checkpoint belongs to a run with other data or in another shape:\n"
            + "\n".join(changed)
            + "\nWith --arf-deterministic they must be the same. Give the same flags as before; or drop "
            "--arf-deterministic, and the rest of the epoch sees data in a fresh order."
        )
    if rank >= len(processes):
        raise CheckpointError(
            f"The step checkpoint has the state of {len(processes)} processes, and this is number {rank}, "
            f"counted from 0. {_INSTEAD}"
        )
    for name, expected in streams.items():
        found = processes[rank]["streams"].get(name)
        if found is None or len(found) != expected:
            said = "nothing" if found is None else f"{len(found)} counts"
            raise CheckpointError(
                f"The step checkpoint has {said} for the stream '{name}', expected {expected}. {_INSTEAD}"
            )
    return ResumePoint(saved["epoch"], saved["batches"], processes[rank])


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 200 else f"{text[:200]} ..."


def _step_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Files whose names are exactly those that `file_name` makes."""
    for path in list_files(folder, ".pt"):
        match = re.fullmatch(r"epoch_([0-9]{1,15})_step_([0-9]{1,15})\.pt", path.name)
        if match and path.name == file_name(int(match[1]), int(match[2])) and not path.is_dir():
            yield int(match[1]), path


def _remove(path: Path) -> None:
    """Removes a file; one that cannot be removed takes room and does no harm."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _remove_left_overs(folder: Path) -> None:
    """Removes what killed processes left unfinished, an earlier one with this process's own number among them."""
    with contextlib.suppress(OSError):
        remove_incomplete(folder, all_hosts=False)
        own = f"{TEMPORARY}{os.getpid()}@{socket.gethostname()}@"
        for path in folder.iterdir():
            if path.name.startswith(own) and "@epoch_" in path.name:
                _remove(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
