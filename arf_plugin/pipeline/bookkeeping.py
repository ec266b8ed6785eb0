"""What a stage remembers of its work, all below ``<out>/work/<stage>/``, and whose folder it is.

::

    config.json            what determines the bytes of the artifacts, and what markers name it by
    plan.json              the artifacts, so that a restart finds those of another configuration
    done/<shard>.json      completion marker: counts, rejected samples, configuration, content of the inputs
    rejects.jsonl          every rejected sample with its reason
    finished.json          summary, once finalized
    owner.lock             held by every process at work

A marker counts only with the configuration that the folder has: what a process that has lost the folder leaves behind
is nobody's. A shard whose marker is damaged, or whose artifact has another size than was written, is done again.

All processes at work in a folder have one configuration, and share a lock of the operating system; who wants to change
the configuration, or to throw work away, must have it alone. The system frees the locks of a process that is killed, in
whatever way; Linux passes them on between the clients of an NFS server. A file system without locks still has the check
before each file takes its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from arf_plugin.anchors.manifest import MANIFEST
from arf_plugin.errors import PoolError, StageError, TaskDataError
from arf_plugin.files import digest, list_files, write_json
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.untrusted import printable, read_json, require_fields, utf8

FORMAT = 2  # of the bookkeeping
DATA_ERRORS = (PoolError, TaskDataError)  # a shard that raises one is left out, and the others are done first
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_SHOWN = 10  # differences between configurations
_Count = Annotated[int, Field(strict=True, ge=0)]


class Marker(BaseModel, frozen=True):
    """A completion marker: what became of a shard, the content of its inputs, and the sizes of its artifacts."""

    config: str
    inputs: str | None
    samples: _Count
    kept: _Count
    rejects: list[tuple[str, str]]
    sizes: list[_Count]


class Bookkeeping:
    """The bookkeeping of a stage.

    What writes goes within :meth:`locks`, and after :meth:`claim` or :meth:`require_alone`.

    Attributes:
        made_by: what markers name the configuration by: a digest of the one that the work was begun with; inputs that
            were repaired or moved since are in config.json alone.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.work = stage, stage.work
        self.shards: list[Shard] = stage.plan()
        self.config: dict[str, Any] = _plain(stage.config())
        self.made_by = ""
        self._config_path, self._plan_path = self.work / "config.json", self.work / "plan.json"
        self._locks: list[int] = []
        self._seen: tuple[int, ...] = ()

    def recorded(self) -> tuple[str, dict[str, Any]] | None:
        """``made_by`` and the configuration, as config.json has them; None if there is none.

        Raises:
            StageError: it cannot be read, or is of another format.
        """
        path = self._config_path
        if not path.exists():
            return None
        advice = "It says what the work in the folder was made with: drop that work with --restart."
        value = read_json(path, StageError, advice=advice)
        require_fields(value, {"format": int, "made_by": str, "config": dict}, str(path), StageError, advice)
        if value["format"] != FORMAT:
            found = printable(repr(value["format"]))[:40]
            raise StageError(f"{path} has format {found}, this arf-plugin reads {FORMAT}. {advice}")
        return value["made_by"], value["config"]

    @contextmanager
    def locks(self) -> Iterator[None]:
        """This process's hold on the folders, as long as the block lasts.

        One lock lies here, one beside the artifacts, whose folder two bookkeepings may share (``--work``).
        """
        with ExitStack() as held:
            for path in sorted({self.work / "owner.lock", self.stage.out / f".{self.stage.name}.lock"}):
                path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                self._locks.append(os.open(path, flags, 0o666))
                held.callback(os.close, self._locks[-1])
            yield

    def claim(self, restart: bool) -> None:
        """Records configuration and artifacts, or compares the configuration with the recorded one.

        Raises:
            StageError: the folder holds other work, or others are at work there.
        """
        stage = self.stage
        recorded = None if restart else self.recorded()
        self.made_by, before = recorded or ("", None)
        if before == self.config:
            if not _lock_all(self._locks, fcntl.LOCK_SH) or self._last_owners() - {self.made_by}:
                self.require_alone()
                raise StageError(
                    f"{stage.out} was written by another command since, whose bookkeeping is not in {self.work}. Give "
                    "another --out, or drop that work with --restart."
                )
        else:
            self.require_alone(differences(before, self.config) if before else [])
            if before is None or not self._any_done():  # nothing done that could be mixed
                self.clear()
                self.made_by = digest(self.config)
                artifacts = stage.artifacts(self.shards)
                write_json(self._plan_path, [str(path.relative_to(stage.out)) for path in artifacts])
            elif lines := [f"  {line}" for line in self._conflicts(before)]:
                more = [f"  ... {len(lines)} differences in all"] if len(lines) > _SHOWN else []
                raise StageError(
                    f"{stage.out} holds work of stage {stage.name} with another configuration or other inputs:\n"
                    + "\n".join(lines[:_SHOWN] + more)
                    + "\nRun it with the old ones to go on, give another --out, or drop the old work with --restart "
                    f"(arf anchors: --restart {stage.name})."
                )
            for file in self._locks:
                os.ftruncate(file, 0)
                os.pwrite(file, self.made_by.encode(), 0)
            write_json(self._config_path, {"format": FORMAT, "made_by": self.made_by, "config": self.config})
            _lock_all(self._locks, fcntl.LOCK_SH)

    def require_alone(self, different: list[str] | None = None) -> None:
        """Refuses a change of what the folder holds while others are at work there."""
        if _lock_all(self._locks, fcntl.LOCK_EX):
            return
        shown = "".join(f"\n  {line}" for line in (different or [])[:_SHOWN])
        raise StageError(
            f"Another arf command is at work in {self.stage.out} (stage {self.stage.name})"
            + (f", with another configuration or other inputs:{shown}\n" if different else ". ")
            + "Wait for it or stop it, or give another --out."
        )

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
        if recorded is None or recorded[0] != self.made_by:
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

    def marker(self, shard: Shard) -> Marker | None:
        """The marker of a shard; None if it is to be done: it is missing, damaged, or of another configuration."""
        try:
            marker = Marker.model_validate(read_json(self._marker_path(shard), StageError))
        except (StageError, ValidationError):
            return None
        paths = self.stage.artifacts([shard])
        if marker.config != self.made_by or not all(path.is_file() for path in paths):
            return None
        if self.stage.redo_changed and marker.inputs != self.input_digest(shard):
            return None
        return marker if marker.sizes == [path.stat().st_size for path in paths] else None

    def finished(self) -> dict[str, Any] | None:
        """The summary of finished.json; None if it is not there, damaged, or of another configuration or plan."""
        try:
            summary: dict[str, Any] = read_json(self.work / "finished.json", StageError)
        except StageError:
            return None
        counts = [summary.get(name) for name in ("shards", "samples", "kept", "rejected")]
        is_sound = all(type(count) is int and count >= 0 for count in counts)
        is_mine = summary.pop("config", None) == self.made_by and counts[0] == len(self.shards)
        return summary if is_sound and is_mine and summary.get("finished") is True else None

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

    def input_digest(self, shard: Shard) -> str | None:
        """Digest of the contents of a shard's inputs; None where they cannot be read."""
        try:
            return self.stage.input_digest(shard)
        except (OSError, *DATA_ERRORS):  # reading it says why
            return None

    def _marker_path(self, shard: Shard) -> Path:
        return self.work / "done" / f"{shard.name}.json"

    def _last_owners(self) -> set[str]:
        """The ``made_by`` that is written into the lock files."""
        found = (os.pread(file, 100, 0) for file in self._locks)
        return {name.decode("utf-8", "replace") for name in found if name}

    def _any_done(self) -> bool:
        """Whether there is any marker of ``made_by``, be it of a shard that no longer is in the plan."""
        for path in list_files(self.work / "done", ".json"):
            with suppress(StageError):
                if read_json(path, StageError).get("config") == self.made_by:
                    return True
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

    def _conflicts(self, before: dict[str, Any]) -> list[str]:
        """Says what keeps the work done from being gone on with; empty if nothing does.

        Inputs of shards that are still to do may change, as when a damaged tar is replaced; those of finished shards
        may be touched, moved or copied, but their content must stay.
        """
        name = self.stage.shard_inputs
        old, new = before.get(name), self.config.get(name)
        per_shard = (
            isinstance(old, list) and isinstance(new, list) and len(old) == len(new) == len(self.shards)
        )
        if not per_shard or before | {name: None} != self.config | {name: None}:
            return differences(before, self.config)
        lines = []
        for shard, a, b in zip(self.shards, old or (), new or (), strict=True):
            marker = self.marker(shard) if a != b else None
            if marker and (marker.inputs is None or marker.inputs != self.input_digest(shard)):
                place = shard.source if isinstance(shard.source, (str, Path)) else f"shard {shard.name}"
                change = f"{_short(a)} -> {_short(b)} (the content of {printable(str(place))})"
                lines.append(f"{name}[{shard.index}]: {change}")
        return lines


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


def _plain(value: Any) -> Any:
    """A JSON value whose texts, names of files among them, are UTF-8."""
    if isinstance(value, dict):
        return {utf8(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return utf8(value) if isinstance(value, str) else value


def _lock_all(files: list[int], kind: int) -> bool:
    """Takes locks, without waiting; False if another process has one of them."""
    for file in files:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as cause:
            if cause.errno not in _NO_LOCKS:
                raise
    return True
