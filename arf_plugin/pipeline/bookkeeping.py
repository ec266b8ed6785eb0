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
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from arf_plugin.anchors.manifest import MANIFEST
from arf_plugin.errors import PoolError, StageError, TaskDataError
from arf_plugin.files import digest, list_files, write_json
from arf_plugin.pipeline.ownership import Ownership
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.untrusted import printable, read_json, require_fields, utf8

FORMAT = 2  # of the bookkeeping
DATA_ERRORS = (PoolError, TaskDataError)  # a shard that raises one is left out, and the others are done first
_Count = Annotated[int, Field(strict=True, ge=0)]


class Marker(BaseModel, frozen=True):
    """A completion marker: what became of a shard, the content of its inputs, and the sizes of its artifacts."""

    config: str | None = None
    inputs: str | None = None
    samples: _Count
    kept: _Count
    rejects: list[tuple[str, str]]
    sizes: list[_Count] | None = None


class _Recorded(NamedTuple):
    """What config.json holds.

    ``made_by`` is what markers name the configuration by: a digest of the one that the work was begun with; inputs
    that were repaired or moved since are in ``config`` alone. None: an earlier version's.
    """

    config: dict[str, Any]
    made_by: str | None


class Bookkeeping:
    """The bookkeeping of a stage; :meth:`claim` comes before all that writes markers."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.work = stage, stage.work
        self.made_by: str | None = None
        self._config_path, self._plan_path = self.work / "config.json", self.work / "plan.json"
        self._seen: tuple[int, ...] = ()

    @cached_property
    def shards(self) -> list[Shard]:
        """The stage's plan."""
        return self.stage.plan()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The stage's configuration, as it is read back from JSON; names that are no UTF-8 with escapes."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {utf8(str(key)): plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return utf8(value) if isinstance(value, str) else value

        found: dict[str, Any] = json.loads(json.dumps(plain(self.stage.config())))
        return found

    def recorded(self) -> _Recorded | None:
        """Reads config.json; None if there is none.

        Raises:
            StageError: it cannot be read, or is of another format.
        """
        path = self._config_path
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

    def check_owner(self) -> None:
        """Called before a file takes its name: raises if the folder is no longer this process's.

        Locks keep others away; this is for file systems without them, and for people who delete folders.
        """
        try:
            found = self._config_path.stat()
            key = (found.st_ino, found.st_mtime_ns, found.st_size)
            if key == self._seen:
                return
            recorded = self.recorded()
        except (OSError, StageError):
            recorded = None
        if recorded is None or recorded.made_by != self.made_by:
            raise StageError(
                f"{self.stage.out} is no longer this command's: another one has begun to write there, or "
                f"{self._config_path} was removed. Nothing is written any more; give one of the two another --out."
            )
        self._seen = key

    def write_marker(self, shard: Shard, outcome: Outcome, inputs: str | None) -> None:
        """Notes that a shard is done, after its artifacts."""
        marker = Marker(
            config=self.made_by,
            inputs=inputs,
            samples=outcome.samples,
            kept=outcome.kept,
            rejects=[(utf8(sample), utf8(reason)) for sample, reason in outcome.rejects],
            sizes=[path.stat().st_size for path in self.stage.artifacts([shard])],
        )
        write_json(self._marker_path(shard), marker.model_dump())

    def marker(self, shard: Shard, made_by: str | None) -> Marker | None:
        """The marker of a shard; None if it is to be done: it is missing, damaged, or of another configuration."""
        try:
            marker = Marker.model_validate(read_json(self._marker_path(shard), StageError))
        except (StageError, ValidationError):
            return None
        paths = self.stage.artifacts([shard])
        if marker.config != made_by or not all(path.is_file() for path in paths):
            return None
        if self.stage.redo_changed and marker.inputs != self.input_digest(shard):
            return None
        return marker if marker.sizes in (None, [path.stat().st_size for path in paths]) else None

    def is_done(self, shard: Shard) -> bool:
        """Whether a shard has a sound marker of this configuration, and its artifacts."""
        return self.marker(shard, self.made_by) is not None

    def finished(self) -> dict[str, Any] | None:
        """The summary of finished.json; None if it is not there, damaged, or of another configuration or plan."""
        try:
            summary: dict[str, Any] = read_json(self.work / "finished.json", StageError)
        except StageError:
            return None
        counts = [summary.get(name) for name in ("shards", "samples", "kept", "rejected")]
        if summary.pop("config", None) != self.made_by or summary.get("finished") is not True:
            return None
        if not all(type(count) is int and count >= 0 for count in counts) or counts[0] != len(self.shards):
            return None
        return summary

    def write_finished(self, summary: dict[str, Any]) -> None:
        """Notes that the stage is finalized."""
        write_json(self.work / "finished.json", summary | {"config": self.made_by})

    def clear(self) -> None:
        """Removes an earlier run; markers first, so that a kill in the middle leaves nothing that looks finished."""
        done = self.work / "done"
        artifacts = self._planned()
        if done.is_symlink():
            done.unlink()
        shutil.rmtree(done, ignore_errors=True)
        (self.work / "finished.json").unlink(missing_ok=True)
        if any(path.exists() for path in artifacts):
            self.stage.begin()
        for path in (*artifacts, self._plan_path, self.work / "rejects.jsonl", self._config_path):
            path.unlink(missing_ok=True)

    def claim(self, owner: Ownership, restart: bool) -> None:
        """Records configuration and artifacts, or compares the configuration with the recorded one.

        Raises:
            StageError: the folder holds other work, or others are at work there.
        """
        stage, config = self.stage, self.config
        recorded = None if restart else self.recorded()
        if recorded is not None and recorded.made_by is not None and recorded.config == config:
            if not owner.share() or owner.names() - {recorded.made_by}:
                self.require_alone(owner)
                raise StageError(
                    f"{stage.out} was written by another command since, whose bookkeeping is not in {self.work}. Give "
                    "another --out, or drop that work with --restart."
                )
            self.made_by = recorded.made_by
            return
        self.require_alone(owner, differences(recorded.config, config) if recorded else [])
        changed = self._changed(recorded) if recorded else None
        if recorded is None or not self._any_done(recorded.made_by):  # nothing done that could be mixed
            self.clear()
            self.made_by = digest(config)
            owner.sign(self.made_by)
            write_json(
                self._plan_path, [str(path.relative_to(stage.out)) for path in stage.artifacts(self.shards)]
            )
        elif changed == []:
            self.made_by = recorded.made_by or digest(config)
            owner.sign(self.made_by)
            for shard in self.shards if recorded.made_by is None else ():
                if (marker := self.marker(shard, None)) is not None:
                    self.write_marker(shard, Outcome(marker.samples, marker.kept, marker.rejects), None)
        else:
            lines = [f"  {line}" for line in changed or differences(recorded.config, config)]
            if len(lines) > 10:
                lines = [*lines[:10], f"  ... {len(lines)} differences in all"]
            raise StageError(
                f"{stage.out} holds work of stage {stage.name} with another configuration or other inputs:\n"
                + "\n".join(lines)
                + "\nRun it with the old ones to go on, give another --out, or drop the old work with --restart."
            )
        write_json(self._config_path, {"format": FORMAT, "made_by": self.made_by, "config": config})
        owner.share()

    def require_alone(self, owner: Ownership, different: list[str] | None = None) -> None:
        """Refuses a change of what the folder holds while others are at work there."""
        if owner.alone():
            return
        shown = "".join(f"\n  {line}" for line in (different or [])[:10])
        raise StageError(
            f"Another arf command is at work in {self.stage.out} (stage {self.stage.name})"
            + (f", with another configuration or other inputs:{shown}\n" if different else ". ")
            + "Wait for it or stop it, or give another --out."
        )

    def input_digest(self, shard: Shard) -> str | None:
        """Digest of the contents of a shard's inputs; None where they cannot be read."""
        try:
            return self.stage.input_digest(shard)
        except (OSError, *DATA_ERRORS):  # reading it says why
            return None

    def _marker_path(self, shard: Shard) -> Path:
        return self.work / "done" / f"{shard.name}.json"

    def _any_done(self, made_by: str | None) -> bool:
        """Whether there is any marker of a configuration, be it of a shard that no longer is in the plan."""
        for path in list_files(self.work / "done", ".json"):
            try:
                if read_json(path, StageError).get("config") == made_by:
                    return True
            except StageError:
                continue
        return False

    def _planned(self) -> list[Path]:
        """The artifacts that plan.json names: files below ``out``, on a way without links."""
        plan, out = self._plan_path, self.stage.out
        if not plan.exists():
            return []
        advice = (
            f"It lists what is to be removed: remove that and {self.work} by hand, or give another --out."
        )
        root, found = out.resolve(), []
        for name in read_json(plan, StageError, list, advice):
            parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
            path = out.joinpath(*parts)
            relative = parts and ".." not in parts and not Path(name).is_absolute()
            inside = relative and path.parent.resolve() == root.joinpath(*parts[:-1])
            if not inside or path.is_relative_to(self.work) or path.name == MANIFEST or path.is_dir():
                shown = printable(repr(name))[:80]
                raise StageError(f"{plan} names {shown}, which is no artifact below {out}. {advice}")
            found.append(path)
        return found

    def _changed(self, recorded: _Recorded) -> list[str] | None:
        """Says which finished shards' inputs are no longer what was processed; None if anything else differs, too.

        Inputs of shards that are still to do may change, as when a damaged tar is replaced; those of finished shards
        may be touched, moved or copied, but their content must stay. What an earlier version did is taken over where
        size and time of the inputs have stayed, for it noted no contents.
        """
        name = self.stage.shard_inputs
        before, now = recorded.config.get(name), self.config.get(name)
        per_shard = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
        if not (per_shard and len(now or ()) == len(self.shards)):
            return [] if recorded.config == self.config else None
        if recorded.config | {name: None} != self.config | {name: None}:
            return None
        lines = []
        for shard, a, b in zip(self.shards, before or (), now or (), strict=True):
            earlier = recorded.made_by is None and isinstance(a, list) and _flat(b)[: len(a)] == a
            if a == b or earlier:
                continue
            marker = self.marker(shard, recorded.made_by)
            if marker is None or (marker.inputs is not None and marker.inputs == self.input_digest(shard)):
                continue
            where = shard.source if isinstance(shard.source, (str, Path)) else f"shard {shard.name}"
            lines.append(
                f"{name}[{shard.index}]: {_short(a)} -> {_short(b)} (the content of {printable(str(where))})"
            )
        return lines


def _flat(value: Any) -> list[Any]:
    """The entries of a list and of the lists in it, so that what is looked at today begins with what once was."""
    return [item for entry in value for item in _flat(entry)] if isinstance(value, list) else [value]


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lists where two JSON values differ, such as ``selection.k: 3 -> 4``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        pairs = [(f"{where}.{key}" if where else key, old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return [f"{where}: {len(old)} entries -> {len(new)}"]
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]
    return [line for name, a, b in pairs for line in differences(a, b, name)]


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a value that is nested too deeply"
    return text if len(text) <= 120 else f"{text[:90]} ... ({len(text)} characters)"
