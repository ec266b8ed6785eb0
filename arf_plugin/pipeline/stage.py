"""What a stage of anchor building is: shards of work, what becomes of them, and the methods that one writes.

A stage plans its work as shards, turns each shard into artifacts, and finalizes once all are there::

    plan() -> [Shard]      process(Shard) -> Outcome      finalize([Outcome]) -> summary

:func:`arf_plugin.pipeline.runner.run_stage` runs one; :mod:`arf_plugin.pipeline.bookkeeping` remembers what is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


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
