"""open_clip_train.data:wds: open_clip's pipeline of the task data with its samples in a seeded order.

open_clip shuffles shards by its seed, but samples by process id and clock. While it builds the pipeline of a
deterministic run, ``wds.shuffle`` is one that `SampleOrder` seeds, numbers and can begin in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import webdataset as wds
from webdataset.filters import _shuffle  # what wds.shuffle calls; open_clip imports it, too

from arf_plugin.data.order import SampleOrder, ShardSeed, with_number


def webdataset(original: Any, order: SampleOrder) -> SimpleNamespace:
    """The module ``webdataset`` as data.py sees it while it builds the training data."""
    return ordered(original, order, lambda sample: "txt" in sample)


def ordered(original: Any, order: SampleOrder, keeps: Callable[[Any], bool]) -> SimpleNamespace:
    """What `webdataset` returns; ``keeps`` says which raw samples open_clip does not drop for want of a text."""

    def shuffle(*, bufsize: int, initial: int) -> Callable[[Iterator[Any]], Iterator[Any]]:
        def stage(samples: Iterator[Any]) -> Iterator[Any]:
            shuffled = _shuffle(samples, bufsize, initial, order.shuffling())
            for number, sample in order.number(shuffled):
                yield {**sample, "txt": with_number(sample["txt"], number)} if keeps(sample) else sample

        return stage

    class Pipeline(wds.DataPipeline):
        """Tells the order when an epoch begins; passes over the shards begin without it."""

        def __init__(self, *stages: Any) -> None:
            super().__init__(*stages)
            for stage in stages:
                if hasattr(stage, "worker_seed"):  # ResampledShards2 takes the seed that its epochs add to
                    stage.worker_seed = ShardSeed(order.seed, order.rank)

        def __iter__(self) -> Iterator[Any]:
            order.begin()
            return super().__iter__()

    return SimpleNamespace(**{**vars(original), "shuffle": shuffle, "DataPipeline": Pipeline})
