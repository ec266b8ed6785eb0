"""Runs of a grid: one from its settings to its finished folder, and several side by side.

::

    GRID/runs/ARM-SEED/settings.json   what the run was started with, so that a changed grid is noticed
                       console.log     everything the trainer printed; out.log, params.txt: open_clip's own
                       checkpoints/    while it runs
                       weights.pt      the finished run's weights, without the optimizer's state
                       run.json        written last; a run without it is not finished
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from arf_plugin.ablation import launch
from arf_plugin.ablation.launch import RunProgress, Step
from arf_plugin.ablation.plan import Run
from arf_plugin.anchors.task import expand_urls
from arf_plugin.console import progress
from arf_plugin.errors import ArfError, GridError
from arf_plugin.files import content_digest, digest, list_files, write_json
from arf_plugin.pipeline.embedder import model_identity
from arf_plugin.untrusted import read_json

PACKAGES = ("arf-plugin", "open_clip_torch", "torch", "webdataset", "timm", "numpy")
INTERVAL = 60  # seconds between two lines on a run where nobody watches a bar


def settings(run: Run) -> dict[str, Any]:
    """Everything that the run's result depends on; files by their content and not by their place."""
    grid, task = run.grid, run.grid.task
    found: dict[str, Any] = {
        "seed": run.seed,
        "processes": run.processes,
        "model": model_identity(grid.model, grid.pretrained),
        "task.data": _listing(expand_urls(task.data)),
        "task.samples": task.samples,
        "task.classnames": _digest_of(task.classnames),
        "task.templates": _digest_of(task.templates),
        "mix": run.arm.mix,
        "head": run.arm.head,
    }
    if run.arm.anchors is not None:
        chosen = grid.anchors[run.arm.anchors]
        own = [*list_files(chosen.path / "captions", ".parquet"), *list_files(chosen.path / "pairs", ".tar")]
        found["anchors"] = {
            "name": chosen.name,
            "content": None if chosen.is_built else _listing(list(map(str, own))),
            "captions": chosen.captions,
            "build": [[word.replace(str(run.folder), "GRID") for word in words] for words in chosen.build],
        }
    for name, words in sorted(run.arm.flags.items()):
        found[f"--{name}"] = list(words or ())
    return found


def changes(run: Run) -> list[str]:
    """What differs between the settings a run was started with and its settings now; empty if it has none yet."""
    file = run.path / "settings.json"
    if not file.exists():
        return []
    before = read_json(file, GridError, advice=f"Do the run again with: --restart {run.arm.name}")
    now = settings(run)
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return [f"{key}: was {_short(before.get(key))}, is {_short(now.get(key))}" for key in keys]


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do for a run."""
    return (run.path / "run.json").is_file() and run.weights.is_file()


def execute(run: Run, on_step: Callable[[Step], object], environment: Mapping[str, str]) -> None:
    """Does a run, whose anchors and head are there, from where an earlier start has left it.

    Raises:
        GridError: The run failed; with the end of its log.
    """
    started = time.monotonic()
    path, log = run.path, run.path / "console.log"
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "settings.json").is_file():
        write_json(path / "settings.json", settings(run))
    result = run.weights if run.arm.is_probe else run.last_checkpoint
    loss: float | None = None
    resumed_at: int | None = None

    def follow(line: bytes) -> None:
        nonlocal loss
        if (step := launch.parse_step(line)) is not None:
            loss = step.loss
            on_step(step)

    def left() -> bool:
        nonlocal resumed_at
        resumed_at = launch.remove_truncated_checkpoints(path / "checkpoints")
        return not result.is_file()

    status = launch.run_logged(run.command(), log, follow, environment, left)
    if status or not result.is_file():
        what = f"ended with status {status}" if status else f"left no {result.relative_to(path)}"
        raise GridError(f"{run.name} {what}; the end of {log}:\n{launch.last_lines(log)}")
    if not run.arm.is_probe:
        strip(run.last_checkpoint, run.weights, run.name)
    _finish(run, round(time.monotonic() - started, 1), resumed_at, loss)
    shutil.rmtree(path / "checkpoints", ignore_errors=True)


def save_before(run: Run) -> None:
    """Writes the weights before fine-tuning as a checkpoint, so that they are evaluated and mixed as the others are."""
    import torch

    from arf_plugin.evaluation.checkpoints import write_weights
    from arf_plugin.pipeline.embedder import load_model

    if is_finished(run):
        return
    write_json(run.path / "settings.json", settings(run))
    model, _, _ = load_model(run.grid.model, run.grid.pretrained, torch.device("cpu"), torch.float32)
    write_weights(run.weights, model.state_dict(), run.name)
    _finish(run, 0.0)


def _finish(run: Run, seconds: float, resumed_at: int | None = None, loss: float | None = None) -> None:
    """Writes run.json, which says that the run is finished, and how."""
    record = {
        "arm": run.arm.name,
        "label": run.arm.label,
        "kind": run.arm.kind,
        "seed": run.seed,
        "candidate": run.candidate,
        "command": run.command() if run.arm.is_trained else [],
        "checkpoint": run.weights.name,
        "steps": run.steps(),
        "images": run.images(),
        "anchors": str(run.anchors) if run.anchors is not None else None,
        "versions": versions(),
        "seconds": seconds,
        "resumed_at_epoch": resumed_at,
        "loss": loss,
    }
    write_json(run.path / "run.json", record)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def strip(checkpoint: Path, out: Path, name: str) -> None:
    """Copies a checkpoint's weights alone, a third of its size."""
    from arf_plugin.evaluation.checkpoints import read_weights, write_weights

    write_weights(out, read_weights(checkpoint), name)


