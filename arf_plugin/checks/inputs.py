"""What the rules look at: the inputs of a run, and facts about them that are found once and when they are needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from arf_plugin.anchors.features import FeatureHeader, read_header
from arf_plugin.anchors.scan import ShardScan, scan_shard
from arf_plugin.anchors.tars import is_remote
from arf_plugin.anchors.task import TaskScan, expand_urls, is_csv, require_files, scan_csv, scan_task_ids
from arf_plugin.anchors.task_csv import read_csv
from arf_plugin.console import progress
from arf_plugin.data.captions import CaptionStore, open_captions
from arf_plugin.errors import AnchorSetError, ArfError
from arf_plugin.files import list_files_of

if TYPE_CHECKING:
    import pandas as pd

Fact = TypeVar("Fact")


class Unknown(Exception):
    """A fact that could not be found, which has been reported already."""


def _fact(kind: str) -> Callable[[Callable[[Inputs], Fact]], cached_property[Fact]]:
    """A fact that is found once; where that fails, the first to ask gets the error, all others `Unknown`."""

    def once(find: Callable[[Inputs], Fact]) -> cached_property[Fact]:
        def found(self: Inputs) -> Fact:
            if kind in self._failed:
                raise Unknown(kind)
            try:
                return find(self)
            except ArfError:
                self._failed.add(kind)
                raise

        return cached_property(functools.wraps(find)(found))

    return once


@dataclass(frozen=True)
class Run:
    """The shape of a training run, as far as it decides which data a process gets."""

    batch_size: int  # B, task samples per process and micro-batch
    accum_freq: int = 1  # micro-batches in an optimizer step
    world_size: int = 1  # processes
    workers: int = 0  # --workers, of which these load ...
    task_workers: int = 0  # task data
    pair_workers: int = 0  # pairs
    pair_batch: int = 0  # A, pairs per process and micro-batch
    epochs: int = 1
    samples: int | None = None  # --train-num-samples, if it was given
    resampled: bool = False  # --dataset-resampled
    seed: int = 0  # by which shards are dealt out to loader workers
    lr: float | None = None  # None if it is not known
    warmup: int = 0  # steps
    pretrained: bool = False  # whether it starts from trained weights

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


@dataclass(frozen=True)
class StartingModel:
    """The model that training starts from, compared with the features in the anchor set."""

    name: str  # of its configuration
    digest: str  # of its weights; see `arf_plugin.anchors.features.weights_digest`
    dim: int  # D of its features
    exact: bool  # whether its weights are as they were read, not cast to 16 bits
    cosines: tuple[tuple[str, float], ...]  # of a few anchors' features with those in the set, by place


@dataclass
class Inputs:
    """The inputs of a run, or of ``arf check``; what is not known is None."""

    anchors: str | None = None  # folder or fsspec URL
    caption_weight: float = 1.0  # 0 switches captions and their checks off
    pair_weight: float = 1.0
    caption_loss: str = "contrastive"
    pair_loss: str = "contrastive"
    starting: StartingModel | ArfError | None = None  # or the error that looking at it has met
    missing_caption: str = "error"
    train_data: str | None = None  # this and the next are open_clip's flags
    dataset_type: str = "auto"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    csv_separator: str = "\t"
    classes: Sequence[str] | None = None  # names of --arf-classnames
    head: bool = False  # whether a linear head is trained on the classes, in place of prompts
    texts_known: bool = False  # whether it is known if training needs `classes` or the samples' own texts
    full: bool = False  # decode every image
    run: Run | None = None
    training: bool = (
        False  # whether it is about to begin: it fetches remote data itself, so nothing else does
    )
    advance: Callable[[str], object] | None = (
        None  # called with the URL of each shard that has been looked at
    )
    _failed: set[str] = field(default_factory=set)

    def need_run(self) -> Run:
        """The shape of the run, where a rule applies only if it is known."""
        assert self.run is not None
        return self.run

    @property
    def has_task(self) -> bool:
        """Whether there is task data."""
        return self.train_data is not None

    @property
    def sees_task(self) -> bool:
        """Whether there is task data that can be looked at."""
        return self.has_task and not self.remote_task

    @property
    def has_pairs(self) -> bool:
        """Whether there are pairs that training uses."""
        return bool(self.pair_shards) and self.pair_weight != 0

    @property
    def csv(self) -> bool:
        """Whether the task data is a CSV."""
        return is_csv(self.train_data or "", self.dataset_type)

    @property
    def remote_task(self) -> bool:
        """Whether the task data would have to be downloaded to look at it; ``arf check`` does, a run does not."""
        return self.training and not self.csv and any(map(is_remote, self.task_urls))

    @property
    def joins(self) -> bool:
        """Whether captions are joined with task samples by their ids."""
        return bool(self.caption_files) and self.caption_weight != 0

    @_fact("task")
    def task_urls(self) -> list[str]:
        """Shards of the task data."""
        return expand_urls(self.train_data or "", unique=self.joins)

    @_fact("task")
    def task_files(self) -> None:
        """Sees that the files of the task data are there."""
        require_files(self.train_data or "", csv=self.csv)

    @cached_property
    def caption_files(self) -> list[str]:
        """Parquet files of captions."""
        return self._files("captions", ".parquet")

    @cached_property
    def pair_shards(self) -> list[str]:
        """URLs of the tars of pairs."""
        return self._files("pairs", ".tar")

    def _files(self, folder: str, suffix: str) -> list[str]:
        if self.anchors is None:
            return []
        try:
            fs, files = list_files_of(self.anchors, folder, suffix)
        except (OSError, ImportError, ValueError):  # a rule of its own says that the set cannot be opened
            return []
        return [fs.unstrip_protocol(name) if is_remote(self.anchors) else name for name in files]

    @property
    def by_feature(self) -> list[str]:
        """The kinds of anchors that are held by their features."""
        pairs = self.has_pairs and self.pair_loss != "contrastive"
        return ["captions"] * (self.joins and self.caption_loss != "contrastive") + ["pairs"] * pairs

    @_fact("features")
    def features(self) -> FeatureHeader | None:
        """What the set says of its features; None if it has none."""
        return read_header(self.anchors or "")

    @_fact("captions")
    def captions(self) -> CaptionStore:
        """The captions, validated and sorted as training has them: once per machine."""
        store = open_captions(self.anchors or "")
        assert store is not None, "there are files of captions"
        return store

    @_fact("task")
    def task(self) -> TaskScan:
        """The task data, looked at by headers or rows."""
        data, decode, unique = self.train_data or "", self.full, self.joins
        if self.csv:
            return scan_csv(self.frame, data, self.csv_img_key, images=True, decode=decode, unique=unique)
        return scan_task_ids(data, self.dataset_type, decode=decode, unique=unique, advance=self.advance)

    @_fact("task")
    def frame(self) -> pd.DataFrame:
        """The rows of a CSV."""
        return read_csv(self.train_data or "", self.csv_img_key, self.csv_separator)

    def usable(self) -> list[int]:
        """Samples of each shard of tars that training does not pass over."""
        counts = self.task.counts
        return [c.with_text if self.classes is None else c.with_class_or_text for c in counts]

    @property
    def available(self) -> int:
        """Samples that training does not pass over."""
        return len(self.frame) if self.csv else sum(self.usable())

    @cached_property
    def without_caption(self) -> list[str]:
        """Ids of the task samples, as far as they have an image, that have no caption."""
        missing = ~self.captions.covers(self.task.ids)
        return [self.task.ids[row] for row in missing.nonzero()[0].tolist()]

    @cached_property
    def pairs(self) -> list[tuple[str, ShardScan | ArfError]]:
        """What each tar of pairs holds, or what is wrong with it; those that would have to be fetched left out."""
        found: list[tuple[str, ShardScan | ArfError]] = []
        with progress("pair shards", "shards", len(self.pair_shards), quiet=not self.training) as bar:
            for url in self.pair_shards:
                if self.training and is_remote(url):
                    continue
                try:
                    found.append((url, scan_shard(url, AnchorSetError, texts=True, decode=self.full)))
                except AnchorSetError as cause:
                    found.append((url, cause))
                bar.update()
                if self.advance is not None:
                    self.advance(url)
        return found
