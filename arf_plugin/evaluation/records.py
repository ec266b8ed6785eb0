"""Records of results: one JSON object a line, one line per checkpoint (or mixture) and set, scores in percent.

::

    {"format": 1, "suite": "emojinet", "set": "shift/twemoji", "split": "test",
     "checkpoint": "runs/arf-0/weights.pt", "digest": SHA-256 of the file,
     "original": null, "original_digest": null, "alpha": null,          set for WiSE-FT mixtures alone
     "merge": "stock", "runs": [SHA-256 of each file],      of merges alone; their digest is over the method and these
     "model": "ViT-B-16", "pretrained": null, "preprocess": null or the flags that change model and preprocessing,
     "images": 871, "expected_images": null, "classes": 21,
     "metrics": {"top1": 43.2, "top5": 70.1, "mean_per_class": 40.0, "macro_f1": 39.1, "ece": 3.2},
     "headline": "top1", "right": a bit per image, see :func:`packed`,
     "prompts": SHA-256 of class names and templates, "data": SHA-256 of what was read,
     "device": "cpu", "precision": "fp32", "batch_size": 256, "classifier": "zero-shot" or "head",
     "versions": {...}, "time": "2025-01-31T12:00:00+00:00"}

``right`` says of every image whether it was right at the first guess, so that arms can be compared by image
(:mod:`arf_plugin.evaluation.verdicts`); ``data`` says which images they are, in order. Records of earlier versions are
without. Averages are not stored; they follow from the suite's definition when records are read.
"""

from __future__ import annotations

import base64
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import EvaluationError
from arf_plugin.untrusted import parse_json, printable, require_fields, require_regular, utf8

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 1
EvalRecord = dict[str, Any]

# What makes two records measurements of the same thing. The path of a checkpoint and the batch size do not.
IDENTITY = (
    *("digest", "original_digest", "alpha", "model", "set", "split"),
    *("prompts", "data", "precision", "preprocess"),
)
_NAMES = ("checkpoint", "original", "suite", "headline")  # how a measurement is listed
_LISTING = (*IDENTITY, *_NAMES)
_WITHOUT_DATA = tuple(name for name in IDENTITY if name != "data")
_NEEDED = ("set", "checkpoint", "metrics", "headline")
_NUMBERS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("images", "classes", "epoch", "step", "batch_size"), int),
    **{"alpha": (int, float, type(None)), "expected_images": (int, type(None)), "start": (int, float)},
}
_FIELDS = {
    **dict.fromkeys((*IDENTITY, *_NAMES, "time", "right"), (str, type(None))),
    **dict.fromkeys(("set", "checkpoint", "headline"), str),
    **_NUMBERS,
    "metrics": dict,
}
_LARGEST = 1e15
_ARM_AND_SEED = re.compile(r"(?P<arm>.+?)[-_](?:seed[-_]?|s)?(?P<seed>\d+)")


def identity(record: EvalRecord) -> tuple[Any, ...]:
    """What a record measures: equal for those of the same weights on the same images with the same prompts."""
    return _values(record, IDENTITY)


def _values(record: EvalRecord, names: Iterable[str]) -> tuple[Any, ...]:
    values = (record.get(name) for name in names)
    return tuple(utf8(value) if isinstance(value, str) else value for value in values)


def read_records(path: Path, *, whole: bool = True) -> list[EvalRecord]:
    """Reads records in the file's order. A last line that a killed process left unfinished is passed over.

    Args:
        path: the file.
        whole: checks the scores, too; without it, only that the lines are records.

    Raises:
        EvaluationError: if the file is missing, or a line is no record.
    """
    require_regular(path, EvaluationError)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as cause:
        raise EvaluationError(
            f"{path} cannot be read: {cause}. Expected records that arf evaluate --out wrote."
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, where, EvaluationError, object, advice="Remove the line.")
        except EvaluationError:
            if number == len(lines):  # no newline behind it
                warnings.warn(f"{path}: the last line is unfinished; it is measured again.", stacklevel=2)
                continue
            raise
        _check(record, where, whole)
        records.append(record)
    return records


