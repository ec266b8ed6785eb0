"""One run of a grid, from its settings to its finished folder.

::

    GRID/runs/ARM-SEED/settings.json   what the run was started with, so that a changed grid is noticed
                       console.log     everything the trainer printed; out.log, params.txt: open_clip's own
                       checkpoints/    while it runs
                       weights.pt      the finished run's weights, without the optimizer's state
                       run.json        written last; a run without it is not finished
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from arf_plugin.ablation.launch import Step, last_lines, parse_step, remove_torn_checkpoints, run_logged
from arf_plugin.ablation.plan import Run
from arf_plugin.anchors.files import content_digest, digest, list_files, write_json
from arf_plugin.anchors.task import expand_urls
from arf_plugin.errors import GridError
from arf_plugin.pipeline.embedder import model_identity
from arf_plugin.untrusted import read_json

PACKAGES = ("arf-plugin", "open_clip_torch", "torch", "webdataset", "timm", "numpy")


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
        own = [
            str(path)
            for half, suffix in (("captions", ".parquet"), ("pairs", ".tar"))
            for path in list_files(chosen.path / half, suffix)
        ]
        found["anchors"] = {
            "name": chosen.name,
            "content": None if chosen.is_built else _listing(own),
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
    before, now = (
        read_json(file, GridError, advice=f"Do the run again with: --restart {run.arm.name}"),
        settings(run),
    )
    return [
        f"{key}: was {_short(before.get(key))}, is {_short(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do for a run."""
    return (run.path / "run.json").is_file() and run.weights.is_file()


def execute(run: Run, on_step: Callable[[Step], object], environment: Mapping[str, str]) -> dict[str, Any]:
    """Does a run, from where an earlier start has left it.

    Args:
        run: the run; its anchors and its head are there.
        on_step: called with the trainer's progress.
        environment: variables beside those of this process.

    Returns:
        The content of its run.json.

    Raises:
        GridError: the run failed; with the end of its log.
    """
    started = time.monotonic()
    path = run.path
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "settings.json").is_file():
        write_json(path / "settings.json", settings(run))
    last: list[Step] = []
    resumed_at: list[int | None] = []

    def follow(line: bytes) -> None:
        step = parse_step(line)
        if step is not None:
            last[:] = [step]
            on_step(step)

    log = path / "console.log"
    result = run.weights if run.arm.probe else run.last_checkpoint

    def left() -> bool:
        resumed_at.append(remove_torn_checkpoints(path / "checkpoints"))
        return not result.is_file()

    status = run_logged(run.command(), log, follow, environment, left)
    if status or not result.is_file():
        what = f"ended with status {status}" if status else f"left no {result.relative_to(path)}"
        raise GridError(f"{run.name} {what}; the end of {log}:\n{last_lines(log)}")
    if not run.arm.probe:
        strip(run.last_checkpoint, run.weights, run.name)
    record = describe(run) | {
        "seconds": round(time.monotonic() - started, 1),
        "resumed_at_epoch": resumed_at[0] if resumed_at else None,
        "loss": last[0].loss if last else None,
    }
    write_json(path / "run.json", record)
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return record


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
    write_json(
        run.path / "run.json", describe(run) | {"seconds": 0.0, "resumed_at_epoch": None, "loss": None}
    )


def describe(run: Run) -> dict[str, Any]:
    """What run.json says of a run apart from how it went."""
    return {
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
    }


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def strip(checkpoint: Path, out: Path, name: str) -> None:
    """Copies a checkpoint's weights alone, a third of its size."""
    from arf_plugin.evaluation.checkpoints import read_weights, write_weights

    write_weights(out, read_weights(checkpoint), name)


def discard(run: Run) -> None:
    """Throws a run away."""
    shutil.rmtree(run.path, ignore_errors=True)


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
