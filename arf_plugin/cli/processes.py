"""``--processes N``: a stage's shards shared by N processes of this machine, without torchrun or SLURM.

The flag is not called ``--workers`` because that already is, as in open_clip, the number of threads that decode images
within each process. The processes are ranks like any others (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), so with several
GPUs each has its own, and the result is that of a single process to the byte. Where a stage is busy on the CPU, each
process gets its part of the cores (``OMP_NUM_THREADS``, unless that is set).

They end with the process that started them, however that ends: on a signal it stops them first; if it is killed, the
kernel kills them (Linux), or they notice that nobody holds the other end of their standard input.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO

from arf_plugin.errors import FlagError, StageError
from arf_plugin.untrusted import printable

_CHILD = "ARF_LOCAL_PROCESS"  # set in the processes that are started here: the parent's id
_PATIENCE = 10  # seconds that a process has to end before it is killed
_PR_SET_PDEATHSIG = 1


def is_child() -> bool:
    """True in a process that ``--processes`` has started."""
    return _CHILD in os.environ


def wanted(args: argparse.Namespace) -> bool:
    """True if this process is to start others.

    Raises:
        FlagError: if torchrun or SLURM shares the work already.
    """
    from arf_plugin.pipeline.ranks import ranks

    if args.processes == 1 or args.dry_run or is_child():
        return False
    rank, world = ranks()
    if world > 1:
        raise FlagError(
            f"--processes {args.processes}: torchrun or SLURM shares the work already (rank {rank} of {world}). Start "
            "more ranks there, or leave --processes out."
        )
    return True


def share(args: argparse.Namespace, *, stop_together: bool = False) -> None:
    """Runs this command in ``args.processes`` processes and waits for them; their messages get a number in front.

    Args:
        args: the parsed command line, with its words in ``argv``.
        stop_together: stop all when one fails, for commands whose ranks wait for one another.

    Raises:
        StageError: if one fails.
    """
    command = [sys.executable, "-m", "arf_plugin.cli.processes", *args.argv]
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    running: list[subprocess.Popen[str]] = []
    readers = []
    with _signals_raised():
        try:
            for rank in range(args.processes):
                ranked = {
                    _CHILD: str(os.getpid()),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(args.processes),
                }
                environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | ranked
                child = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,  # never written to: its end is this process's
                    stdout=subprocess.DEVNULL,  # its summary would be that of an unfinished stage
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                )
                running.append(child)
                assert child.stderr is not None
                readers.append(threading.Thread(target=_relay, args=(rank, child.stderr), daemon=True))
                readers[-1].start()
            while any(child.poll() is None for child in running):
                if stop_together and any(child.returncode for child in running):
                    break
                time.sleep(0.05)
        finally:
            statuses = _stop(running)
            for reader in readers:
                reader.join(timeout=5)
    failed = [rank for rank, status in enumerate(statuses) if status]
    if failed:
        raise StageError(
            f"{len(failed)} of {args.processes} processes failed ({', '.join(map(str, failed))}, exit status "
            f"{', '.join(str(statuses[rank]) for rank in failed)}); what they said is above.\n"
            "Whatever is finished is kept: fix the cause and run the same command again."
        )


class _Signalled(BaseException):
    """A signal that would have ended this process."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Turns signals that end this process into an exception, so that others are stopped first; then it ends by them."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # not one that nohup has switched off
                before[number] = signal.signal(number, stop)
    try:
        yield
    except _Signalled as cause:
        signal.signal(cause.number, signal.SIG_DFL)
        os.kill(os.getpid(), cause.number)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(running: list[subprocess.Popen[str]]) -> list[int]:
    """Ends processes, if they have not ended, and returns their exit statuses."""
    for child in running:
        child.terminate()
    deadline = time.monotonic() + _PATIENCE
    for child in running:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
    return [child.wait() for child in running]


def _end_with_parent() -> None:
    """Has this process end when the one that started it does."""
    parent = int(os.environ[_CHILD])
    if sys.platform == "linux":  # at once, whatever this process is busy with
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before

    parents = os.dup(0)  # the processes that this one may start do not get it
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        while os.read(parents, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _relay(rank: int, stream: IO[str]) -> None:
    for line in stream:
        print(f"[{rank}] {printable(line.rstrip())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from arf_plugin.cli.main import main

    _end_with_parent()
    sys.exit(main())
