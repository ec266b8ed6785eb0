"""Runs open_clip's trainer in a process of its own and follows its log.

The trainer writes into a file, not into a pipe of ours: if this program is killed, a training that is under way goes
on undisturbed, and its folder stays locked until it ends. The next start finds the lock, follows the same log to its
end and takes the finished run over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

_STEP = re.compile(
    rb"Train Epoch: (\d{1,15}) \[\s*(\d{1,15})/(\d{1,15}).*?\sLoss: ([\d.einfa+-]+) \([^)]*\)\s*$"
)
_TORCHRUN = re.compile(rb"[EW]\d{4} .*torch/distributed/elastic/")
_STATISTICS = re.compile(rb"I\d{4} .*torch/_(dynamo|subclasses|inductor)/")
_EPOCH = re.compile(r"epoch_(\d{1,15})\.pt")
_POLL_SECONDS = 0.3

ARF = [sys.executable, "-m", "arf_plugin.cli.main"]  # the beginning of a command of ours; its words follow

_running: set[subprocess.Popen[bytes]] = set()
_guard = threading.RLock()  # a signal handler may stop all while its thread starts one
_stopping = threading.Event()


class Step(NamedTuple):
    """A progress line of the trainer: epoch from 0, images of it so far and in all (anchors included), last loss."""

    epoch: int
    images: int
    epoch_images: int
    loss: float


class RunProgress:
    """Progress of a run of so many epochs, in images as the trainer counts them."""

    def __init__(self, name: str, epochs: int) -> None:
        self.name, self.epochs = name, epochs
        self.started = time.monotonic()
        self.images, self.first, self.total, self.loss = 0, 0, 0, float("nan")

    def advance(self, step: Step) -> None:
        """Takes in a progress line of the trainer."""
        if not self.images and step.epoch:  # a run that goes on; its rate is that of this start
            self.first = step.epoch * step.epoch_images
        self.images = step.epoch * step.epoch_images + min(step.images, step.epoch_images)
        self.total, self.loss = step.epoch_images * self.epochs, step.loss

    def text(self) -> str:
        """One line, such as ``arf-0: 1200 of 13440 images, 98.1 images/s, 02:05 left, loss 2.310``."""
        total = f" of {self.total}" if self.total else ""
        rate = (self.images - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = f", {tqdm.format_interval((self.total - self.images) / rate)} left" if rate and total else ""
        return f"{self.name}: {self.images}{total} images, {rate:.1f} images/s{left}, loss {self.loss:.3f}"


def trainer(processes: int = 1) -> list[str]:
    """The beginning of a trainer's command line; its flags follow."""
    # `--` keeps torchrun from reading --logs as an abbreviation of one of its own options.
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
    return [*torchrun, "--nproc_per_node", str(processes), "-m", "--", "open_clip_train.main"]


def cpu_threads(count: int) -> dict[str, str]:
    """Environment of a process with that many CPU threads; it must be set before torch is loaded.

    Threads that wait do not spin in it: those that do slow down training wherever other programs run, too.
    """
    return {"OMP_NUM_THREADS": str(count), "OMP_WAIT_POLICY": "passive"}


def parse_step(line: bytes) -> Step | None:
    """Reads a line of the trainer's log; None for lines that do not tell progress."""
    match = _STEP.search(line.rstrip())
    try:
        return Step(int(match[1]), int(match[2]), int(match[3]), float(match[4])) if match else None
    except ValueError:  # a loss that is no number
        return None


def run_logged(
    command: Sequence[str],
    log: Path,
    on_line: Callable[[bytes], object] = lambda line: None,
    environment: Mapping[str, str] | None = None,
    left: Callable[[], bool] = lambda: True,
) -> int:
    """Runs a command with its output in a file, and hands on each line.

    If a process that an earlier start left behind is still at it, that one is followed to its end first.

    Args:
        command: The command; begins with a program's path.
        log: The file; what an earlier start left in it is kept as LOG.1.
        on_line: Called with each line.
        environment: Variables beside those of this process.
        left: Whether there is anything to do; called when no other process is at it.

    Returns:
        The exit status; 0 if there was nothing left to do.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (log.parent / ".lock").open("a") as lock:
        if not take(lock.fileno()):
            follow(log, on_line, lambda: not take(lock.fileno()))
        if not left():
            return 0
        if log.is_file():
            log.replace(log.with_name(log.name + ".1"))
        with log.open("wb") as stream, _guard:
            if _stopping.is_set():
                return 143
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                pass_fds=(
                    lock.fileno(),
                ),  # the lock lasts as long as the process, whatever becomes of this one
            )
            _running.add(process)
        try:
            follow(log, on_line, lambda: process.poll() is None)
            return process.wait()
        finally:
            process.terminate()  # nothing, where it has ended
            process.wait()
            _running.discard(process)


def stop_all() -> None:
    """Ends what runs and starts nothing more; trainings go on after their last whole epoch next time."""
    with _guard:
        _stopping.set()
        for process in list(_running):
            process.terminate()


def is_stopping() -> bool:
    """Whether everything has been told to end."""
    return _stopping.is_set()


def take(descriptor: int) -> bool:
    """Locks an open file for this process; False if another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log, without what torchrun and torch's compiler say after the trainer's own last words."""
    if not log.is_file():
        return "(there is no log)"
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20_000))
        lines = stream.read().splitlines()
    end = next((i for i, line in enumerate(lines) if _TORCHRUN.match(line)), len(lines))
    own = [line for line in lines[:end] if not _STATISTICS.match(line)]
    return b"\n".join((own or lines)[-count:]).decode(errors="replace")


def remove_truncated_checkpoints(folder: Path) -> int | None:
    """Removes checkpoints that a killed trainer was writing; returns the epoch of the last whole one."""
    epochs = []
    for path in folder.glob("epoch_*.pt"):
        match = _EPOCH.fullmatch(path.name)
        if match is not None and zipfile.is_zipfile(path):
            epochs.append(int(match[1]))
        else:
            path.unlink()
    return max(epochs, default=None)


def follow(
    log: Path, on_line: Callable[[bytes], object], goes_on: Callable[[], bool], start: int = 0
) -> None:
    """Hands on a log's lines, from a position on, until what writes it has ended."""
    with contextlib.suppress(FileNotFoundError), log.open("rb") as stream:
        stream.seek(start)
        part, alive = b"", True
        while alive:
            alive = goes_on()  # asked before reading: what was written before the end is read, too
            while piece := stream.readline():
                part += piece
                if part.endswith(b"\n"):
                    on_line(part)
                    part = b""
            if alive:
                time.sleep(_POLL_SECONDS)
        if part:
            on_line(part)
