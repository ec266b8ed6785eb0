"""Result rows: one JSON object per line, one line per checkpoint (or mixture) and set, in percent.

::

    {"format": 1, "suite": "emojinet", "set": "shift/twemoji", "split": "test",
     "checkpoint": "runs/arf-0/weights.pt", "digest": SHA-256 of the file,
     "original": null, "original_digest": null, "alpha": null,          set for WiSE-FT mixtures alone
     "model": "ViT-B-16", "pretrained": null, "preprocess": null or the flags that change model and preprocessing,
     "images": 871, "expected_images": null, "classes": 21,
     "metrics": {"top1": 43.2, "top5": 70.1, "mean_per_class": 40.0, "macro_f1": 39.1, "ece": 3.2},
     "headline": "top1", "prompts": SHA-256 of class names and templates, "data": SHA-256 of what was read,
     "device": "cpu", "precision": "fp32", "batch_size": 256, "classifier": "zero-shot" or "head",
     "versions": {...}, "time": "2025-01-31T12:00:00+00:00"}

Averages are not stored; they follow from the suite's definition when rows are read.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from arf_plugin.errors import EvaluationError
from arf_plugin.untrusted import parse_json, printable, require_fields, require_regular, utf8

FORMAT = 1
Row = dict[str, Any]

# What makes two rows measurements of the same thing. The path of a checkpoint and the batch size do not.
IDENTITY = (
    *("digest", "original_digest", "alpha", "model", "set", "split"),
    *("prompts", "data", "precision", "preprocess"),
)
_NAMES = ("checkpoint", "original", "suite", "headline")  # how a measurement is listed
_NEEDED = ("set", "checkpoint", "metrics", "headline")
_TEXT = (str, type(None))
_COUNT = (int, type(None))
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **{"alpha": (int, float, type(None)), "images": int, "classes": int, "expected_images": _COUNT},
    **{"epoch": int, "step": int, "start": (int, float), "batch_size": int},
}
_LARGEST = 1e15


def identity(row: Row) -> tuple[Any, ...]:
    """What a row measures: equal for rows of the same weights on the same images with the same prompts."""
    return tuple(_comparable(row.get(name)) for name in IDENTITY)


def _comparable(value: Any) -> Any:
    return utf8(value) if isinstance(value, str) else value


def _without_data(row: Row) -> tuple[Any, ...]:
    return tuple(_comparable(row.get(name)) for name in IDENTITY if name != "data")


def read_rows(path: Path, *, whole: bool = True) -> list[Row]:
    """Reads rows in the file's order.

    A last line that a killed process left unfinished is passed over.

    Args:
        path: the file.
        whole: checks the figures, too; without it, only that the lines are rows.

    Raises:
        EvaluationError: if the file is missing, or a line is no row.
    """
    require_regular(path, EvaluationError)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as cause:
        raise EvaluationError(
            f"{path} cannot be read: {cause}. Expected rows that arf evaluate --out wrote."
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line, where, EvaluationError, object, advice="Remove the line.")
        except EvaluationError:
            if number == len(lines):  # no newline behind it
                warnings.warn(f"{path}: the last line is unfinished; it is measured again.", stacklevel=2)
                continue
            raise
        _check(row, where, whole)
        rows.append(row)
    return rows


def _check(row: Any, where: str, whole: bool) -> None:
    """Refuses what is no row, so that whoever reads one can rely on its fields.

    Raises:
        EvaluationError: naming the field.
    """
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        found = printable(repr(row.get("format") if isinstance(row, dict) else row))[:80]
        raise EvaluationError(f"{where}: format is {found}, expected a row of format {FORMAT}.")
    missing = [name for name in _NEEDED if name not in row]
    if missing:
        raise EvaluationError(
            f"{where}: {', '.join(missing)} missing (found: {printable(', '.join(row))[:200]})."
        )
    if not whole:
        return
    fields: dict[str, type | tuple[type, ...]] = dict.fromkeys((*_NEEDED, *IDENTITY, *_NAMES, "time"), _TEXT)
    fields |= {**_FIELDS, "set": str, "checkpoint": str, "headline": str, "metrics": dict}
    require_fields(row, {name: fields[name] for name in fields if name in row}, where, EvaluationError)
    metrics = row["metrics"]
    require_fields(metrics, dict.fromkeys(metrics, (int, float)), f"{where}, metrics", EvaluationError)
    if row["headline"] not in metrics:
        raise EvaluationError(
            f"{where}: 'headline' is {printable(row['headline'])!r}, expected one of the metrics ("
            f"{printable(', '.join(metrics))[:200]})."
        )
    undefined = {name for name, value in metrics.items() if value != value and name != row["headline"]}
    figures = {
        name: value for name, value in metrics.items() if name not in undefined
    }  # of weights that are NaN
    figures |= {name: row[name] for name in _FIELDS if row.get(name) is not None}
    for name, value in figures.items():
        if not -_LARGEST < value < _LARGEST:
            raise EvaluationError(f"{where}: '{printable(name)}' is {str(value)[:40]}, expected a figure.")


def append_row(path: Path, row: Row) -> None:
    """Appends a row and writes it through to the disk; an unfinished last line is cut off first.

    Raises:
        EvaluationError: the file cannot be written.
    """
    require_regular(path, EvaluationError)
    text = json.dumps(_as_text(row), ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _finish(file)
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        raise EvaluationError(f"The row cannot be written to {path}: {cause.strerror or cause}.") from cause


def _as_text(row: Row) -> Row:
    """The row with names that can be written: those of files may hold bytes that are no UTF-8."""
    return {name: utf8(value) if isinstance(value, str) else value for name, value in row.items()}


def _finish(file: Any) -> None:
    """Cuts an unfinished last line off, or ends one that only lacks its newline."""
    end = keep = file.seek(0, os.SEEK_END)
    while keep:
        start = max(0, keep - 65536)
        file.seek(start)
        newline = file.read(keep - start).rfind(b"\n")
        if newline >= 0:
            keep = start + newline + 1
            break
        keep = start
    if keep < end:
        file.seek(keep)
        try:
            parse_json(file.read(), "the last line", EvaluationError)
        except EvaluationError:
            file.truncate(keep)
        else:
            file.write(b"\n")


class Results:
    """Rows measured so far, and the file that new ones are appended to.

    Args:
        path: the file, or None.
        known: rows that are there already.
        writes: whether this process writes the file.
    """

    def __init__(self, path: Path | None, known: Collection[Row] = (), writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._rows = {identity(row): row for row in known}
        self._listed = {_listing(row) for row in known}
        self._other_data = {_without_data(row) for row in known}
        self._said = False

    @staticmethod
    def read(path: Path | None) -> list[Row]:
        """Rows of a file that may not be there yet."""
        return read_rows(path) if path is not None and path.exists() else []

    def has(self, wanted: Row) -> bool:
        """Whether what a row is to hold has been measured, be it of a copy of the checkpoint."""
        if identity(wanted) in self._rows:
            return True
        if not self._said and _without_data(wanted) in self._other_data:
            self._said = True
            warnings.warn(
                f"{printable(str(self.path or 'the rows'))}: what is there of '{printable(str(wanted['set']))}' was "
                "measured on other images, or by a version that told images apart by name and size; it is measured "
                "again.",
                stacklevel=2,
            )
        return False

    def add(self, row: Row) -> None:
        """Takes a row and appends it to the file."""
        self._rows[identity(row)] = row
        self._listed.add(_listing(row))
        if self.path is not None and self.writes:
            append_row(self.path, row)

    def take(self, wanted: Row) -> Row:
        """The finished row; one of a copy of the checkpoint is listed under the name that is wanted, too."""
        row = {**wanted, **self._rows[identity(wanted)], **{name: wanted[name] for name in _NAMES}}
        if _listing(row) not in self._listed:
            self._listed.add(_listing(row))
            if self.path is not None and self.writes:
                append_row(self.path, row)
        return row


def _listing(row: Row) -> tuple[Any, ...]:
    return (*identity(row), *(_comparable(row.get(name)) for name in _NAMES))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows whose fields equal those named: ``select(rows, set="id", alpha=None)``."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def by_set(rows: Iterable[Row], metric: str | None = None) -> dict[str, float]:
    """Figures of one checkpoint by set: the headline of each row, or a named metric. Later rows win.

    Raises:
        EvaluationError: if the rows are of several checkpoints or alphas, or lack the metric.
    """
    figures: dict[str, float] = {}
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        seen.add((row["checkpoint"], row.get("alpha")))
        name = metric or row["headline"]
        if name not in row["metrics"]:
            raise EvaluationError(
                f"The row of {row['checkpoint']} on '{row['set']}' has no metric {name!r} "
                f"(found: {', '.join(row['metrics'])})."
            )
        figures[row["set"]] = row["metrics"][name]
    if len(seen) > 1:
        raise EvaluationError(
            f"Rows of several checkpoints were taken for one: {sorted(map(str, seen))[:3]}."
        )
    return figures
