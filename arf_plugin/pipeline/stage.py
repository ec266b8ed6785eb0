"""The skeleton that all stages of anchor building share.

A stage plans its work as shards, turns each shard into artifacts, and finalizes once all are there::

    plan() -> [Shard]      process(Shard) -> Outcome      finalize([Outcome]) -> summary

:func:`run_stage` owns the rest: which shards are this process's (torchrun, srun or a SLURM array), what is
done already, completion markers that are written after the artifacts, the list of rejected samples, and the
refusal to mix two configurations in one folder. All bookkeeping is below ``<out>/work/<stage>/``::

    config.json            what determines the bytes of the artifacts
    plan.json              the artifacts, so that a restart finds those of another configuration
    done/<shard>.json      completion marker: counts and rejected samples
    rejects.jsonl          every rejected sample with its reason
    finished.json          summary, once finalized
"""

from __future__ import annotations

import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from arf_plugin.anchors.files import remove_incomplete, replacing, write_json
from arf_plugin.errors import PoolError, StageError, TaskDataError
from arf_plugin.pipeline.progress import Progress

DATA_ERRORS = (PoolError, TaskDataError)  # a shard that raises one is left out, and the others are done first


@dataclass(frozen=True)
class Shard:
    """A unit of work that is done, or done again, as a whole.

    Attributes:
        index: position in the plan.
        name: name of its completion marker.
        source: what to read; its meaning is the stage's own.
        weight: relative size, for the estimate of the remaining time.
        samples: number of samples, if known.
    """

    index: int
    name: str
    source: Any
    weight: float = 1.0
    samples: int | None = None


@dataclass
class Outcome:
    """What became of a shard: samples seen, samples kept, and the rejected ones as (id, reason)."""

    samples: int = 0
    kept: int = 0
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def reject(self, sample: str, reason: str) -> None:
        """Notes a sample that was left out."""
        self.rejects.append((sample, reason))


@dataclass(frozen=True)
class RunOptions:
    """How to run a stage; nothing here changes the bytes of the result.

    Attributes:
        restart: throw earlier work away.
        max_bad_fraction: stop when more than this fraction of the samples is rejected.
        rank, world: this process's share of the shards: every ``world``-th from ``rank`` on.
    """

    restart: bool = False
    max_bad_fraction: float = 0.01
    rank: int = 0
    world: int = 1


class Stage(ABC):
    """One stage; see the module's docstring.

    Args:
        out: folder of the artifacts.
        work: folder of the bookkeeping; ``<out>/work/<name>`` by default.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "images"
    shard_inputs: ClassVar[str] = (
        ""  # entry of the configuration that may list the shards' inputs, one by one
    )

    def __init__(self, out: Path, work: Path | None = None) -> None:
        self.out = out
        self.work = work or out / "work" / self.name

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns, as JSON, everything that determines the bytes of the artifacts: settings and inputs."""

    @abstractmethod
    def plan(self) -> list[Shard]:
        """Returns all shards, in an order that depends on the configuration alone."""

    def prepare(self) -> None:  # noqa: B027 - most stages need none
        """Loads models and the like; called once, and only if there is a shard to process."""

    @abstractmethod
    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Writes the artifacts of a shard, each through :func:`replacing`; reports progress in samples."""

    @abstractmethod
    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """Returns the files that :meth:`process` writes for these shards."""

    def finalize(self, shards: list[Shard]) -> dict[str, Any]:
        """Called when all shards are done; returns entries for the summary."""
        return {}


def run_stage(stage: Stage, options: RunOptions | None = None) -> dict[str, Any]:
    """Runs what is left of a stage, and finalizes it if that was the last of it.

    Returns:
        The summary: stage, shards, samples, kept, rejected, finished, and the stage's own entries.

    Raises:
        StageError: for a changed configuration, too many rejected samples, or a file that cannot be written.
    """
    options = options or RunOptions()
    if options.restart and options.world > 1:
        raise StageError(
            f"--restart with {options.world} ranks: one would throw away what another has just done.\n"
            "Start a single process with --restart, stop it once it is at work, then start all ranks without it."
        )
    try:
        if options.restart:
            clear(stage)
        shards = stage.plan()
        lock = FileLock(stage.work / "stage.lock")
        with lock:  # ranks start together, and the slower must not clear away what the faster has begun
            _claim(stage, shards)
        _process(stage, shards, options)
        with lock:  # the last ranks may come to the end together
            finished = stage.work / "finished.json"
            if finished.exists():
                summary = json.loads(finished.read_text(encoding="utf-8"))
            else:
                summary = _finish(stage, shards, options)
        return {"stage": stage.name, "out": str(stage.out)} | summary
    except OSError as cause:
        raise StageError(
            f"Stage {stage.name} cannot go on: {cause}.\n"
            "Whatever is finished is kept: mend the cause and run the same command again."
        ) from cause


def describe(stage: Stage) -> dict[str, Any]:
    """Returns what :func:`run_stage` would do, without doing it."""
    shards = stage.plan()
    done = sum(_is_done(stage, shard) for shard in shards)
    counts = [shard.samples for shard in shards]
    samples = sum(n for n in counts if n is not None) if None not in counts else None
    return {
        "stage": stage.name,
        "out": str(stage.out),
        "shards": len(shards),
        "shards_done": done,
        "samples": samples,
        "config": stage.config(),
    }


def _marker(stage: Stage, shard: Shard) -> Path:
    return stage.work / "done" / f"{shard.name}.json"


def _is_done(stage: Stage, shard: Shard) -> bool:
    return _marker(stage, shard).exists() and all(path.exists() for path in stage.artifacts([shard]))


def clear(stage: Stage) -> None:
    """Removes an earlier run; markers first, so that a kill in the middle leaves nothing that looks finished."""
    shutil.rmtree(stage.work / "done", ignore_errors=True)
    (stage.work / "finished.json").unlink(missing_ok=True)
    plan = stage.work / "plan.json"
    if plan.exists():
        for name in json.loads(plan.read_text(encoding="utf-8")):
            path = stage.out / name
            if path.resolve().is_relative_to(stage.out.resolve()):
                path.unlink(missing_ok=True)
    for path in (plan, stage.work / "rejects.jsonl", stage.work / "config.json"):
        path.unlink(missing_ok=True)


def _claim(stage: Stage, shards: list[Shard]) -> None:
    """Records configuration and artifacts, or compares the configuration with the recorded one."""
    path = stage.work / "config.json"
    config = json.loads(json.dumps(stage.config()))
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if recorded == config:
        return
    if recorded is None or not any((stage.work / "done").glob("*.json")):  # nothing done that could be mixed
        clear(stage)
        write_json(stage.work / "plan.json", [str(p.relative_to(stage.out)) for p in stage.artifacts(shards)])
        write_json(path, config)
        return
    if _is_mended(stage, shards, recorded, config):
        write_json(path, config)
        return
    lines = [f"  {line}" for line in differences(recorded, config)]
    if len(lines) > 10:
        lines = [*lines[:10], f"  ... {len(lines)} differences in all"]
    raise StageError(
        f"{stage.out} holds work of stage {stage.name} with another configuration or other inputs:\n"
        + "\n".join(lines)
        + "\nRun it with the old ones to go on, give another --out, or drop the old work with --restart."
    )


def _is_mended(stage: Stage, shards: list[Shard], old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether nothing but inputs of shards that are still to do has changed, as when a damaged tar was replaced."""
    name = stage.shard_inputs
    before, now = old.get(name), new.get(name)
    if not (isinstance(before, list) and isinstance(now, list) and len(before) == len(now) == len(shards)):
        return False
    if old | {name: None} != new | {name: None}:
        return False
    return all(
        a == b or not _is_done(stage, shards[i]) for i, (a, b) in enumerate(zip(before, now, strict=True))
    )


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lists where two JSON values differ, such as ``selection.k: 3 -> 4``."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{where}.{key}" if where else key, key) for key in sorted(old.keys() | new.keys())]
        return [line for name, key in pairs for line in differences(old.get(key), new.get(key), name)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = list(zip(old, new, strict=True))
        return [line for i, (a, b) in enumerate(pairs) for line in differences(a, b, f"{where}[{i}]")]
    if isinstance(old, list) and isinstance(new, list):
        return [f"{where}: {len(old)} entries -> {len(new)}"]
    return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:90]} ... ({len(text)} characters)"


