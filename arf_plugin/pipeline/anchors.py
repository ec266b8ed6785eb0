"""All stages in order: task data and a pool in, an anchor set out.

::

    task data --caption--> ANCHORS/captions
    task data --embed----> WORK/task --+
    pool      --embed----> WORK/pool --+--retrieve--> WORK/retrieve --pack--> ANCHORS/pairs
    ANCHORS/captions and pairs --features--> ANCHORS/features

The pool may also be searched by the captions, or by class prompts; these are embedded in the task images' place. Either
kind may be left out: without a captioner there are no captions, without a pool no pairs. Features are those of the
model that the pool is searched with. They are computed again, from what is in the set, which costs what embedding as
many images of the pool does.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from arf_plugin.errors import StageError
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.runner import run_stage
from arf_plugin.pipeline.stage import Stage

_WAIT = 3600  # seconds without any progress of the other ranks


def build_anchors(
    stages: Iterable[Stage], execution: Execution, caption_batch_size: int, restart: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Runs all stages; each waits until the other ranks have finished the one before.

    Args:
        stages: in order; each is asked for when the one before is finished.
        execution: how; its ``restart`` is set per stage.
        caption_batch_size: images per batch of the captioner; that of embedding is the execution's.
        restart: names of the stages whose earlier work is thrown away.

    Returns:
        The stages' summaries.
    """
    summaries = []
    for stage in stages:
        batch_size = caption_batch_size if stage.name == "caption" else execution.batch_size
        mine = replace(execution, restart=stage.name in restart, batch_size=batch_size)
        summary = run_stage(stage, mine)
        if not summary["finished"]:
            _wait(stage, summary["shards"])
            summary = run_stage(stage, replace(mine, rank=0, world=1, restart=False))  # finds the summary
        summaries.append(summary)
    return summaries


def _wait(stage: Stage, shards: int) -> None:
    """Waits for other ranks; gives up when nothing has happened for an hour."""
    last, since = -1, time.monotonic()
    while not (stage.work / "finished.json").exists():
        count = sum(1 for _ in (stage.work / "done").glob("*.json"))
        if count != last:
            last, since = count, time.monotonic()
        if time.monotonic() - since > _WAIT:
            raise StageError(
                f"Waited an hour for the other ranks to finish stage {stage.name}: {count} of {shards} "
                "shards are done. Have they all been started? Start this command again to go on."
            )
        time.sleep(1)
