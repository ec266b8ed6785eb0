"""Which task shards each loader worker gets in an epoch, as open_clip deals them out: known before the first step."""

from __future__ import annotations

import random

# open_clip_train.data: _SHARD_SHUFFLE_SIZE and _SHARD_SHUFFLE_INITIAL, the same in all releases that are tested.
BUFFER, INITIAL = 2000, 500


def dealt_shards(shards: int, seed: int, epoch: int, world_size: int, workers: int) -> list[list[int]] | None:
    """Deals out shards as open_clip's ``detshuffle2``, ``split_by_node`` and ``split_by_worker`` do.

    Args:
        shards: Number of shards.
        seed: ``--seed``.
        epoch: The epoch, from 0.
        world_size: Processes.
        workers: Loader workers of the task data per process; 0 counts as 1.

    Returns:
        Numbers of shards by consumer: all workers of the first process, then those of the second. None for a negative
        seed, with which each worker shuffles for itself.
    """
    import webdataset as wds

    if seed < 0:
        return None
    shuffle = wds.shuffle(bufsize=BUFFER, initial=INITIAL, rng=random.Random(seed + epoch))
    order = list(shuffle(iter(range(shards))))
    workers = max(1, workers)
    return [
        order[rank::world_size][worker::workers] for rank in range(world_size) for worker in range(workers)
    ]
