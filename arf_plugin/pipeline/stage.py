"""What a stage of anchor building is, and what it works on.

::

    plan() -> [Shard]      process(Shard, ...) -> Outcome      finalize([Shard], ...) -> summary

It says what is made. Who makes it, and how, is an :class:`arf_plugin.pipeline.execution.Execution`;
:func:`arf_plugin.pipeline.runner.run_stage` brings both together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from arf_plugin.pipeline.execution import Execution


@dataclass(frozen=True)
class Shard:
    """A unit of work that is done, or done again, as a whole.

    Attributes:
        index: position in the plan.
        name: name of its completion marker.
        source: what to read; its meaning is the stage's own.
        samples: number of samples, if known.
    """

    index: int
    name: str
    source: Any
    samples: int | None = None

    @classmethod
    def counted(cls, index: int, source: Any, samples: int, digits: int = 5) -> Shard:
        """A shard whose samples are counted, named by its position in the plan."""
        return cls(index, f"{index:0{digits}d}", source, samples)


def count_samples(shards: list[Shard]) -> int | None:
    """Number of samples, if it is known of all shards."""
    counts = [shard.samples for shard in shards if shard.samples is not None]
    return sum(counts) if len(counts) == len(shards) else None


@dataclass
class Outcome:
    """What became of a shard: samples seen, samples kept, and the rejected ones as (id, reason)."""

    samples: int = 0
    kept: int = 0
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def reject(self, sample: str, reason: str) -> None:
        """Notes a sample that was left out."""
        self.rejects.append((sample, reason))


@dataclass
class Stage(ABC):
    """One stage; see the module's docstring.

    Attributes:
        out: folder of the artifacts.
        work_folder: folder of the bookkeeping, if it is not ``<out>/work/<name>``.
        name, unit: what it is called, and what its samples are.
        shard_inputs: entry of the configuration that may list the shards' inputs, one by one.
        redo_changed: does shards again whose inputs have changed, rather than refuse them.
    """

    out: Path
    work_folder: Path | None = field(default=None, kw_only=True)
    name: ClassVar[str]
    unit: ClassVar[str] = "images"
    shard_inputs: ClassVar[str] = ""
    redo_changed: ClassVar[bool] = False

    @property
    def work(self) -> Path:
        """Folder of the bookkeeping."""
        return self.work_folder or self.out / "work" / self.name

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns, as JSON, everything that determines the bytes of the artifacts: settings and inputs."""

    @abstractmethod
    def plan(self) -> list[Shard]:
        """Returns all shards, in an order that depends on the configuration alone."""

    @abstractmethod
    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """Returns the files that :meth:`process` writes for these shards."""

    def input_digest(self, shard: Shard) -> str | None:
        """Returns a digest of the contents of what a shard is made of; None if it cannot be told."""
        return None

    def prepare(self, execution: Execution) -> None:  # noqa: B027 - most stages need none
        """Loads models and the like; called once, and only if there is a shard to process."""

    def begin(self) -> None:  # noqa: B027 - most stages need none
        """Called before the first artifact is written or an old one removed, maybe by several ranks.

        A stage whose artifacts others read without its bookkeeping notes there that they are not whole; what
        :meth:`finalize` writes takes the note's place.
        """

    @abstractmethod
    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Writes the artifacts of a shard, each through :func:`replacing`; reports progress in samples."""

    # What :mod:`arf_plugin.pipeline.estimate` asks.

    def fetches(self) -> str | None:
        """Returns, as a clause, what :meth:`prepare` or :meth:`process` would ask the network for; None if nothing."""
        return None

    def attempt(self, shard: Shard, execution: Execution, advance: Callable[[float], object]) -> None:
        """Processes a part of a shard, for as long as `advance` allows, which is first called when all is loaded."""
        self.prepare(execution)
        advance(0)
        self.process(shard, execution, advance)

    def disk(self, shards: list[Shard]) -> float | None:
        """Returns, after :meth:`attempt`, the bytes of the artifacts, about; None if that cannot be told."""
        return None

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Called when all shards are done; returns entries for the summary."""
        return {}