def _process(stage: Stage, shards: list[Shard], options: RunOptions) -> None:
    mine = [shard for shard in shards[options.rank :: options.world] if not _is_done(stage, shard)]
    if not mine:
        print(f"{stage.name}: nothing left to do in {stage.out}", file=sys.stderr)
        return
    (stage.work / "finished.json").unlink(missing_ok=True)
    stage.prepare()
    counts = [shard.samples for shard in mine]
    total = sum(n for n in counts if n is not None) if None not in counts else None
    weight = sum(shard.weight for shard in mine)
    seen, seen_weight, bad = 0, 0.0, 0
    failed: list[str] = []
    with Progress(stage.name, total, stage.unit) as progress:
        for shard in mine:
            try:
                outcome = stage.process(shard, progress.advance)
            except DATA_ERRORS as cause:
                failed.append(str(cause))
                continue
            marker = {"samples": outcome.samples, "kept": outcome.kept, "rejects": outcome.rejects}
            write_json(_marker(stage, shard), marker)
            seen, seen_weight = seen + outcome.samples, seen_weight + shard.weight
            bad += len(outcome.rejects)
            if total is None and seen_weight > 0:
                progress.expect(round(seen * weight / seen_weight))
            if seen >= 1000:
                _check_rejects(stage, bad, seen, outcome.rejects, options)
    if failed:
        shown = "\n".join(failed[:3])
        raise StageError(
            f"Stage {stage.name}: {len(failed)} of {len(mine)} shards could not be processed; the others are done.\n"
            f"{shown}\nMend the data and run the same command again."
        )


def _finish(stage: Stage, shards: list[Shard], options: RunOptions) -> dict[str, Any]:
    markers = [_marker(stage, shard) for shard in shards]
    missing = sum(not _is_done(stage, shard) for shard in shards)
    summary: dict[str, Any] = {"shards": len(shards)}
    if missing:
        summary |= {"finished": False, "shards_missing": missing}
        return summary
    outcomes = [json.loads(path.read_text(encoding="utf-8")) for path in markers]
    rejects = [
        (shard.name, *reject) for shard, o in zip(shards, outcomes, strict=True) for reject in o["rejects"]
    ]
    samples = sum(o["samples"] for o in outcomes)
    with replacing(stage.work / "rejects.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for shard_name, sample, reason in rejects:
            line = {"shard": shard_name, "id": sample, "reason": reason}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    _check_rejects(stage, len(rejects), samples, [(r[1], r[2]) for r in rejects], options)
    summary |= {"samples": samples, "kept": sum(o["kept"] for o in outcomes), "rejected": len(rejects)}
    summary |= stage.finalize(shards) | {"finished": True}
    for folder in {path.parent for path in stage.artifacts(shards)} | {stage.work, stage.work / "done"}:
        remove_incomplete(folder)
    remove_incomplete(stage.out, all_hosts=False)
    write_json(stage.work / "finished.json", summary)
    return summary


def _check_rejects(
    stage: Stage, bad: int, seen: int, examples: list[tuple[str, str]], options: RunOptions
) -> None:
    if seen == 0 or bad <= options.max_bad_fraction * seen:
        return
    shown = "\n".join(f"  {sample}: {reason}" for sample, reason in examples[:5])
    raise StageError(
        f"Stage {stage.name} rejected {bad} of {seen} samples ({bad / seen:.1%}), more than "
        f"--max-bad-fraction {options.max_bad_fraction:g} allows:\n{shown}\n"
        f"All of them, with reasons: {stage.work}/done. Mend the data, or allow more with --max-bad-fraction."
    )
