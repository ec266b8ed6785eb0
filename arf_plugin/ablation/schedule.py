"""Runs side by side: who runs where, in which order, and what happens when one fails."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from arf_plugin.ablation.launch import cpu_threads, is_stopping, stop_all
from arf_plugin.ablation.plan import Run
from arf_plugin.ablation.progress import Board
from arf_plugin.ablation.runs import execute, is_finished
from arf_plugin.errors import ArfError, GridError


@dataclass(frozen=True)
class Places:
    """Where runs may be at a time: an environment per place.

    Attributes:
        environments: variables of the runs at each place.
    """

    environments: tuple[Mapping[str, str], ...]

    @property
    def jobs(self) -> int:
        """Runs side by side."""
        return len(self.environments)


def places(jobs: int | None, processes: int, on_cpu: bool) -> Places:
    """Divides the machine.

    On CPUs, as many single-threaded runs as cores: small runs side by side finish sooner than one after the other. On
    GPUs each place has `processes` GPUs of its own through CUDA_VISIBLE_DEVICES. (Written for GPUs with care, and not
    run on any: none was at hand.)

    Args:
        jobs: runs side by side; None for as many as fit.
        processes: processes of a run.
        on_cpu: whether the trainer has been told to stay on the CPU.

    Raises:
        GridError: there are fewer GPUs than one run, or the wanted runs, need.
    """
    if not on_cpu:
        import torch

        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = devices.split(",") if devices else [str(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available() and names:
            wanted = jobs if jobs is not None else max(1, len(names) // processes)
            if wanted * processes > len(names):
                raise GridError(
                    f"{wanted} runs side by side with {processes} processes each need {wanted * processes} GPUs; "
                    f"there are {len(names)} ({','.join(names)}). Lower --jobs or --nproc-per-node."
                )
            parts = [names[i * processes : (i + 1) * processes] for i in range(wanted)]
            return Places(tuple({"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts))
    cores = len(os.sched_getaffinity(0))
    count = jobs if jobs is not None else max(1, cores // processes)
    threads = max(1, cores // (count * processes))
    return Places(tuple(cpu_threads(threads) for _ in range(count)))


def run_all(runs: Sequence[Run], where: Places, title: str) -> dict[str, str]:
    """Does runs, several at a time; a failed one lets the others finish.

    Args:
        runs: runs in their order; a run that starts from another's head comes after it. Finished ones are skipped.
        where: where they may be.
        title: of the overall bar.

    Returns:
        The failed runs' names, each with what went wrong.
    """
    todo = [run for run in runs if not is_finished(run)]
    if not todo:
        return {}
    failures: dict[str, str] = {}
    finished = {run.name: threading.Event() for run in todo}
    free: queue.Queue[Mapping[str, str]] = queue.Queue()
    for environment in where.environments:
        free.put(environment)
    with Board(title, len(todo), where.jobs) as board, ThreadPoolExecutor(where.jobs) as pool:
        if len(todo) < len(runs):
            board.say(f"{title}: {len(runs) - len(todo)} of {len(runs)} runs are finished and skipped")

        def work(run: Run) -> None:
            environment = free.get()
            try:
                _wait_for_head(run, finished)
                with board.begin(run.name, run.epochs) as progress:
                    execute(run, progress.advance, environment)
            except ArfError as error:
                failures[run.name] = str(error)
                board.say(f"{run.name}: stopped" if is_stopping() else f"{run.name}: failed\n{error}")
            finally:
                free.put(environment)
                finished[run.name].set()

        futures: list[Future[None]] = [pool.submit(work, run) for run in todo]
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C, a signal, or a mistake of ours: end what runs
            for future in futures:
                future.cancel()
            stop_all()
            raise
    return failures


def _wait_for_head(run: Run, finished: Mapping[str, threading.Event]) -> None:
    head = run.head
    if head is None:
        return
    if head.name in finished:  # it was submitted before, so it is at work or done
        finished[head.name].wait()
    if not is_finished(head):
        raise GridError(f"{run.name} starts from the head of {head.name}, which is not there.")