def places(jobs: int | None, processes: int, on_cpu: bool) -> list[Mapping[str, str]]:
    """Divides the machine: the environments of the runs that may be under way at a time.

    On CPUs, as many single-threaded runs as cores: small runs side by side finish sooner than one after the other. On
    GPUs each place has `processes` GPUs of its own through CUDA_VISIBLE_DEVICES. (Written for GPUs with care, and not
    run on any: none was at hand.)

    Args:
        jobs: Runs side by side; None for as many as fit.
        processes: Of one run.
        on_cpu: Whether the trainer has been told to stay on the CPU.

    Raises:
        GridError: There are fewer GPUs than one run, or the wanted runs, need.
    """
    if not on_cpu:
        import torch

        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = devices.split(",") if devices else [str(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available() and names:
            wanted = jobs or max(1, len(names) // processes)
            if wanted * processes > len(names):
                raise GridError(
                    f"{wanted} runs side by side with {processes} processes each need {wanted * processes} GPUs; "
                    f"there are {len(names)} ({','.join(names)}). Lower --jobs or --nproc-per-node."
                )
            parts = [names[i * processes : (i + 1) * processes] for i in range(wanted)]
            return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
    cores = len(os.sched_getaffinity(0))
    count = jobs or max(1, cores // processes)
    return [launch.cpu_threads(max(1, cores // (count * processes)))] * count


def run_all(runs: Sequence[Run], where: Sequence[Mapping[str, str]], title: str) -> dict[str, str]:
    """Does what is left of runs, one in each of the environments at a time; a failed one lets the others finish.

    Returns:
        The failed runs' names, each with what went wrong. A run that starts from another's head comes after it.
    """
    from tqdm import tqdm

    todo = [run for run in runs if not is_finished(run)]
    if not todo:
        return {}
    failures: dict[str, str] = {}
    finished = {run.name: threading.Event() for run in todo}
    free: queue.Queue[Mapping[str, str]] = queue.Queue()
    for environment in where:
        free.put(environment)
    bar = progress(title, "runs", len(todo))

    def say(text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def work(run: Run) -> None:
        environment = free.get()
        told = RunProgress(run.name, run.count("epochs"))
        said = told.started

        def advance(step: Step) -> None:
            nonlocal said
            told.advance(step)
            bar.set_postfix_str(told.text())
            if bar.disable and time.monotonic() - said >= INTERVAL:
                said = time.monotonic()
                say(told.text())

        try:
            if (head := run.head) is not None:
                if head.name in finished:  # it was submitted before, so it is at work or done
                    finished[head.name].wait()
                if not is_finished(head):
                    raise GridError(f"{run.name} starts from the head of {head.name}, which is not there.")
            execute(run, advance, environment)
            seconds = timedelta(seconds=round(time.monotonic() - told.started))
            loss = "" if told.loss != told.loss else f", loss {told.loss:.3f}"
            say(f"{run.name}: done in {seconds}{loss}")
        except ArfError as error:
            failures[run.name] = str(error)
            say(f"{run.name}: stopped" if launch.is_stopping() else f"{run.name}: failed\n{error}")
        finally:
            free.put(environment)
            finished[run.name].set()
            bar.update(1)

    with bar, ThreadPoolExecutor(len(where)) as pool:
        if len(todo) < len(runs):
            say(f"{title}: {len(runs) - len(todo)} of {len(runs)} runs are finished and skipped")
        try:
            for future in [pool.submit(work, run) for run in todo]:
                future.result()
        except BaseException:  # Ctrl-C, a signal, or a mistake of ours: end what runs
            launch.stop_all()
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def _digest_of(name: str | None) -> str | None:
    """Digest of a local file; the name itself of what is none, such as ``imagenet``."""
    path = Path(name) if name else None
    return content_digest([path]) if path is not None and path.is_file() else name


def _listing(urls: list[str]) -> str:
    """Digest of what the files hold, computed once and then known as long as they stay as they are.

    What is on no disk of this machine is known by its name.
    """
    entries = [content_digest([path]) if (path := Path(url)).is_file() else url for url in urls]
    return f"{len(entries)} files, {digest(entries)[:16]}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(set)"
    return "(not given)" if value is None else str(value)