def _check(record: Any, where: str, whole: bool) -> None:
    """Refuses what is no record, so that whoever reads one can rely on its fields."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = printable(repr(record.get("format") if isinstance(record, dict) else record))[:80]
        raise EvaluationError(f"{where}: format is {found}, expected a record of format {FORMAT}.")
    if missing := [name for name in _NEEDED if name not in record]:
        raise EvaluationError(
            f"{where}: {', '.join(missing)} missing (found: {printable(', '.join(record))[:200]})."
        )
    if not whole:
        return
    require_fields(
        record, {name: kind for name, kind in _FIELDS.items() if name in record}, where, EvaluationError
    )
    metrics, headline = record["metrics"], record["headline"]
    require_fields(metrics, dict.fromkeys(metrics, (int, float)), f"{where}, metrics", EvaluationError)
    if headline not in metrics:
        raise EvaluationError(
            f"{where}: 'headline' is {printable(headline)!r}, expected one of the metrics ("
            f"{printable(', '.join(metrics))[:200]})."
        )
    # A calibration error, say, is NaN where weights are.
    scores = {name: value for name, value in metrics.items() if value == value or name == headline}
    scores |= {name: record[name] for name in _NUMBERS if record.get(name) is not None}
    for name, value in scores.items():
        if not -_LARGEST < value < _LARGEST:
            raise EvaluationError(
                f"{where}: '{printable(name)}' is {str(value)[:40]}, expected a finite number."
            )
    if record.get("right") is not None:
        right_images(record, where)


def packed(right: NDArray[np.bool_]) -> str:
    """Bits of images [N], right or wrong, for a record: eight to a byte, the first one highest, in base64."""
    import numpy as np

    return base64.b64encode(np.packbits(right).tobytes()).decode()


def right_images(record: EvalRecord, where: str | None = None) -> NDArray[np.bool_]:
    """Which images of a record with the field ``right`` were right, [N] in the set's order.

    Raises:
        EvaluationError: the field is not of that record, which messages call `where`: no base64, of another length, or
            of another accuracy.
    """
    import numpy as np

    where = where or f"The record of {printable(record['checkpoint'])} on '{printable(record['set'])}'"
    images, top1 = record.get("images"), record["metrics"].get("top1")
    if not isinstance(images, int) or images < 1 or top1 is None or not record.get("data"):
        raise EvaluationError(
            f"{where}: 'right' says which images were right, so 'images', 'data' and the metric 'top1' are expected, "
            "too. Measure it again."
        )
    try:
        content = base64.b64decode(record["right"], validate=True)
    except (ValueError, TypeError):
        raise EvaluationError(
            f"{where}: 'right' is {printable(str(record['right']))[:40]!r}, expected base64. Measure it again."
        ) from None
    if len(content) != (images + 7) // 8:
        raise EvaluationError(
            f"{where}: 'right' has {len(content)} bytes, expected {(images + 7) // 8} for {images} images. Measure it "
            "again."
        )
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8)).astype(bool)
    count = int(bits.sum())
    if bits[images:].any() or not abs(count - top1 * images / 100) < 0.5:
        raise EvaluationError(
            f"{where}: 'right' has {count} right images of {images}, but top1 is {top1:.4f}, expected "
            f"{100 * count / images:.4f}. They are of different records. Measure it again."
        )
    return bits[:images]


def append_record(path: Path, record: EvalRecord) -> None:
    """Appends a record and writes it through to the disk; an unfinished last line is cut off first."""
    require_regular(path, EvaluationError)
    # Names of files may hold bytes that are no UTF-8.
    writable = {name: utf8(value) if isinstance(value, str) else value for name, value in record.items()}
    text = json.dumps(writable, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _finish(file)
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        raise EvaluationError(
            f"The record cannot be written to {path}: {cause.strerror or cause}."
        ) from cause


def _finish(file: Any) -> None:
    """Cuts an unfinished last line off, or ends one that only lacks its newline."""
    end = start = file.seek(0, os.SEEK_END)
    last, size = b"", 1 << 16
    while start and b"\n" not in last:
        start, size = max(0, end - size), 2 * size
        file.seek(start)
        last = file.read(end - start)
    last = last.rpartition(b"\n")[2]
    if last:
        try:
            parse_json(last, "the last line", EvaluationError)
        except EvaluationError:
            file.truncate(end - len(last))
        else:
            file.write(b"\n")


class Results:
    """Records that are `known`, and the file, if any, that new ones are appended to if this process `writes`."""

    def __init__(self, path: Path | None, known: Collection[EvalRecord] = (), writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._records = {identity(record): record for record in known}
        self._listed = {_values(record, _LISTING) for record in known}
        self._other_data = {_values(record, _WITHOUT_DATA) for record in known}
        self._said = False

    @staticmethod
    def read(path: Path | None) -> list[EvalRecord]:
        """Records of a file that may not be there yet."""
        return read_records(path) if path is not None and path.exists() else []

    def has(self, wanted: EvalRecord) -> bool:
        """Whether what a record is to hold has been measured, be it of a copy of the checkpoint."""
        if identity(wanted) in self._records:
            return True
        if not self._said and _values(wanted, _WITHOUT_DATA) in self._other_data:
            self._said = True
            warnings.warn(
                f"{printable(str(self.path or 'the records'))}: what is there of '{printable(str(wanted['set']))}' was "
                "measured on other images, or by a version that told images apart by name and size; it is measured "
                "again.",
                stacklevel=2,
            )
        return False

    def add(self, record: EvalRecord) -> None:
        """Takes a record and appends it to the file."""
        self._records[identity(record)] = record
        self._list(record)

    def take(self, wanted: EvalRecord) -> EvalRecord:
        """The finished record; one of a copy of the checkpoint is listed under the name that is wanted, too."""
        record = {**wanted, **self._records[identity(wanted)], **{name: wanted[name] for name in _NAMES}}
        if _values(record, _LISTING) not in self._listed:
            self._list(record)
        return record

    def _list(self, record: EvalRecord) -> None:
        self._listed.add(_values(record, _LISTING))
        if self.path is not None and self.writes:
            append_record(self.path, record)


def arm_and_seed(name: str) -> tuple[str, int | None]:
    """Splits the name of a run.

    >>> arm_and_seed("caption-only-2"), arm_and_seed("arf_seed1"), arm_and_seed("clip")
    (('caption-only', 2), ('arf', 1), ('clip', None))
    """
    match = _ARM_AND_SEED.fullmatch(name)
    return (match["arm"], int(match["seed"])) if match else (name, None)


def run_name(checkpoint: str) -> str:
    """The folder that a checkpoint's run is named after, or the file's own name if it lies in none.

    >>> run_name("logs/arf-0/checkpoints/epoch_10.pt"), run_name("./flyp-1.pt")
    ('arf-0', 'flyp-1')
    """
    path = Path(checkpoint)
    parts = [part for part in path.parts[:-1] if part not in ("checkpoints", ".", "..", "/")]
    return parts[-1] if parts else path.stem


def by_set(records: Iterable[EvalRecord], metric: str | None = None) -> dict[str, float]:
    """Scores of one checkpoint by set: the headline of each record, or a named metric. Later records win.

    Raises:
        EvaluationError: if the records are of several checkpoints or alphas, or lack the metric.
    """
    scores: dict[str, float] = {}
    seen: set[tuple[Any, ...]] = set()
    for record in records:
        seen.add((record["checkpoint"], record.get("alpha")))
        name = metric or record["headline"]
        if name not in record["metrics"]:
            found = ", ".join(record["metrics"])
            raise EvaluationError(
                f"The record of {record['checkpoint']} on '{record['set']}' has no metric {name!r} (found: {found})."
            )
        scores[record["set"]] = record["metrics"][name]
    if len(seen) > 1:
        raise EvaluationError(
            f"Records of several checkpoints were taken for one: {sorted(map(str, seen))[:3]}."
        )
    return scores
