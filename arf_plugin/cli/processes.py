"""``--processes N``: a stage's shards shared by N processes of this machine, without torchrun or SLURM.

The flag is not called ``--workers`` because that already is, as in open_clip, the number of threads that decode images
within each process. The processes are ranks like any others (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), so with several
GPUs each has its own, and the result is that of a single process to the byte. Where a stage is busy on the CPU, each
process gets its part of the cores (``OMP_NUM_THREADS``, unless that is set).

They end with the process that started them, however that ends: they notice that nobody holds the other end of their
standard input.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from arf_plugin.errors import FlagError, StageError
from arf_plugin.untrusted import printable

_CHILD = "ARF_LOCAL_PROCESS"  # set in the processes that are started here: the parent's id


def is_child() -> bool:
    """True in a process that ``--processes`` has started."""
    return _CHILD in os.environ


def wanted(args: argparse.Namespace) -> bool:
    """True if this process is to start others.

    Raises:
        FlagError: if torchrun or SLURM shares the work already.
    """
    from arf_plugin.pipeline.execution import ranks

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
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes))} | os.environ
    environment |= {_CHILD: str(os.getpid()), "WORLD_SIZE": str(args.processes)}
    running: list[subprocess.Popen[str]] = []
    readers = []
    try:
        for rank in map(str, range(args.processes)):
            child = subprocess.Popen(
                [sys.executable, "-m", "arf_plugin.cli.processes", *args.argv],
                env=environment | {"RANK": rank, "LOCAL_RANK": rank},
                stdin=subprocess.PIPE,  # never written to: its end is this process's
                stdout=subprocess.DEVNULL,  # its summary would be that of an unfinished stage
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            running.append(child)
            assert child.stderr is not None
            relayed = (rank, child.stderr, args.stderr)
            readers.append(threading.Thread(target=_relay, args=relayed, daemon=True))
            readers[-1].start()
        while any(child.poll() is None for child in running):
            if stop_together and any(child.returncode for child in running):
                break
            time.sleep(0.05)
    finally:
        for child in running:
            child.terminate()
        statuses = [child.wait() for child in running]
        for reader in readers:
            reader.join(timeout=5)
    failed = {str(rank): str(status) for rank, status in enumerate(statuses) if status}
    if failed:
        raise StageError(
            f"{len(failed)} of {args.processes} processes failed ({', '.join(failed)}, exit status "
            f"{', '.join(failed.values())}); what they said is above.\n"
            "Whatever is finished is kept: fix the cause and run the same command again."
        )


def _end_with_parent() -> None:
    """Has this process end when the one that started it does."""
    if os.getppid() != int(os.environ[_CHILD]):
        os._exit(1)  # it was gone before
    parents = os.dup(0)  # the processes that this one may start do not get it
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)

    def wait() -> None:
        os.read(parents, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _relay(rank: str, stream: IO[str], to: IO[str]) -> None:
    for line in stream:
        print(f"[{rank}] {printable(line.rstrip())}", file=to, flush=True)


if __name__ == "__main__":
    from arf_plugin.cli.main import main

    _end_with_parent()
    sys.exit(main())
