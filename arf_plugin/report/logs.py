"""Reads training curves from the log that open_clip's trainer writes (``out.log``).

Each step that is logged is one line (open_clip_train/train.py, ``train_one_epoch``)::

    ... | INFO | Train Epoch: 3 [ 256/830 (31%)] Data (t): ... LR: 0.000500 Logit Scale: 15.9 Contrastive_loss: 0.81689
    (1.0698) Caption_anchor_loss: 2.1 (2.2) Pair_anchor_loss: 1.9 (2.0) Loss: 4.8 (5.2)

One number per term of the loss, weighted as it enters the sum, and ``Loss``, which is the sum.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arf_plugin.errors import ReportError
from arf_plugin.untrusted import require_regular

_STEP = re.compile(r"Train Epoch: (\d{1,15}) \[\s*(\d{1,15})/(\d{1,15}) .*? Logit Scale: \S+ (.*)$")
_TERM = re.compile(r"([A-Za-z]\w*): (\S+) \(\S+\)")

NAMES = {
    "contrastive_loss": "task: image and class prompt",
    "caption_anchor_loss": "caption anchors: image and caption",
    "pair_anchor_loss": "pair anchors: retrieved pairs",
    "loss": "sum of all terms",
}


@dataclass
class Curves:
    """Training curves of one run.

    Attributes:
        terms: term (such as ``contrastive_loss``) -> (epochs since the start, value) in order.
        faults: epochs at which the sum was not a finite number.
    """

    terms: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    faults: list[float] = field(default_factory=list)


def read_curves(path: Path) -> Curves:
    """Reads the curves of one log.

    A run that was stopped and resumed logs some steps twice; the later line counts.

    Raises:
        ReportError: if the log cannot be read.
    """
    require_regular(path, ReportError)
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return parse_curves(lines)
    except OSError as cause:
        raise ReportError(
            f"{path} cannot be read: {cause.strerror or cause}. Expected open_clip's log."
        ) from cause


def parse_curves(lines: Iterable[str]) -> Curves:
    """Reads the curves from a log's lines; lines of other kinds are passed over."""
    steps: dict[tuple[int, int, int], dict[str, float]] = {}
    for line in lines:
        if (match := _STEP.search(line)) is not None:
            place = (int(match[1]), int(match[2]), int(match[3]))
            steps[place] = {}
            for name, text in _TERM.findall(match[4]):
                with contextlib.suppress(ValueError):
                    steps[place][name.lower()] = float(text)
    curves = Curves()
    for (epoch, seen, size), values in sorted(steps.items()):
        at = epoch + (seen / size if size else 0.0)
        for name, value in values.items():
            if math.isfinite(value):
                curves.terms.setdefault(name, []).append((at, value))
        if not math.isfinite(values.get("loss", 0.0)):
            curves.faults.append(at)
    return curves


def watched_scores(records: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """What ``--arf-watch`` has seen, as a term for each set: (finished epochs, headline in percent)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        point = float(record["epoch"]), float(record["metrics"][record["headline"]])
        found.setdefault(f"accuracy on {record['set']}, %", []).append(point)
    return found


def term_name(term: str) -> str:
    """What a term is called in plots."""
    return NAMES.get(term) or term.removesuffix("_loss").replace("_", " ")
