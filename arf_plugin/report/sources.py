"""Finds what there is to report: grid folders, run folders and files of result rows, brought to one form.

========================  =======================================================================================
a grid folder             ``grid.json``, ``runs/ARM-SEED/``, ``results.jsonl``, ``validation.jsonl`` (``arf ablate``)
a run folder              ``run.json`` or open_clip's ``out.log``; its name, such as ``arf-0``, says arm and seed
a file of rows            ``*.jsonl`` by ``arf evaluate --out``; the checkpoints' folders say arm and seed
========================  =======================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arf_plugin import untrusted
from arf_plugin.anchors.files import list_files
from arf_plugin.errors import EvaluationError, ReportError
from arf_plugin.report.numbers import entries, finite

_ARM_AND_SEED = re.compile(r"(?P<arm>.+?)[-_](?:seed[-_]?|s)?(?P<seed>\d+)")
_AGAIN = "Measure it again."
_ROW: dict[str, Any] = {"set": str, "headline": str, "checkpoint": str}
_OPTIONAL: dict[str, Any] = dict.fromkeys(("digest", "original_digest", "suite", "split"), (str, type(None)))
_OPTIONAL |= {"images": (int, type(None)), "alpha": (int, float, type(None))}
_UNKNOWN = dict.fromkeys(_OPTIONAL)
_LABELS = {"before": "before", "flyp": "FLYP", "arf": "ARF"}

EXPECTED = "a grid folder of `arf ablate`, a run folder (run.json or out.log) or a file of rows of `arf evaluate --out`"


@dataclass(frozen=True)
class Arm:
    """One method: its name, what it is called in tables, what it does, and its kind.

    Kinds are ``before`` (not fine-tuned), ``baseline``, ``control`` and ``arf``; empty if nobody has said.
    """

    name: str
    label: str
    what: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder: its folder.
        arm, seed: of the grid, or by the folder's name.
        info: what ``run.json`` says; empty without one.
        logs: open_clip's logs, in the order of their names.
    """

    folder: Path
    arm: str
    seed: int | None
    info: dict[str, Any]
    logs: tuple[Path, ...]

    @property
    def command(self) -> list[str]:
        """The trainer's command line; empty if it is not known."""
        found = self.info.get("command")
        return [str(word) for word in found] if isinstance(found, list) else []


@dataclass(frozen=True)
class Measurement:
    """A result row, and whose it is. `alpha` is None for the fine-tuned model itself."""

    arm: str
    seed: int | None
    alpha: float | None
    row: dict[str, Any]


@dataclass
class Collected:
    """Everything that was found.

    Attributes:
        arms: in table order.
        runs: training runs.
        test, validation: measurements.
        reference: name of the arm that the others are compared with.
        grids: contents of each ``grid.json``.
        choices: contents of each ``choices.json``: hyper-parameters and alphas that validation chose.
        comparisons: further pairs of arms that a grid wants compared.
        roots: folders below which any file that the records name may be shown: those that hold what the user has named,
            and the current one.
    """

    arms: dict[str, Arm] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    test: list[Measurement] = field(default_factory=list)
    validation: list[Measurement] = field(default_factory=list)
    reference: str | None = None
    grids: list[dict[str, Any]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[tuple[str, str]] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)

    @property
    def before(self) -> str | None:
        """The arm that is the model before fine-tuning."""
        return next((arm.name for arm in self.arms.values() if arm.kind == "before"), None)

    @property
    def subject(self) -> str | None:
        """The arm that the report is about: ARF itself, if it is there."""
        named = [arm.name for arm in self.arms.values() if arm.kind == "arf"]
        return "arf" if "arf" in self.arms else (named[0] if named else None)


