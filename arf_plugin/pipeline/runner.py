"""Runs a stage: this process's shards (torchrun, srun or a SLURM array), what is not done already, and the end.

Completion markers are written after the artifacts; rejected samples are listed, and too many of them stop the stage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from filelock import FileLock

from arf_plugin.anchors.files import checked, digest, remove_incomplete, replacing, write_json
from arf_plugin.errors import StageError
from arf_plugin.pipeline.bookkeeping import (
    DATA_ERRORS,
    Takeover,
    claim,
    clear,
    finished_summary,
    input_digest,
    is_done,
    lock_files,
    plain_config,
    read_marker,
    read_record,
    require_alone,
    write_marker,
)
from arf_plugin.pipeline.ownership import Ownership
from arf_plugin.pipeline.progress import Progress
from arf_plugin.pipeline.stage import Shard, Stage
from arf_plugin.untrusted import printable_json


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


def run_stage(stage: Stage, options: RunOptions | None = None) -> dict[str, Any]:
    """Runs what is left of a stage, and finalizes it if that was the last of it.

    Returns:
        The summary: stage, shards, samples, kept, rejected, finished, and the stage's own entries.

    Raises:
        StageError: for a changed configuration, a folder that others are at work in, bookkeeping that cannot be read,
            too many rejected samples, or a file that cannot be written.
    """
    options = options or RunOptions()
    if options.restart and options.world > 1:
        raise StageError(
            f"--restart with {options.world} ranks: one would throw away what another has just done.\n"
            "Start a single process with --restart, stop it once it is at work, then start all ranks without it."
        )
    with _telling_of_files(stage):
        shards, config = stage.plan(), plain_config(stage.config())
        with Ownership(lock_files(stage)) as owner:
            lock = FileLock(stage.work / "stage.lock")
            with lock:  # ranks start together, and the slower must not clear away what the faster has begun
                made_by = claim(stage, shards, config, owner, options.restart)
            with checked(Takeover(stage, made_by)):
                _process(stage, shards, made_by, options)
                with lock:  # the last ranks may come to the end together
                    summary = finished_summary(stage, made_by) or _finish(stage, shards, made_by, options)
        return {"stage": stage.name, "out": str(stage.out)} | summary


def restart(stage: Stage) -> None:
    """Throws earlier work away, without going on.

    Raises:
        StageError: while others are at work in the folder.
    """
    with (
        _telling_of_files(stage),
        Ownership(lock_files(stage)) as owner,
        FileLock(stage.work / "stage.lock"),
    ):
        require_alone(stage, owner, [])
        clear(stage)


def describe(stage: Stage) -> dict[str, Any]:
    """Returns what :func:`run_stage` would do, without doing it."""
    shards, config = stage.plan(), plain_config(stage.config())
    recorded = read_record(stage)
    made_by = recorded.made_by if recorded else digest(config)
    done = sum(is_done(stage, shard, made_by) for shard in shards)
    counts = [shard.samples for shard in shards]
    samples = sum(n for n in counts if n is not None) if None not in counts else None
    return {
        "stage": stage.name,
        "out": str(stage.out),
        "shards": len(shards),
        "shards_done": done,
        "samples": samples,
        "config": config,
    }


@contextmanager
def _telling_of_files(stage: Stage) -> Iterator[None]:
    """Turns errors of files into one sentence; they name the file."""
    try:
        yield
    except OSError as cause:
        raise StageError(
            f"Stage {stage.name} cannot go on: {cause}.\n"
            "Whatever is finished is kept: mend the cause and run the same command again."
        ) from cause


def _process(stage: Stage, shards: list[Shard], made_by: str, options: RunOptions) -> None:
    mine = [s for s in shards[options.rank :: options.world] if not is_done(stage, s, made_by)]
    if not mine:
        print(f"{stage.name}: nothing left to do in {stage.out}", file=sys.stderr)
        return
    (stage.work / "finished.json").unlink(missing_ok=True)
    stage.prepare()
    stage.begin()
    counts = [shard.samples for shard in mine]
    total = sum(n for n in counts if n is not None) if None not in counts else None
    weight = sum(shard.weight for shard in mine)
    seen, seen_weight, bad = 0, 0.0, 0
    failed: list[str] = []
    with Progress(stage.name, total, stage.unit) as progress:
        for shard in mine:
            inputs = input_digest(
                stage, shard
            )  # before it is read: what changes meanwhile is noticed next time
            try:
                outcome = stage.process(shard, progress.advance)
            except DATA_ERRORS as cause:
                failed.append(str(cause))
                continue
            write_marker(stage, shard, outcome, made_by, inputs)
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


def _finish(stage: Stage, shards: list[Shard], made_by: str, options: RunOptions) -> dict[str, Any]:
    markers = [read_marker(stage, shard, made_by) for shard in shards]
    outcomes = [marker.outcome for marker in markers if marker is not None]
    summary: dict[str, Any] = {"shards": len(shards)}
    if len(outcomes) < len(shards):
        summary |= {"finished": False, "shards_missing": len(shards) - len(outcomes)}
        return summary
    rejects = [
        (shard.name, *reject) for shard, o in zip(shards, outcomes, strict=True) for reject in o.rejects
    ]
    samples = sum(o.samples for o in outcomes)
    with replacing(stage.work / "rejects.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for shard_name, sample, reason in rejects:
            file.write(printable_json({"shard": shard_name, "id": sample, "reason": reason}) + "\n")
    _check_rejects(stage, len(rejects), samples, [(r[1], r[2]) for r in rejects], options)
    summary |= {"samples": samples, "kept": sum(o.kept for o in outcomes), "rejected": len(rejects)}
    summary |= stage.finalize(shards) | {"finished": True}
    for folder in {path.parent for path in stage.artifacts(shards)} | {stage.work, stage.work / "done"}:
        remove_incomplete(folder)
    remove_incomplete(stage.out, all_hosts=False)
    write_json(stage.work / "finished.json", summary | {"config": made_by})
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
