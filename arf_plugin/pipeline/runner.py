"""Runs a stage: this process's shards (torchrun, srun or a SLURM array), what is not done already, and the end.

Completion markers are written after the artifacts; rejected samples are listed, and too many of them stop the stage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from filelock import FileLock

from arf_plugin.console import progress
from arf_plugin.errors import StageError
from arf_plugin.files import checked, digest, remove_incomplete, replacing
from arf_plugin.pipeline.bookkeeping import DATA_ERRORS, Bookkeeping
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.stage import Stage, count_samples
from arf_plugin.untrusted import printable_json

_LOG_EVERY = 60  # seconds between two lines of progress where there is no terminal to draw a bar on


def run_stage(stage: Stage, execution: Execution | None = None) -> dict[str, Any]:
    """Runs what is left of a stage, and finalizes it if that was the last of it.

    Returns:
        The summary: stage, shards, samples, kept, rejected, finished, and the stage's own entries.

    Raises:
        StageError: for a changed configuration, a folder that others are at work in, bookkeeping that cannot be read,
            too many rejected samples, or a file that cannot be written.
    """
    execution = execution or Execution()
    if execution.restart and execution.world > 1:
        raise StageError(
            f"--restart with {execution.world} ranks: one would throw away what another has just done.\n"
            "Start a single process with --restart, stop it once it is at work, then start all ranks without it."
        )
    with _at_work(stage) as (book, lock):
        with lock:  # ranks start together, and the slower must not clear away what the faster has begun
            book.claim(execution.restart)
        with checked(book.check_owner):
            _process(book, execution)
            with lock:  # the last ranks may come to the end together
                summary = book.finished() or _finish(book, execution)
    return {"stage": stage.name, "out": str(stage.out)} | summary


def restart(stage: Stage) -> None:
    """Throws earlier work away, without going on.

    Raises:
        StageError: while others are at work in the folder.
    """
    with _at_work(stage) as (book, lock), lock:
        book.require_alone()
        book.clear()


def describe(stage: Stage) -> dict[str, Any]:
    """Returns what :func:`run_stage` would do, without doing it."""
    book = Bookkeeping(stage)
    recorded = book.recorded()
    book.made_by = recorded[0] if recorded else digest(book.config)
    return {
        "stage": stage.name,
        "out": str(stage.out),
        "shards": len(book.shards),
        "shards_done": sum(book.marker(shard) is not None for shard in book.shards),
        "samples": count_samples(book.shards),
        "config": book.config,
    }


@contextmanager
def _at_work(stage: Stage) -> Iterator[tuple[Bookkeeping, FileLock]]:
    """The bookkeeping with its locks, and one for what ranks do one by one; errors of files become one sentence."""
    try:
        book = Bookkeeping(stage)
        with book.locks():
            yield book, FileLock(stage.work / "stage.lock")
    except OSError as cause:  # it names the file
        raise StageError(
            f"Stage {stage.name} cannot go on: {cause}.\n"
            "Whatever is finished is kept: repair the cause and run the same command again."
        ) from cause


def _process(book: Bookkeeping, execution: Execution) -> None:
    stage, unit = book.stage, book.stage.unit
    mine = [shard for shard in book.shards[execution.rank :: execution.world] if book.marker(shard) is None]
    if not mine:
        print(f"{stage.name}: nothing left to do in {stage.out}", file=sys.stderr)
        return
    (stage.work / "finished.json").unlink(missing_ok=True)
    stage.prepare(execution)
    stage.begin()
    total = count_samples(mine)
    seen, done, bad = 0, 0, 0
    failed: list[str] = []
    started = said = time.monotonic()
    with progress(stage.name, unit, total) as bar:
        for shard in mine:
            inputs = book.input_digest(shard)  # before it is read, so that what changes meanwhile is noticed
            try:
                outcome = stage.process(shard, execution, bar.update)
            except DATA_ERRORS as cause:
                failed.append(str(cause))
                continue
            book.write_marker(shard, outcome, inputs)
            seen, done, bad = seen + outcome.samples, done + 1, bad + len(outcome.rejects)
            if total is None:
                bar.total = round(seen * len(mine) / done)
            now, is_last = time.monotonic(), shard is mine[-1]
            if bar.disable and (is_last or now - said >= _LOG_EVERY):
                said, expected, rate = now, bar.total or seen, seen / max(now - started, 1e-9)
                line = f"{stage.name}: {seen} of {expected} {unit}, {rate:.1f} {unit}/s"
                if rate and not is_last:
                    line += f", {bar.format_interval((expected - seen) / rate)} left"
                print(line, file=sys.stderr)
            if seen >= 1000:
                _check_rejects(stage, bad, seen, outcome.rejects, execution)
    if failed:
        shown = "\n".join(failed[:3])
        raise StageError(
            f"Stage {stage.name}: {len(failed)} of {len(mine)} shards could not be processed; the others are done.\n"
            f"{shown}\nRepair the data and run the same command again."
        )


def _finish(book: Bookkeeping, execution: Execution) -> dict[str, Any]:
    stage, shards = book.stage, book.shards
    markers = [marker for shard in shards if (marker := book.marker(shard)) is not None]
    summary: dict[str, Any] = {"shards": len(shards)}
    if len(markers) < len(shards):
        return summary | {"finished": False, "shards_missing": len(shards) - len(markers)}
    rejects = []
    with replacing(stage.work / "rejects.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for shard, marker in zip(shards, markers, strict=True):
            rejects += marker.rejects
            for sample, reason in marker.rejects:
                file.write(printable_json({"shard": shard.name, "id": sample, "reason": reason}) + "\n")
    samples = sum(marker.samples for marker in markers)
    _check_rejects(stage, len(rejects), samples, rejects, execution)
    summary |= {"samples": samples, "kept": sum(m.kept for m in markers), "rejected": len(rejects)}
    summary |= stage.finalize(shards, execution) | {"finished": True}
    for folder in {path.parent for path in stage.artifacts(shards)} | {stage.work, stage.work / "done"}:
        remove_incomplete(folder)
    remove_incomplete(stage.out, all_hosts=False)
    book.write_finished(summary)
    return summary


def _check_rejects(
    stage: Stage, bad: int, seen: int, examples: list[tuple[str, str]], execution: Execution
) -> None:
    if seen == 0 or bad <= execution.max_bad_fraction * seen:
        return
    shown = "\n".join(f"  {sample}: {reason}" for sample, reason in examples[:5])
    raise StageError(
        f"Stage {stage.name} rejected {bad} of {seen} samples ({bad / seen:.1%}), more than "
        f"--max-bad-fraction {execution.max_bad_fraction:g} allows:\n{shown}\n"
        f"All of them, with reasons: {stage.work}/done. Repair the data, or allow more with --max-bad-fraction."
    )
