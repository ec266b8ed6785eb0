"""The skeleton that all stages of anchor building share.

A stage plans its work as shards, turns each shard into artifacts, and finalizes once all are there::

    plan() -> [Shard]      process(Shard) -> Outcome      finalize([Outcome]) -> summary

:func:`run_stage` owns the rest: which shards are this process's (torchrun, srun or a SLURM array), what is
done already, completion markers that are written after the artifacts, the list of rejected samples, and the
refusal to mix two configurations in one folder. All bookkeeping is below ``<out>/work/<stage>/``::

    config.json            what determines the bytes of the artifacts, and what markers name it by
    plan.json              the artifacts, so that a restart finds those of another configuration
    done/<shard>.json      completion marker: counts, rejected samples, configuration, content of the inputs
    rejects.jsonl          every rejected sample with its reason
    finished.json          summary, once finalized
    owner.lock             held by every process at work; see :mod:`arf_plugin.pipeline.ownership`

A marker counts only with the configuration that the folder has: what a process that has lost the folder leaves behind
is nobody's. A shard whose marker is damaged, or whose artifact has another size than was written, is done again.
"""

from __future__ import annotations

import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from arf_plugin.anchors.files import checked, digest, list_files, remove_incomplete, replacing, write_json
from arf_plugin.anchors.manifest import MANIFEST
from arf_plugin.errors import PoolError, StageError, TaskDataError
from arf_plugin.pipeline.ownership import Ownership
from arf_plugin.pipeline.progress import Progress
from arf_plugin.untrusted import printable, printable_json, read_json, require_fields, utf8

FORMAT = 2  # of the bookkeeping
DATA_ERRORS = (PoolError, TaskDataError)  # a shard that raises one is left out, and the others are done first


@dataclass(frozen=True)
class Shard:
    """A unit of work that is done, or done again, as a whole.

    Attributes:
        index: position in the plan.
        name: name of its completion marker.
        source: what to read; its meaning is the stage's own.
        weight: relative size, for the estimate of the remaining time.
        samples: number of samples, if known.
    """

    index: int
    name: str
    source: Any
    weight: float = 1.0
    samples: int | None = None


@dataclass
class Outcome:
    """What became of a shard: samples seen, samples kept, and the rejected ones as (id, reason)."""

    samples: int = 0
    kept: int = 0
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def reject(self, sample: str, reason: str) -> None:
        """Notes a sample that was left out."""
        self.rejects.append((sample, reason))


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


class Stage(ABC):
    """One stage; see the module's docstring.

    Args:
        out: folder of the artifacts.
        work: folder of the bookkeeping; ``<out>/work/<name>`` by default.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "images"
    shard_inputs: ClassVar[str] = (
        ""  # entry of the configuration that may list the shards' inputs, one by one
    )

    def __init__(self, out: Path, work: Path | None = None) -> None:
        self.out = out
        self.work = work or out / "work" / self.name

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns, as JSON, everything that determines the bytes of the artifacts: settings and inputs."""

    @abstractmethod
    def plan(self) -> list[Shard]:
        """Returns all shards, in an order that depends on the configuration alone."""

    def input_digest(self, shard: Shard) -> str | None:
        """Returns a digest of the contents of what a shard is made of; None if it cannot be told."""
        return None

    def prepare(self) -> None:  # noqa: B027 - most stages need none
        """Loads models and the like; called once, and only if there is a shard to process."""

    def begin(self) -> None:  # noqa: B027 - most stages need none
        """Called before the first artifact is written or an old one removed, maybe by several ranks.

        A stage whose artifacts others read without its bookkeeping notes there that they are not whole; what
        :meth:`finalize` writes takes the note's place.
        """

    @abstractmethod
    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Writes the artifacts of a shard, each through :func:`replacing`; reports progress in samples."""

    @abstractmethod
    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """Returns the files that :meth:`process` writes for these shards."""

    def finalize(self, shards: list[Shard]) -> dict[str, Any]:
        """Called when all shards are done; returns entries for the summary."""
        return {}


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
        shards, config = stage.plan(), _plain(stage.config())
        with Ownership(_locks(stage)) as owner:
            lock = FileLock(stage.work / "stage.lock")
            with lock:  # ranks start together, and the slower must not clear away what the faster has begun
                made_by = _claim(stage, shards, config, owner, options.restart)
            with checked(_Takeover(stage, made_by)):
                _process(stage, shards, made_by, options)
                with lock:  # the last ranks may come to the end together
                    summary = _finished(stage, made_by) or _finish(stage, shards, made_by, options)
        return {"stage": stage.name, "out": str(stage.out)} | summary


def restart(stage: Stage) -> None:
    """Throws earlier work away, without going on.

    Raises:
        StageError: while others are at work in the folder.
    """
    with (
        _telling_of_files(stage),
        Ownership(_locks(stage)) as owner,
        FileLock(stage.work / "stage.lock"),
    ):
        _require_alone(stage, owner, [])
        clear(stage)


def describe(stage: Stage) -> dict[str, Any]:
    """Returns what :func:`run_stage` would do, without doing it."""
    shards, config = stage.plan(), _plain(stage.config())
    recorded = _recorded(stage)
    made_by = recorded.made_by if recorded else digest(config)
    done = sum(_is_done(stage, shard, made_by) for shard in shards)
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


def _locks(stage: Stage) -> list[Path]:
    """One lock in the bookkeeping; one beside the artifacts, whose folder two bookkeepings may share (``--work``)."""
    return [stage.work / "owner.lock", stage.out / f".{stage.name}.lock"]


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it is read back from JSON; names that are no UTF-8 with escapes."""

    def convert(value: Any) -> Any:
        if isinstance(value, str):
            return utf8(value)
        if isinstance(value, dict):
            return {utf8(str(key)): convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return value

    return json.loads(json.dumps(convert(config)))


@dataclass(frozen=True)
class _Recorded:
    """What config.json holds.

    Attributes:
        config: the configuration of the work in the folder.
        made_by: what its markers name it by: a digest of the configuration that the work was begun with.
            Inputs that were mended or moved since are in ``config`` alone. None: an earlier version's.
    """

    config: dict[str, Any]
    made_by: str | None


def _recorded(stage: Stage) -> _Recorded | None:
    path = stage.work / "config.json"
    if not path.exists():
        return None
    advice = "It says what the work in the folder was made with: drop that work with --restart."
    value = read_json(path, StageError, advice=advice)
    if "format" not in value:
        return _Recorded(value, None)
    require_fields(value, {"format": int, "made_by": str, "config": dict}, str(path), StageError, advice)
    if value["format"] != FORMAT:
        found = printable(repr(value["format"]))[:40]
        raise StageError(f"{path} has format {found}, this arf-plugin reads {FORMAT}. {advice}")
    return _Recorded(value["config"], value["made_by"])


def _record(stage: Stage, config: dict[str, Any], made_by: str) -> None:
    write_json(stage.work / "config.json", {"format": FORMAT, "made_by": made_by, "config": config})


class _Takeover:
    """Called before a file takes its name: raises if the folder is no longer this process's.

    Locks keep others away; this is for file systems without them, and for people who delete folders.
    """

    def __init__(self, stage: Stage, made_by: str) -> None:
        self._stage, self._made_by = stage, made_by
        self._path = stage.work / "config.json"
        self._seen: tuple[int, ...] = ()

    def __call__(self) -> None:
        try:
            found = self._path.stat()
            key = (found.st_ino, found.st_mtime_ns, found.st_size)
            if key == self._seen:
                return
            recorded = _recorded(self._stage)
        except (OSError, StageError):
            recorded = None
        if recorded is None or recorded.made_by != self._made_by:
            raise StageError(
                f"{self._stage.out} is no longer this command's: another one has begun to write there, or "
                f"{self._path} was removed. Nothing is written any more; give one of the two another --out."
            )
        self._seen = key


@dataclass(frozen=True)
class _Marker:
    """A completion marker: what became of a shard, the content of its inputs, and the sizes of its artifacts."""

    outcome: Outcome
    inputs: str | None


def _marker_path(stage: Stage, shard: Shard) -> Path:
    return stage.work / "done" / f"{shard.name}.json"


def _write_marker(stage: Stage, shard: Shard, outcome: Outcome, made_by: str, inputs: str | None) -> None:
    marker: dict[str, Any] = {
        "config": made_by,
        "inputs": inputs,
        "samples": outcome.samples,
        "kept": outcome.kept,
        "rejects": [[utf8(sample), utf8(reason)] for sample, reason in outcome.rejects],
        "sizes": [path.stat().st_size for path in stage.artifacts([shard])],
    }
    write_json(_marker_path(stage, shard), marker)


def _read_marker(stage: Stage, shard: Shard, made_by: str | None) -> _Marker | None:
    """The marker of a shard; None if it is not there, damaged, or of another configuration: the shard is to be done."""
    path = _marker_path(stage, shard)
    try:
        marker = read_json(path, StageError)
        require_fields(marker, {"samples": int, "kept": int, "rejects": list}, str(path), StageError)
    except StageError:
        return None
    sizes, inputs = marker.get("sizes"), marker.get("inputs")
    if marker.get("config") != made_by or marker["samples"] < 0 or marker["kept"] < 0:
        return None
    if not all(
        isinstance(r, list) and len(r) == 2 and all(isinstance(x, str) for x in r) for r in marker["rejects"]
    ):
        return None
    paths = stage.artifacts([shard])
    if not all(path.is_file() for path in paths):
        return None
    if sizes is not None and sizes != [path.stat().st_size for path in paths]:
        return None
    rejects = [(sample, reason) for sample, reason in marker["rejects"]]
    outcome = Outcome(marker["samples"], marker["kept"], rejects)
    return _Marker(outcome, inputs if isinstance(inputs, str) else None)


def _is_done(stage: Stage, shard: Shard, made_by: str | None) -> bool:
    return _read_marker(stage, shard, made_by) is not None


def _any_done(stage: Stage, made_by: str | None) -> bool:
    """Whether there is any marker of a configuration, be it of a shard that no longer is in the plan."""
    for path in list_files(stage.work / "done", ".json"):
        try:
            if read_json(path, StageError).get("config") == made_by:
                return True
        except StageError:
            continue
    return False


def _finished(stage: Stage, made_by: str) -> dict[str, Any] | None:
    """The summary of finished.json; None if it is not there, damaged, or of another configuration."""
    try:
        summary = read_json(stage.work / "finished.json", StageError)
    except StageError:
        return None
    counts = [summary.get(name) for name in ("shards", "samples", "kept", "rejected")]
    if summary.pop("config", None) != made_by or summary.get("finished") is not True:
        return None
    return summary if all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts) else None


def clear(stage: Stage) -> None:
    """Removes an earlier run; markers first, so that a kill in the middle leaves nothing that looks finished."""
    done, plan = stage.work / "done", stage.work / "plan.json"
    artifacts = _planned(stage, plan)
    if done.is_symlink():
        done.unlink()
    shutil.rmtree(done, ignore_errors=True)
    (stage.work / "finished.json").unlink(missing_ok=True)
    if any(path.exists() for path in artifacts):
        stage.begin()
    for path in artifacts:
        path.unlink(missing_ok=True)
    for path in (plan, stage.work / "rejects.jsonl", stage.work / "config.json"):
        path.unlink(missing_ok=True)


def _planned(stage: Stage, plan: Path) -> list[Path]:
    """The artifacts that plan.json names: files below ``out``, on a way without links."""
    if not plan.exists():
        return []
    advice = f"It lists what is to be removed: remove that and {stage.work} by hand, or give another --out."
    root, found = stage.out.resolve(), []
    for name in read_json(plan, StageError, list, advice):
        parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
        path = stage.out.joinpath(*parts)
        relative = parts and ".." not in parts and not Path(name).is_absolute()
        inside = relative and path.parent.resolve() == root.joinpath(*parts[:-1])
        if not inside or path.is_relative_to(stage.work) or path.name == MANIFEST or path.is_dir():
            shown = printable(repr(name))[:80]
            raise StageError(f"{plan} names {shown}, which is no artifact below {stage.out}. {advice}")
        found.append(path)
    return found


def _claim(stage: Stage, shards: list[Shard], config: dict[str, Any], owner: Ownership, restart: bool) -> str:
    """Records configuration and artifacts, or compares the configuration with the recorded one.

    Returns:
        What the markers of this work name it by.
    """
    recorded = None if restart else _recorded(stage)
    if recorded is not None and recorded.made_by is not None and recorded.config == config:
        if not owner.share() or owner.names() - {recorded.made_by}:
            _require_alone(stage, owner, [])
            raise StageError(
                f"{stage.out} was written by another command since, whose bookkeeping is not in {stage.work}. Give "
                "another --out, or drop that work with --restart."
            )
        return recorded.made_by
    _require_alone(stage, owner, differences(recorded.config, config) if recorded else [])
    changed = _changed(stage, shards, recorded, config) if recorded else None
    if recorded is None or not _any_done(stage, recorded.made_by):  # nothing done that could be mixed
        clear(stage)
        made_by = digest(config)
        owner.sign(made_by)
        artifacts = [str(path.relative_to(stage.out)) for path in stage.artifacts(shards)]
        write_json(stage.work / "plan.json", artifacts)
    elif changed == []:
        made_by = recorded.made_by or digest(config)
        owner.sign(made_by)
        for shard in shards if recorded.made_by is None else ():
            if (marker := _read_marker(stage, shard, None)) is not None:
                _write_marker(stage, shard, marker.outcome, made_by, None)
    else:
        lines = [f"  {line}" for line in changed or differences(recorded.config, config)]
        if len(lines) > 10:
            lines = [*lines[:10], f"  ... {len(lines)} differences in all"]
        raise StageError(
            f"{stage.out} holds work of stage {stage.name} with another configuration or other inputs:\n"
            + "\n".join(lines)
            + "\nRun it with the old ones to go on, give another --out, or drop the old work with --restart."
        )
    _record(stage, config, made_by)
    owner.share()
    return made_by


def _require_alone(stage: Stage, owner: Ownership, different: list[str]) -> None:
    if owner.alone():
        return
    shown = "".join(f"\n  {line}" for line in different[:10])
    raise StageError(
        f"Another arf command is at work in {stage.out} (stage {stage.name})"
        + (f", with another configuration or other inputs:{shown}\n" if different else ". ")
        + "Wait for it or stop it, or give another --out."
    )


def _changed(
    stage: Stage, shards: list[Shard], recorded: _Recorded, config: dict[str, Any]
) -> list[str] | None:
    """Says which finished shards' inputs are no longer what was processed; None if anything else differs, too.

    Inputs of shards that are still to do may change, as when a damaged tar is replaced; those of finished shards may be
    touched, moved or copied, but their content must stay. What an earlier version did is taken over where size and time
    of the inputs have stayed, for it noted no contents.
    """
    name = stage.shard_inputs
    before, now = recorded.config.get(name), config.get(name)
    if not (isinstance(before, list) and isinstance(now, list) and len(before) == len(now) == len(shards)):
        return [] if recorded.config == config else None
    if recorded.config | {name: None} != config | {name: None}:
        return None
    lines = []
    for shard, a, b in zip(shards, before, now, strict=True):
        earlier = recorded.made_by is None and isinstance(a, list) and _flat(b)[: len(a)] == a
        if a == b or earlier:
            continue
        marker = _read_marker(stage, shard, recorded.made_by)
        if marker is None or (marker.inputs is not None and marker.inputs == _input_digest(stage, shard)):
            continue
        where = shard.source if isinstance(shard.source, (str, Path)) else f"shard {shard.name}"
        lines.append(
            f"{name}[{shard.index}]: {_short(a)} -> {_short(b)} (the content of {printable(str(where))})"
        )
    return lines


def _flat(value: Any) -> list[Any]:
    """The entries of a list and of the lists in it, so that what is looked at today begins with what once was."""
    return [item for entry in value for item in _flat(entry)] if isinstance(value, list) else [value]


def _input_digest(stage: Stage, shard: Shard) -> str | None:
    try:
        return stage.input_digest(shard)
    except (OSError, *DATA_ERRORS):  # reading it says why
        return None


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lists where two JSON values differ, such as ``selection.k: 3 -> 4``."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{where}.{key}" if where else key, key) for key in sorted(old.keys() | new.keys())]
        return [line for name, key in pairs for line in differences(old.get(key), new.get(key), name)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = list(zip(old, new, strict=True))
        return [line for i, (a, b) in enumerate(pairs) for line in differences(a, b, f"{where}[{i}]")]
    if isinstance(old, list) and isinstance(new, list):
        return [f"{where}: {len(old)} entries -> {len(new)}"]
    return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a value that is nested too deeply"
    return text if len(text) <= 120 else f"{text[:90]} ... ({len(text)} characters)"


def _process(stage: Stage, shards: list[Shard], made_by: str, options: RunOptions) -> None:
    mine = [s for s in shards[options.rank :: options.world] if not _is_done(stage, s, made_by)]
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
            inputs = _input_digest(
                stage, shard
            )  # before it is read: what changes meanwhile is noticed next time
            try:
                outcome = stage.process(shard, progress.advance)
            except DATA_ERRORS as cause:
                failed.append(str(cause))
                continue
            _write_marker(stage, shard, outcome, made_by, inputs)
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
    markers = [_read_marker(stage, shard, made_by) for shard in shards]
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
