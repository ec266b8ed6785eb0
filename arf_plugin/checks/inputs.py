"""What the rules look at: the inputs of a run, and facts about them that are found once and when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from arf_plugin.anchors.captions import read_caption_files
from arf_plugin.anchors.files import list_files_of
from arf_plugin.anchors.scan import ShardScan, scan_shard
from arf_plugin.anchors.tars import is_remote
from arf_plugin.anchors.task import TaskScan, expand_urls, is_csv, scan_csv, scan_task_ids
from arf_plugin.anchors.task_csv import read_csv
from arf_plugin.errors import AnchorSetError, ArfError

if TYPE_CHECKING:
    import pandas as pd

Advance = Callable[[str], object]
Fact = TypeVar("Fact")


class Unknown(Exception):
    """A fact that could not be found, which has been reported already."""


@dataclass(frozen=True)
class Run:
    """The shape of a training run, as far as it decides which data a process gets.

    Attributes:
        batch_size: B, task samples per process and micro-batch.
        accum_freq: micro-batches in an optimizer step.
        world_size: processes.
        workers: ``--workers``; those of the task data are `task_workers`.
        task_workers, pair_workers: loader workers per process.
        pair_batch: A, pairs per process and micro-batch.
        epochs: epochs of the run.
        samples: ``--train-num-samples``, if it was given.
        resampled: ``--dataset-resampled``.
        seed: ``--seed``, by which shards are dealt out to loader workers.
        lr: learning rate; None if not known.
        warmup: steps of warm-up.
        pretrained: whether the run starts from trained weights.
    """

    batch_size: int
    accum_freq: int = 1
    world_size: int = 1
    workers: int = 0
    task_workers: int = 0
    pair_workers: int = 0
    pair_batch: int = 0
    epochs: int = 1
    samples: int | None = None
    resampled: bool = False
    seed: int = 0
    lr: float | None = None
    warmup: int = 0
    pretrained: bool = False

    @property
    def consumers(self) -> int:
        """Loader workers that read task data, in all processes."""
        return max(1, self.task_workers) * self.world_size

    def micro_batches(self, samples: int, csv: bool) -> int:
        """Micro-batches per process in an epoch, as open_clip counts them."""
        if csv:
            return -(-samples // self.world_size) // self.batch_size
        workers = max(1, self.task_workers)
        batches = -(-samples // (self.batch_size * self.world_size))
        return -(-batches // workers) * workers


@dataclass
class Captions:
    """The captions of a set: number of rows, Arrow array of their ids, and mean length in characters."""

    rows: int
    ids: Any
    mean_length: float
    repeated: int


@dataclass
class Inputs:
    """The inputs of a run, or of ``arf check``; what is not known is None.

    Attributes:
        anchors: folder or fsspec URL of the anchor set.
        caption_weight, pair_weight: 0 switches a half and its checks off.
        missing_caption: as ``--arf-missing-caption``.
        train_data, dataset_type, csv_img_key, csv_caption_key, csv_separator: open_clip's flags.
        classes: class names of ``--arf-classnames``.
        head: whether a linear head is trained on the classes, in place of prompts.
        texts_known: whether it is known which texts training needs: `classes`, or the samples' own.
        full: decode every image.
        run: the shape of the run.
        training: whether it is about to begin: nothing is fetched then that training would fetch again.
        caption_ids: how to get at the ids of the captions (an Arrow array); reading the files by default.
        advance: called with the URL of each shard when it has been looked at.
    """

    anchors: str | None = None
    caption_weight: float = 1.0
    pair_weight: float = 1.0
    missing_caption: str = "error"
    train_data: str | None = None
    dataset_type: str = "auto"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    csv_separator: str = "\t"
    classes: Sequence[str] | None = None
    head: bool = False
    texts_known: bool = False
    full: bool = False
    run: Run | None = None
    training: bool = False
    caption_ids: Callable[[], Any] | None = None
    advance: Advance | None = None
    _failed: set[str] = field(default_factory=set)

    @property
    def csv(self) -> bool:
        """Whether the task data is a CSV."""
        assert self.train_data is not None
        return is_csv(self.train_data, self.dataset_type)

    @property
    def remote_task(self) -> bool:
        """Whether the task data would have to be downloaded to look at it; ``arf check`` does, a run does not."""
        if self.csv or not self.training:
            return False
        return any(map(is_remote, self.task_urls))

    @property
    def joins(self) -> bool:
        """Whether captions are joined with task samples by their ids."""
        return bool(self.caption_files) and self.caption_weight != 0

    @cached_property
    def task_urls(self) -> list[str]:
        """Shards of the task data."""
        assert self.train_data is not None
        return self._once("task", lambda: expand_urls(self.train_data or "", unique=self.joins))

    @cached_property
    def caption_files(self) -> list[str]:
        """Parquet files of captions."""
        return self._files("captions", ".parquet")[1]

    @cached_property
    def pair_shards(self) -> list[str]:
        """URLs of the tars of pairs."""
        fs, files = self._files("pairs", ".tar")
        return [fs.unstrip_protocol(name) if is_remote(self.anchors or "") else name for name in files]

    def _files(self, folder: str, suffix: str) -> tuple[Any, list[str]]:
        if self.anchors is None:
            return None, []
        try:
            return list_files_of(self.anchors, folder, suffix)
        except (
            OSError,
            ImportError,
            ValueError,
        ):  # of a set that cannot be opened at all: a rule of its own says so
            return None, []

    @cached_property
    def captions(self) -> Captions:
        """The captions, read and validated."""
        return self._once("captions", self._read_captions)

    def _read_captions(self) -> Captions:
        import pyarrow.compute as pc

        if self.caption_ids is not None:
            ids = self.caption_ids()
            return Captions(len(ids), pc.unique(ids), 0.0, 0)
        fs, files = self._files("captions", ".parquet")
        table = read_caption_files(fs, files)
        distinct = table.group_by(["id", "caption"]).aggregate([]).num_rows
        return Captions(
            rows=len(table),
            ids=pc.unique(table["id"]).cast("large_string"),
            mean_length=pc.mean(pc.utf8_length(table["caption"])).as_py() or 0.0,
            repeated=len(table) - distinct,
        )

    @cached_property
    def task(self) -> TaskScan:
        """The task data, looked at by headers or rows."""
        return self._once("task", self._scan_task)

    def _scan_task(self) -> TaskScan:
        assert self.train_data is not None
        if self.csv:
            return scan_csv(
                self.frame,
                self.train_data,
                self.csv_img_key,
                images=True,
                decode=self.full,
                unique=self.joins,
            )
        return scan_task_ids(
            self.train_data, self.dataset_type, decode=self.full, unique=self.joins, advance=self.advance
        )

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The rows of a CSV."""
        assert self.train_data is not None
        return self._once(
            "task", lambda: read_csv(self.train_data or "", self.csv_img_key, self.csv_separator)
        )

    @cached_property
    def needs_class(self) -> bool:
        """Whether training takes a sample's class in place of its text."""
        return self.classes is not None

    def usable(self) -> list[int]:
        """Samples of each shard of tars that training does not pass over."""
        return [c.with_class_or_text if self.needs_class else c.with_text for c in self.task.counts]

    def pair_scans(self) -> list[tuple[str, ShardScan | ArfError]]:
        """What each tar of pairs holds, or what is wrong with it; those that would have to be fetched left out."""
        found: list[tuple[str, ShardScan | ArfError]] = []
        from tqdm import tqdm

        for url in tqdm(
            self.pair_shards,
            "pair shards",
            disable=None if self.training else True,
            unit=" shards",
            leave=False,
        ):
            if self.training and is_remote(url):
                continue
            try:
                found.append((url, scan_shard(url, AnchorSetError, texts=True, decode=self.full)))
            except AnchorSetError as cause:
                found.append((url, cause))
            if self.advance is not None:
                self.advance(url)
        return found

    @cached_property
    def pairs(self) -> list[tuple[str, ShardScan | ArfError]]:
        """`pair_scans`, once."""
        return self.pair_scans()

    def _once(self, name: str, find: Callable[[], Fact]) -> Fact:
        """Finds a fact; where that fails, the first to ask gets the error, and all others hear that it is unknown."""
        if name in self._failed:
            raise Unknown(name)
        try:
            return find()
        except ArfError:
            self._failed.add(name)
            raise
