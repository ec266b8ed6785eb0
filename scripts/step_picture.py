"""Draws docs/figures/step.svg: one training step, from files on disk to the loss, with the code of every hop.

``python scripts/tables.py`` writes it, and ``--check`` notices when it is out of date; a test looks whether the code
that it names is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape


class Hop(NamedTuple):
    """One box.

    Attributes:
        what: What happens.
        code: Where: ``path below arf_plugin:name``, or a name of open_clip's, which has no colon.
    """

    what: str
    code: str


# Three kinds of data on their way to one batch; the captions join the task samples.
CAPTIONS = (
    Hop("ANCHORS/captions/*.parquet", ""),
    Hop("sorted once, memory-mapped", "data/captions.py:CaptionStore"),
    Hop("looked up by sample id", "data/texts.py:TaskTexts"),
)
TASK = (
    Hop("task/*.tar", ""),
    Hop("shards dealt out, samples shuffled", "data/task.py:task_loader"),
    Hop("decode, crop; prompt and caption", "data/task.py:TaskSamples"),
    Hop("stack, tokenize: one batch", "data/batch.py:collate"),
)
PAIRS = (
    Hop("ANCHORS/pairs/*.tar", ""),
    Hop("each pair once per pass, shuffled", "data/pairs.py:PairSamples"),
    Hop("batch of A pairs", "data/pairs.py:pair_loader"),
)
SHARED = (
    Hop("one batch of both: image, text, caption, pair image, pair text", "data/loader.py:TrainingLoader"),
    Hop("texts cut to the longest; concatenated on the device", "data/batch.py:DeviceConcat"),
    Hop("one forward pass of each tower: [x; x_a] and [t_cls; t_cap; t_a]", "open_clip.CLIP.forward"),
    Hop("features split by known sizes; open_clip's loss three times", "losses/anchored.py:AnchoredLoss"),
    Hop("sum of the terms, backward, optimizer step", "open_clip_train.train.train_one_epoch"),
)

WIDTH, BOX, HEIGHT, GAP, MARGIN = 880, 268, 54, 26, 16
COLOURS = {"captions": "#fdf0d5", "task": "#e3eef2", "pairs": "#e6f2e6", "shared": "#f1f1f4"}
PITCH = (WIDTH - 2 * MARGIN - BOX) // 2


def hops() -> list[Hop]:
    """All boxes."""
    return [*CAPTIONS, *TASK, *PAIRS, *SHARED]


def svg() -> str:
    """The picture."""
    left, middle, right = MARGIN, MARGIN + PITCH, MARGIN + 2 * PITCH
    joint = len(TASK)  # the shared boxes begin below the longest lane
    height = 2 * MARGIN + (joint + len(SHARED)) * (HEIGHT + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="Roboto, Open Sans, DejaVu Sans, sans-serif">',
        "<title>One training step, from disk to loss</title>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#444"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for x, lane, name in ((left, CAPTIONS, "captions"), (middle, TASK, "task"), (right, PAIRS, "pairs")):
        parts += _lane(x, 0, lane, COLOURS[name], BOX)
    look_up = _y(len(CAPTIONS) - 1) + HEIGHT // 2
    parts.append(_arrow(left + BOX, look_up, middle, look_up))
    wide = WIDTH - 2 * MARGIN
    parts += _lane(MARGIN, joint, SHARED, COLOURS["shared"], wide)
    for x in (middle, right):
        parts.append(_arrow(x + BOX // 2, _y(joint - 1) + HEIGHT, x + BOX // 2, _y(joint)))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _y(row: int) -> int:
    return MARGIN + row * (HEIGHT + GAP)


def _lane(x: int, first: int, lane: Sequence[Hop], colour: str, width: int) -> list[str]:
    parts = []
    for number, hop in enumerate(lane, first):
        top = _y(number)
        parts.append(
            f'<rect x="{x}" y="{top}" width="{width}" height="{HEIGHT}" rx="6" fill="{colour}" stroke="#777"/>'
        )
        lines = [(hop.what, 14, "#111"), *([(hop.code, 11, "#1f5f7a")] if hop.code else [])]
        for line, (text, size, ink) in enumerate(lines):
            y = top + (HEIGHT // 2 + 5 if len(lines) == 1 else 23 + 20 * line)
            font = ' font-family="monospace"' if line else ""
            parts.append(
                f'<text x="{x + width // 2}" y="{y}" font-size="{size}" fill="{ink}" text-anchor="middle"{font}>'
                f"{escape(text)}</text>"
            )
        if number > first:
            parts.append(_arrow(x + width // 2, top - GAP, x + width // 2, top))
    return parts


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#444" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )
