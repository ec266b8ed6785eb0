"""What a stage remembers of its work, all below ``<out>/work/<stage>/``.

::

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arf_plugin.anchors.files import digest, list_files, write_json
from arf_plugin.anchors.manifest import MANIFEST
from arf_plugin.errors import PoolError, StageError, TaskDataError
from arf_plugin.pipeline.ownership import Ownership
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.untrusted import printable, read_json, require_fields, utf8

FORMAT = 2  # of the bookkeeping
DATA_ERRORS = (PoolError, TaskDataError)  # a shard that raises one is left out, and the others are done first


def lock_files(stage: Stage) -> list[Path]:
    """One lock in the bookkeeping; one beside the artifacts, whose folder two bookkeepings may share (``--work``)."""
    return [stage.work / "owner.lock", stage.out / f".{stage.name}.lock"]


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
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


def read_record(stage: Stage) -> _Recorded | None:
    """Reads config.json; None if there is none.

    Raises:
        StageError: it cannot be read, or is of another format.
    """
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


class Takeover:
    """Called before a file takes its name: raises if the folder is no longer this process's.

    Locks keep others away; this is for file systems without them, and for people who delete folders.
    """

    def __init__(self, stage: Stage, made_by: str) -> None:
        self._stage, self._made_by = stage, made_by
        self._path = stage.work / "config.json"
        self._seen: tuple[int, ...] = ()

    def __call__(self) -> None:
        """Looks whether config.json still names this process's configuration."""
        try:
            found = self._path.stat()
            key = (found.st_ino, found.st_mtime_ns, found.st_size)
            if key == self._seen:
                return
            recorded = read_record(self._stage)
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


def write_marker(stage: Stage, shard: Shard, outcome: Outcome, made_by: str, inputs: str | None) -> None:
    """Notes that a shard is done, after its artifacts."""
    marker: dict[str, Any] = {
        "config": made_by,
        "inputs": inputs,
        "samples": outcome.samples,
        "kept": outcome.kept,
        "rejects": [[utf8(sample), utf8(reason)] for sample, reason in outcome.rejects],
        "sizes": [path.stat().st_size for path in stage.artifacts([shard])],
    }
    write_json(_marker_path(stage, shard), marker)


def read_marker(stage: Stage, shard: Shard, made_by: str | None) -> _Marker | None:
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


def is_done(stage: Stage, shard: Shard, made_by: str | None) -> bool:
    """Whether a shard has a sound marker of this configuration, and its artifacts."""
    return read_marker(stage, shard, made_by) is not None


def _any_done(stage: Stage, made_by: str | None) -> bool:
    """Whether there is any marker of a configuration, be it of a shard that no longer is in the plan."""
    for path in list_files(stage.work / "done", ".json"):
        try:
            if read_json(path, StageError).get("config") == made_by:
                return True
        except StageError:
            continue
    return False


def finished_summary(stage: Stage, made_by: str) -> dict[str, Any] | None:
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


def claim(stage: Stage, shards: list[Shard], config: dict[str, Any], owner: Ownership, restart: bool) -> str:
    """Records configuration and artifacts, or compares the configuration with the recorded one.

    Returns:
        What the markers of this work name it by.
    """
    recorded = None if restart else read_record(stage)
    if recorded is not None and recorded.made_by is not None and recorded.config == config:
        if not owner.share() or owner.names() - {recorded.made_by}:
            require_alone(stage, owner, [])
            raise StageError(
                f"{stage.out} was written by another command since, whose bookkeeping is not in {stage.work}. Give "
                "another --out, or drop that work with --restart."
            )
        return recorded.made_by
    require_alone(stage, owner, differences(recorded.config, config) if recorded else [])
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
            if (marker := read_marker(stage, shard, None)) is not None:
                write_marker(stage, shard, marker.outcome, made_by, None)
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


def require_alone(stage: Stage, owner: Ownership, different: list[str]) -> None:
    """Refuses a change of what the folder holds while others are at work there."""
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
        marker = read_marker(stage, shard, recorded.made_by)
        if marker is None or (marker.inputs is not None and marker.inputs == input_digest(stage, shard)):
            continue
        where = shard.source if isinstance(shard.source, (str, Path)) else f"shard {shard.name}"
        lines.append(
            f"{name}[{shard.index}]: {_short(a)} -> {_short(b)} (the content of {printable(str(where))})"
        )
    return lines


def _flat(value: Any) -> list[Any]:
    """The entries of a list and of the lists in it, so that what is looked at today begins with what once was."""
    return [item for entry in value for item in _flat(entry)] if isinstance(value, list) else [value]


def input_digest(stage: Stage, shard: Shard) -> str | None:
    """Digest of the contents of a shard's inputs; None where they cannot be read."""
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
