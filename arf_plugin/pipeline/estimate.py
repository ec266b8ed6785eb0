"""What a stage will take, before it is run: measured on the first samples, in a folder that is thrown away."""

from __future__ import annotations

import copy
import resource
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from arf_plugin.errors import ArfError
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.stage import Stage, count_samples

SECONDS = 5.0  # of a trial, beside what loading takes


class _Enough(Exception):
    """A trial has seen enough."""


def estimate(stage: Stage, execution: Execution) -> dict[str, Any]:
    """Tries a stage for some seconds.

    Returns:
        ``seconds`` that all samples take one process such as this, ``memory`` in bytes that it needs, ``disk`` in bytes
        that the artifacts take, as far as they can be told; or ``estimate``, why they cannot.
    """
    shards = stage.plan()
    if not shards:
        return {}
    if missing := stage.fetches():
        return {"estimate": f"none: {missing}"}
    trial = copy.copy(stage)
    with tempfile.TemporaryDirectory() as folder:
        trial.out, trial.work_folder = Path(folder), Path(folder, "work")
        trial.work_folder.mkdir()
        seen, began = 0.0, 0.0

        def advance(count: float) -> None:
            nonlocal seen, began
            began, seen = began or time.monotonic(), seen + count
            if time.monotonic() - began >= SECONDS:
                raise _Enough

        try:
            with suppress(_Enough):
                trial.attempt(shards[0], execution, advance)
            taken, disk = time.monotonic() - began, trial.disk(shards)
        except ArfError as cause:
            return {"estimate": f"none: {cause}"}
    total = count_samples(shards)
    # Kilobytes, but for macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found: dict[str, Any] = {"seconds": taken * total / seen} if seen and total else {}
    return found | {"memory": peak} | ({"disk": disk} if disk is not None else {})


def readable(plan: dict[str, Any]) -> dict[str, Any]:
    """The same with times and sizes as people read them."""
    from tqdm import tqdm

    shown = dict(plan)
    if "seconds" in plan:
        shown["seconds"] = tqdm.format_interval(plan["seconds"])
    for name in plan.keys() & {"memory", "disk"}:
        shown[name] = tqdm.format_sizeof(plan[name], "B", 1024)
    return shown