def collect(sources: Sequence[Path], reference: str | None = None) -> Collected:
    """Reads all sources.

    Args:
        sources: see the module's docstring.
        reference: the arm to compare with, in place of the grid's; ``flyp`` if there is one.

    Raises:
        ReportError: for a source that is none, damaged or empty, and for two checkpoints of one arm and seed.
    """
    found = Collected(roots=[*(source.resolve().parent for source in sources), Path.cwd().resolve()])
    loose: list[tuple[Path, list[dict[str, Any]]]] = []
    for source in sources:
        if not source.exists():
            raise ReportError(f"{source} does not exist. Expected {EXPECTED}.")
        if source.is_file():
            loose.append((source.parent, _rows(source)))
        elif (source / "grid.json").is_file():
            loose += _read_grid(source, found)
        elif (source / "run.json").is_file() or _logs(source):
            found.runs.append(_read_run(source))
            other = ("validation", "arf_watch")
            loose += [
                (source, _rows(path)) for path in list_files(source, ".jsonl") if path.stem not in other
            ]
        elif (source / "results.jsonl").is_file():
            loose.append((source, _rows(source / "results.jsonl")))
        else:
            names = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
            raise ReportError(f"{source} is no run: found {names}. Expected {EXPECTED}.")
    attribution = _Attribution(found, [row for _, rows in loose for row in rows])
    for folder, rows in loose:
        for row in rows:
            measured = attribution.of(row, folder)
            if row.get("split") == "validation":  # rejected candidates among them, which are arms of no table
                found.validation.append(measured)
            else:
                _add_arm(found, measured.arm)
                found.test.append(measured)
    for run in found.runs:
        _add_arm(found, run.arm)
    _check_one_checkpoint_each(found)
    if not found.test and not found.runs:
        raise ReportError(f"{', '.join(map(str, sources))}: no rows and no runs. Expected {EXPECTED}.")
    found.reference = _reference(found, reference)
    return found


def _read_grid(folder: Path, found: Collected) -> list[tuple[Path, list[dict[str, Any]]]]:
    grid = read_json(folder / "grid.json")
    found.grids.append(grid)
    for entry in entries(grid.get("arms")):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ReportError(f"{folder / 'grid.json'}: an arm is {entry!r}, expected an object with a name.")
        name = entry["name"]
        words = (
            str(entry.get(key) or default) for key, default in (("label", name), ("what", ""), ("kind", ""))
        )
        found.arms.setdefault(name, Arm(name, *words))
    if (folder / "choices.json").is_file():
        found.choices.append(read_json(folder / "choices.json"))
    for pair in entries(grid.get("comparisons")):
        if len(entries(pair)) == 2 and all(isinstance(name, str) and name in found.arms for name in pair):
            found.comparisons.append((pair[0], pair[1]))
    if found.reference is None and isinstance(grid.get("reference"), str):
        found.reference = grid["reference"]
    runs = sorted(
        path for path in (folder / "runs").glob("*") if (path / "run.json").is_file() or _logs(path)
    )
    found.runs += [_of_no_seed(_read_run(path), found) for path in runs]
    rows = [
        (folder, _rows(path))
        for name in ("results", "validation")
        if (path := folder / f"{name}.jsonl").is_file()
    ]
    if not runs and not rows:
        raise ReportError(f"{folder} is a grid without runs and without rows yet. Run it with: arf ablate")
    return rows


def _read_run(folder: Path) -> Run:
    info = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    arm, seed = arm_and_seed(folder.resolve().name)
    arm = info["arm"] if isinstance(info.get("arm"), str) else arm
    seed = info["seed"] if type(info.get("seed")) is int else seed
    return Run(folder, arm, seed, info, _logs(folder))


def _of_no_seed(run: Run, found: Collected) -> Run:
    """The model before fine-tuning has a folder as the others have, and no seed."""
    return replace(run, seed=None) if run.arm == found.before else run


def _logs(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted([*folder.glob("out.log"), *folder.glob("*/out.log"), *folder.glob("*/*/out.log")]))


