"""The loader of pair anchors: WebDataset tars of an anchor set, endless, shuffled, in batches.

All consumers (processes times loader workers) agree on a shuffled order of the shards for each pass and take every
n-th of it, so a pass shows each pair once; open_clip's resampling would show some twice in a batch, and a pair that
is its own negative. Each epoch starts passes of its own. Ours, not the paper's.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import torch
import webdataset as wds
from torch.utils.data import get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from arf_plugin.anchors.images import IMAGE_EXTENSIONS
from arf_plugin.data.epoch import SharedEpoch
from arf_plugin.data.order import SampleOrder
from arf_plugin.errors import AnchorSetError

SHUFFLE_BUFFER = 2000
NUMBER = "__number__"


def list_pair_shards(anchors: str) -> list[str]:
    """URLs of the pair shards of an anchor set, sorted; empty if it has none."""
    fs, root = fsspec.core.url_to_fs(anchors)
    return [fs.unstrip_protocol(name) for name in sorted(fs.glob(f"{root.rstrip('/')}/pairs/*.tar"))]


class PairShards(torch.utils.data.IterableDataset):
    """This consumer's share of the shards, pass after pass.

    Args:
        shards: All pair shards, in the same order everywhere.
        seed: The run's seed.
        epoch: The current epoch, shared with loader workers.
        rank: This process among all.
        world_size: Number of processes.
    """

    def __init__(
        self, shards: list[str], seed: int, epoch: SharedEpoch, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__()
        self.shards = shards
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        consumer, consumers = self.rank * workers + worker_id, self.world_size * workers
        for number in itertools.count():
            order = list(self.shards)
            random.Random(f"{self.seed}/{self.epoch.get()}/{number}").shuffle(order)
            for url in order[consumer::consumers]:
                yield {"url": url, "pass": number}


def _samples(shards: Iterator[dict[str, Any]], shuffle_seed: Callable[[], str]) -> Iterator[dict[str, Any]]:
    """Raw samples of the shards, shuffled within a pass so that no pair meets its own copy from the next one."""
    for number, group in itertools.groupby(shards, key=lambda shard: shard["pass"]):
        streams = ({"url": shard["url"], "stream": fsspec.open(shard["url"], "rb").open()} for shard in group)
        samples = group_by_keys(tar_file_expander(streams, handler=wds.reraise_exception))
        rng = random.Random(f"{shuffle_seed()}/{number}")
        yield from _shuffled((sample for sample in samples if _is_pair(sample)), rng)


def _shuffled(samples: Iterator[dict[str, Any]], rng: random.Random) -> Iterator[dict[str, Any]]:
    buffer: list[dict[str, Any]] = []
    for sample in samples:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(sample)
            continue
        spot = rng.randrange(SHUFFLE_BUFFER)
        buffer[spot], sample = sample, buffer[spot]
        yield sample
    rng.shuffle(buffer)
    yield from buffer


def _is_pair(sample: dict[str, Any]) -> bool:
    return "txt" in sample and any(extension in sample for extension in IMAGE_EXTENSIONS)


def _log_and_skip(error: Exception) -> bool:
    """What open_clip does about a sample that cannot be decoded; the start-up check has named the truncated ones."""
    logging.warning(f"ARF: skipping a pair anchor that cannot be decoded: {error!r}")
    return True


def build_pair_loader(
    shards: list[str],
    *,
    preprocess: Callable[[Any], torch.Tensor],
    tokenize: Callable[[str], Any],
    batch_size: int,
    num_batches: int,
    workers: int,
    seed: int,
    epoch: SharedEpoch,
    rank: int = 0,
    world_size: int = 1,
    order: SampleOrder | None = None,
) -> wds.WebLoader:
    """Builds the loader of pair anchors.

    Args:
        shards: URLs of the pair tars.
        preprocess: The trainer's image transform for training: PIL image -> ``[3, H, W]``.
        tokenize: open_clip's tokenizer: text -> ``[1, L]``.
        batch_size: A, pairs in a batch.
        num_batches: Batches needed in an epoch.
        workers: Loader workers; 0 loads in the main process.
        seed: The run's seed.
        epoch: The current epoch.
        rank: This process among all.
        world_size: Number of processes.
        order: Numbers raw samples and seeds their transforms; None where images need not be the same in each run.

    Returns:
        A loader of ``(images [A, 3, H, W], texts [A, L])``, at least ``num_batches`` of them in each iteration. With
        `order` there is a third part, the numbers of the raw samples, ``[A]``.

    Raises:
        AnchorSetError: Fewer shards than consumers.
    """
    consumers = world_size * max(1, workers)
    if len(shards) < consumers:
        raise AnchorSetError(
            f"{len(shards)} pair shards for {consumers} loader workers ({world_size} processes x {max(1, workers)}); "
            "expected at least one shard each.\n"
            f"Use --arf-workers {max(1, len(shards) // world_size)}"
            f"{' and fewer processes' if len(shards) < world_size else ''}, "
            "or write smaller shards with: arf pack --shard-size ..."
        )

    def shuffle_seed() -> str:
        worker = get_worker_info()
        return f"{seed}/{epoch.get()}/{rank}/{worker.id if worker else 0}"

    def samples(source: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        shuffled = _samples(source, shuffle_seed)
        if order is None:
            yield from shuffled
            return
        order.begin()  # passes never end, so this is called once in an iteration
        for number, sample in order.number(shuffled):
            yield {**sample, NUMBER: number}

    dataset = wds.DataPipeline(
        PairShards(shards, seed, epoch, rank, world_size),
        samples,
        wds.decode("pilrgb", handler=_log_and_skip),
        wds.rename(image=";".join(IMAGE_EXTENSIONS), text="txt"),
        wds.map_dict(image=preprocess, text=lambda text: tokenize(text)[0], handler=_log_and_skip),
        wds.to_tuple("image", "text", *([NUMBER] if order else [])),
        wds.batched(batch_size, partial=False),
    ).with_epoch(math.ceil(num_batches / max(1, workers)))
    return wds.WebLoader(
        dataset,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),  # not run here: no GPU
    )
