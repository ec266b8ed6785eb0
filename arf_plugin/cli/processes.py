"""``--processes N``: a stage's shards shared by N processes of this machine, without torchrun or SLURM.

The flag is not called ``--workers`` because that already is, as in open_clip, the number of threads that decode images
within each process. The processes are ranks like any others (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), so with several
GPUs each has its own, and the result is that of a single process to the byte. Where a stage is busy on the CPU, each
process gets its part of the cores (``OMP_NUM_THREADS``, unless that is set).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from typing import IO

from arf_plugin.errors import FlagError, StageError

_CHILD = "ARF_LOCAL_PROCESS"  # set in the processes that are started here


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
    command = [sys.executable, "-m", "arf_plugin.cli.main", *args.argv]
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    running: list[subprocess.Popen[str]] = []
    readers = []
    try:
        for rank in range(args.processes):
            ranked = {
                _CHILD: "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(args.processes),
            }
            environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | ranked
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
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
        for child in running:
            child.terminate()  # does nothing to those that have ended
        statuses = [child.wait() for child in running]
        for reader in readers:
            reader.join(timeout=5)
    failed = [rank for rank, status in enumerate(statuses) if status]
    if failed:
        raise StageError(
            f"{len(failed)} of {args.processes} processes failed ({', '.join(map(str, failed))}, exit status "
            f"{', '.join(str(statuses[rank]) for rank in failed)}); what they said is above.\n"
            "Whatever is finished is kept: mend the cause and run the same command again."
        )


def _relay(rank: int, stream: IO[str]) -> None:
    for line in stream:
        print(f"[{rank}] {line.rstrip()}", file=sys.stderr, flush=True)
