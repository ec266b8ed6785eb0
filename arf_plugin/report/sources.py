"""Finds what there is to report: grid folders, run folders and files of records, brought to one form.

========================  =======================================================================================
a grid folder             ``grid.json``, ``runs/ARM-SEED/``, ``*.jsonl`` (``arf ablate``, ``arf fit``)
a run folder              ``run.json`` or open_clip's ``out.log``; its name, such as ``arf-0``, says arm and seed;
                          ``params.txt`` has its flags, ``arf_watch.jsonl`` what ``--arf-watch`` has seen
a file of records         ``*.jsonl`` by ``arf evaluate --out``; the checkpoints' folders say arm and seed
========================  =======================================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from arf_plugin import untrusted
from arf_plugin.errors import EvaluationError, ReportError
from arf_plugin.evaluation.records import arm_and_seed, run_name
from arf_plugin.files import list_files
from arf_plugin.untrusted import split_lines
from arf_plugin.validation import validated

_KNOWN_ARMS = {
    "before": ("before", "before"),
    "flyp": ("FLYP", "baseline"),
    "arf": ("ARF", "arf"),
}  # label, kind
WATCHED = "arf_watch"
_LARGEST = 1 << 20  # bytes of a text that people or the trainer write
_NOT_GIVEN = ("", "None", "False", "()", "[]", "{}")  # values in params.txt

EXPECTED = (
    "a grid folder of `arf ablate`, the folder of `arf fit`, a run folder (run.json or out.log) or a file of rows of "
    "`arf evaluate --out`"
)


class _Record(BaseModel):
    """What a report needs of a record; its other fields are looked at where they are shown."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    set: str
    headline: str
    checkpoint: str
    metrics: dict[str, Any]
    digest: str | None = None
    original_digest: str | None = None
    suite: str | None = None
    split: str | None = None
    images: int | None = None
    alpha: float | None = None

    @model_validator(mode="after")
    def _can_be_used(self) -> _Record:
        if finite(self.metrics.get(self.headline)) is None:
            raise ValueError(f"metrics has no number {self.headline!r}.")
        if "\0" in self.checkpoint:
            raise ValueError(f"'checkpoint' is {self.checkpoint!r}, expected a path.")
        return self


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
    """One training run; arm and seed are the grid's, or by the folder's name.

    Attributes:
        info: what ``run.json`` says; empty without one.
        logs: open_clip's, in the order of their names.
        watched: what ``--arf-watch`` has seen, in order.
        params: the trainer's ``params.txt``, by flag; what is not given is left out.
    """

    folder: Path
    arm: str
    seed: int | None
    info: dict[str, Any]
    logs: tuple[Path, ...]
    watched: Sequence[dict[str, Any]] = ()
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """The trainer's command line; empty if it is not known."""
        return [str(word) for word in entries(self.info.get("command"))]

    def flag(self, name: str) -> str | None:
        """The value of a flag: on the command line, else in ``params.txt``."""
        for word, following in itertools.zip_longest(self.command, self.command[1:]):
            if word == name and following is not None:
                return str(following)
            if word.startswith(f"{name}="):
                return str(word.partition("=")[2])
        return self.params.get(name)

    def place(self, name: str) -> str:
        """A place that the run's records name, which may be relative to where training was started: above the run."""
        above = (parent / name for parent in self.folder.resolve().parents)
        found = not Path(name).exists() and next((place for place in above if place.exists()), None)
        return str(found or name)


@dataclass(frozen=True)
class Measurement:
    """A record, and whose it is. `alpha` is None for the fine-tuned model itself."""

    arm: str
    seed: int | None
    alpha: float | None
    record: dict[str, Any]