def _rows(path: Path) -> list[dict[str, Any]]:
    from arf_plugin.evaluation.records import read_records

    try:
        rows = read_records(path, whole=False)  # what a report needs of them is checked below
    except EvaluationError as cause:
        raise ReportError(str(cause)) from cause
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        untrusted.require_fields(row, _ROW, where, ReportError, _AGAIN)
        untrusted.require_fields({**_UNKNOWN, **row}, _OPTIONAL, where, ReportError, _AGAIN)
        metrics = row["metrics"]
        if not isinstance(metrics, dict) or finite(metrics.get(row["headline"])) is None:
            raise ReportError(f"{where}: metrics has no number {row['headline']!r}. {_AGAIN}")
        if row.get("alpha") is not None and finite(row["alpha"]) is None:
            raise ReportError(f"{where}: 'alpha' is not finite. {_AGAIN}")
        if "\0" in row["checkpoint"]:
            raise ReportError(f"{where}: 'checkpoint' is {row['checkpoint']!r}, expected a path. {_AGAIN}")
        row["metrics"] = {name: value for name, value in metrics.items() if finite(value) is not None}
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ReportError: if it is none.
    """
    found: dict[str, Any] = untrusted.read_json(
        path, ReportError, advice="Make it again, or leave the folder out."
    )
    return found


def arm_and_seed(name: str) -> tuple[str, int | None]:
    """Splits the name of a run.

    >>> arm_and_seed("caption-only-2"), arm_and_seed("arf_seed1"), arm_and_seed("clip")
    (('caption-only', 2), ('arf', 1), ('clip', None))
    """
    match = _ARM_AND_SEED.fullmatch(name)
    return (match["arm"], int(match["seed"])) if match else (name, None)


class _Attribution:
    """Says whose a row is: by its run's folder, as the original of mixtures, else by the checkpoint's folder."""

    def __init__(self, found: Collected, rows: list[dict[str, Any]]) -> None:
        self.found = found
        self.runs = {run.folder.resolve(): run for run in found.runs}
        self.named = {run.folder.resolve().name: run for run in found.runs}
        self.originals = {row.get("original_digest") for row in rows} - {None}

    def of(self, row: dict[str, Any], folder: Path) -> Measurement:
        alpha = row.get("alpha")
        alpha = finite(alpha)
        path = Path(str(row["checkpoint"]))
        run = self._run(path, folder)
        if run is not None:
            arm, seed = run.arm, run.seed
        elif alpha is None and row.get("digest") in self.originals:
            arm, seed = self.found.before or "before", None  # what others were mixed with
        else:
            arm, seed = arm_and_seed(_run_name(path))
            if self.found.grids and self.found.before and arm not in self.found.arms and alpha is None:
                arm, seed = self.found.before, None  # in a grid, everything else lies below its runs
        return Measurement(arm, seed, alpha, row)

    def _run(self, path: Path, folder: Path) -> Run | None:
        for place in (folder / path, path):
            for parent in place.resolve().parents:
                if parent in self.runs:
                    return self.runs[parent]
        return self.named.get(_run_name(path))


def _run_name(checkpoint: Path) -> str:
    """The folder that a checkpoint's run is named after; the file's own name if it lies in none."""
    folders = [part for part in checkpoint.parts[:-1] if part not in ("checkpoints", ".", "..", "/")]
    return folders[-1] if folders else checkpoint.stem


def _add_arm(found: Collected, name: str) -> None:
    if name not in found.arms:
        kind = {"before": "before", "flyp": "baseline", "arf": "arf"}.get(name, "")
        found.arms[name] = Arm(name, _LABELS.get(name, name), "", kind)
        if kind == "before":  # heads the table
            found.arms = {name: found.arms.pop(name), **found.arms}


def _check_one_checkpoint_each(found: Collected) -> None:
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for measured in found.test:
        row = measured.row
        other = seen.setdefault((measured.arm, measured.seed, measured.alpha, row["set"]), row)
        if other.get("digest") != row.get("digest"):
            raise ReportError(
                f"{measured.arm}, seed {measured.seed}: two checkpoints were measured on '{row['set']}': "
                f"{other['checkpoint']} and {row['checkpoint']}. A report takes one checkpoint per arm and seed; leave "
                "the rows of one out, or give the runs' folders names of their own (ARM-SEED)."
            )


def _reference(found: Collected, wanted: str | None) -> str | None:
    if wanted is not None and wanted not in found.arms:
        raise ReportError(f"There is no arm '{wanted}' to compare with (found: {', '.join(found.arms)}).")
    if wanted is not None:
        return wanted
    if found.reference in found.arms:
        return found.reference
    return "flyp" if "flyp" in found.arms else None