@dataclass
class Collected:
    """Everything that was found.

    Attributes:
        arms: by name, in table order.
        reference: name of the arm that the others are compared with: the model before, if it has been measured.
        baseline: name of the arm that ARF is held against: the grid's reference, else FLYP.
        grids, choices: contents of each ``grid.json`` and ``choices.json``.
        comparisons: further pairs of arms that a grid wants compared.
        roots: folders below which any file that the records name may be shown: those that hold what the user has named,
            and the current one.
    """

    arms: dict[str, Arm] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    test: list[Measurement] = field(default_factory=list)
    validation: list[Measurement] = field(default_factory=list)
    reference: str | None = None
    baseline: str | None = None
    grids: list[dict[str, Any]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[tuple[str, str]] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[str]:
        """Names of the arms of a kind."""
        return [arm.name for arm in self.arms.values() if arm.kind == kind]

    @property
    def before(self) -> str | None:
        """The arm that is the model before fine-tuning."""
        return next(iter(self.of_kind("before")), None)

    @property
    def subject(self) -> str | None:
        """The arm that the report is about: ARF itself, if it is there, or else what has been trained first."""
        trained = [arm.name for arm in self.arms.values() if arm.kind not in ("before", "control")]
        trained.sort(key=lambda name: (name != "arf", self.arms[name].kind != "arf", name == self.baseline))
        return next(iter(trained), None)


def collect(sources: Sequence[Path], reference: str | None = None) -> Collected:
    """Reads all sources.

    Args:
        sources: See the module's docstring.
        reference: The arm to compare with, in place of the model before fine-tuning.

    Raises:
        ReportError: For a source that is none, damaged or empty, and for two checkpoints of one arm and seed.
    """
    found = Collected(roots=[*(source.resolve().parent for source in sources), Path.cwd().resolve()])
    # Of each file of records, with the folder that their paths are relative to.
    records = [
        (record, path.parent)
        for source in sources
        for path in _read(source, found)
        for record in _records(path)
    ]
    originals = {record.get("original_digest") for record, _ in records} - {None}
    folders = {run.folder.resolve(): run for run in found.runs}
    for record, folder in records:
        # The ends of a sweep are no mixtures, if all of them begin at the same weights.
        start = record.get("alpha") == 0 and len(originals) == 1
        record["digest"] = record["original_digest"] if start else record.get("digest")
        record["alpha"] = None if start or record.get("alpha") == 1 else record.get("alpha")
        whose = _whose(record, folder, found, originals, folders)
        arm, seed = (found.before or "before", None) if start else whose
        measured = Measurement(arm, seed, finite(record.get("alpha")), record)
        if record.get("split") == "validation":  # rejected candidates among them, which are arms of no table
            found.validation.append(measured)
        else:
            _add_arm(found, arm)
            found.test.append(measured)
    for run in found.runs:
        _add_watched(found, run)
        _add_arm(found, run.arm)
    _check_one_checkpoint_each(found)
    if not found.test and not found.runs:
        raise ReportError(f"{', '.join(map(str, sources))}: no rows and no runs. Expected {EXPECTED}.")
    if reference is not None and reference not in found.arms:
        raise ReportError(f"There is no arm '{reference}' to compare with (found: {', '.join(found.arms)}).")
    trained = found.arms.keys() - {found.before}
    found.baseline = next((name for name in (found.baseline, "flyp") if name in trained), None)
    measured_before = found.before if any(one.arm == found.before for one in found.test) else None
    found.reference = reference or measured_before or found.baseline
    return found


def _add_watched(found: Collected, run: Run) -> None:
    """Takes what training has seen by itself of sets that have not been measured since: the first and last time."""
    known = {(one.arm, one.seed, one.record["set"]) for one in found.test if one.alpha is None}
    by_set: dict[str, list[dict[str, Any]]] = {}
    for record in run.watched:
        by_set.setdefault(record["set"], []).append(record)
    for name, seen in by_set.items():
        ends = ((found.before or "before", None, seen[0]), (run.arm, run.seed, seen[-1]))
        for arm, seed, record in ends if len(seen) > 1 else ():
            if (arm, seed, name) not in known:
                _add_arm(found, arm)
                found.test.append(Measurement(arm, seed, None, record))


def _read(source: Path, found: Collected) -> list[Path]:
    """Reads what a source holds beside records; returns its files of records."""
    if not source.exists():
        raise ReportError(f"{source} does not exist. Expected {EXPECTED}.")
    if source.is_file():
        return [source]
    if (source / "grid.json").is_file():
        return _read_grid(source, found)
    if _is_run(source):
        found.runs.append(_read_run(source, found))
        return [path for path in list_files(source, ".jsonl") if path.stem not in ("validation", WATCHED)]
    if (source / "results.jsonl").is_file():
        return [source / "results.jsonl"]
    names = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
    raise ReportError(f"{source} is no run: found {names}. Expected {EXPECTED}.")


def _read_grid(folder: Path, found: Collected) -> list[Path]:
    grid = read_json(folder / "grid.json")
    found.grids.append(grid)
    for entry in entries(grid.get("arms")):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ReportError(f"{folder / 'grid.json'}: an arm is {entry!r}, expected an object with a name.")
        label, what, kind = (str(entry.get(key) or "") for key in ("label", "what", "kind"))
        found.arms.setdefault(entry["name"], Arm(entry["name"], label or entry["name"], what, kind))
    if (folder / "choices.json").is_file():
        found.choices.append(read_json(folder / "choices.json"))
    for pair in entries(grid.get("comparisons")):
        if len(entries(pair)) == 2 and all(isinstance(name, str) and name in found.arms for name in pair):
            found.comparisons.append((pair[0], pair[1]))
    if found.baseline is None and isinstance(grid.get("reference"), str):
        found.baseline = grid["reference"]
    runs = sorted(path for path in (folder / "runs").glob("*") if _is_run(path))
    found.runs += [_read_run(path, found) for path in runs]
    files = list_files(folder, ".jsonl")
    if not runs and not files:
        raise ReportError(f"{folder} is a grid without runs and without rows yet. Run it with: arf ablate")
    return files


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() or bool(_logs(folder))


def _read_run(folder: Path, found: Collected) -> Run:
    info = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    arm, seed = arm_and_seed(folder.resolve().name)
    arm = info["arm"] if isinstance(info.get("arm"), str) else arm
    seed = info["seed"] if type(info.get("seed")) is int else seed
    # The model before fine-tuning has a folder as the others of a grid have, and no seed.
    seed = None if found.grids and arm == found.before else seed
    watch = folder / f"{WATCHED}.jsonl"
    seen = {}
    for record in _records(watch) if watch.is_file() else ():
        record["checkpoint"] = str(folder / "checkpoints" / f"{record['checkpoint']}.pt")
        if type(record.get("epoch")) is int:  # a resumed run's counts where an epoch occurs twice
            seen[record["epoch"], record["set"]] = record
    watched = [seen[key] for key in sorted(seen)]
    return Run(folder, arm, seed, info, _logs(folder), watched, _params(folder / "params.txt"))


def _params(path: Path) -> dict[str, str]:
    lines = split_lines(read_text(path)) if path.is_file() else []
    given = (line.partition(": ") for line in lines)
    return {
        f"--{name.replace('_', '-')}": value
        for name, colon, value in given
        if colon and value not in _NOT_GIVEN
    }


def read_text(path: Path) -> str:
    """Reads a text that is no longer than texts of its kind are.

    Raises:
        ReportError: If it is, or cannot be read.
    """
    untrusted.require_regular(path, ReportError)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as cause:
        raise ReportError(f"{path} cannot be read: {cause}. Expected a text in UTF-8.") from cause


def _logs(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted([*folder.glob("out.log"), *folder.glob("*/out.log"), *folder.glob("*/*/out.log")]))


def _records(path: Path) -> list[dict[str, Any]]:
    from arf_plugin.evaluation.records import read_records

    try:
        records = read_records(path, whole=False)  # what a report needs of them is checked here
    except EvaluationError as cause:
        raise ReportError(str(cause)) from cause
    for number, record in enumerate(records, 1):
        validated(_Record, record, f"{path}, row {number}", ReportError, "Measure it again.")
        record["metrics"] = {
            name: value for name, value in record["metrics"].items() if finite(value) is not None
        }
    return records


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ReportError: If it is none.
    """
    found: dict[str, Any] = untrusted.read_json(
        path, ReportError, advice="Make it again, or leave the folder out."
    )
    return found


def _whose(
    record: Mapping[str, Any],
    folder: Path,
    found: Collected,
    originals: set[Any],
    folders: Mapping[Path, Run],
) -> tuple[str, int | None]:
    """Arm and seed of a record: by its run's folder, as the original of mixtures, else by the checkpoint's folder."""
    alpha, path = record.get("alpha"), Path(record["checkpoint"])
    name = run_name(record["checkpoint"])
    above = [parent for place in (folder / path, path) for parent in place.resolve().parents]
    run = next((folders[parent] for parent in above if parent in folders), None)
    run = run or {place.name: run for place, run in folders.items()}.get(name)
    if run is not None:
        return run.arm, run.seed
    if alpha is None and record.get("digest") in originals:
        return found.before or "before", None  # what others were mixed with
    arm, seed = arm_and_seed(name)
    if found.grids and found.before and arm not in found.arms and alpha is None:
        return found.before, None  # in a grid, everything else lies below its runs
    return arm, seed


def _add_arm(found: Collected, name: str) -> None:
    if name not in found.arms:
        label, kind = _KNOWN_ARMS.get(name, (name, ""))
        found.arms[name] = Arm(name, label, "", kind)
        if kind == "before":  # heads the table
            found.arms = {name: found.arms.pop(name), **found.arms}


def _check_one_checkpoint_each(found: Collected) -> None:
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for measured in found.test:
        record = measured.record
        other = seen.setdefault((measured.arm, measured.seed, measured.alpha, record["set"]), record)
        if other.get("digest") != record.get("digest"):
            raise ReportError(
                f"{measured.arm}, seed {measured.seed}: two checkpoints were measured on '{record['set']}': "
                f"{other['checkpoint']} and {record['checkpoint']}. A report takes one checkpoint per arm and seed; "
                "leave the rows of one out, or give the runs' folders names of their own (ARM-SEED)."
            )


def finite(value: Any) -> float | None:
    """A finite number as a float; None for everything else, truth values among it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def entries(value: Any) -> list[Any]:
    """A list as it is; an empty one for everything else."""
    return value if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """An object as it is; an empty one for everything else."""
    return value if isinstance(value, dict) else {}


def is_local(name: str) -> bool:
    """Whether a place that stands in data is one of this machine, and nothing that is fetched or run."""
    return bool(name) and not ("://" in name or "::" in name or name.startswith("pipe:") or "\0" in name)


def is_below(name: str, roots: Sequence[Path]) -> bool:
    """Whether a place that stands in data is one of this machine below folders that the user has named.

    No address, no link that leads out, nothing hidden.
    """
    if not is_local(name):
        return False
    try:
        place = Path(name).resolve()
    except (OSError, ValueError, RuntimeError):  # zero bytes, links in a circle
        return False
    root = next(filter(place.is_relative_to, roots), None)
    return root is not None and not any(part.startswith(".") for part in place.relative_to(root).parts)
