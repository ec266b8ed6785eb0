"""The loader of pair anchors: every pair once per pass, another order each epoch, the same order for a seed."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from support import data
from support.tars import write_tar

from arf_plugin.data.batch import BatchLayout
from arf_plugin.data.epoch import SharedEpoch
from arf_plugin.data.loader import AnchoredLoader, split_workers
from arf_plugin.data.pairs import build_pair_loader, list_pair_shards
from arf_plugin.errors import AnchorSetError

SHARDS, PER_SHARD = 4, 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    data.write_pairs(folder, SHARDS, PER_SHARD)
    return list_pair_shards(str(folder))


def build(shards, epoch=None, **changes):
    options = {
        "preprocess": lambda image: torch.tensor(float(sum(image.getpixel((0, 0))))),
        "tokenize": lambda text: torch.tensor([[int(text.rsplit(" ", 1)[1])]]),
        **{"batch_size": 4, "num_batches": 6, "workers": 0, "seed": 3, "epoch": epoch or SharedEpoch()},
    }
    return build_pair_loader(shards, **{**options, **changes})


def numbers(loader) -> list[int]:
    return [number for _, texts in loader for number in texts[:, 0].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_shows_every_pair_once(shards, workers):
    counts = collections.Counter(numbers(build(shards, workers=workers)))
    assert counts == dict.fromkeys(range(SHARDS * PER_SHARD), 1)


def test_images_and_texts_stay_together(shards):
    from io import BytesIO

    from PIL import Image

    for images, texts in build(shards):
        for value, number in zip(images.tolist(), texts[:, 0].tolist(), strict=True):
            pixel = Image.open(BytesIO(data.image(data.pair_seed(number)))).getpixel((0, 0))
            assert value == sum(pixel)


def test_processes_share_a_pass_without_overlap(shards):
    seen = [numbers(build(shards, num_batches=3, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(itertools.chain(*seen)) == list(range(SHARDS * PER_SHARD))


def test_passes_go_on_for_as_long_as_an_epoch_needs(shards):
    counts = collections.Counter(numbers(build(shards, num_batches=18)))
    assert counts == dict.fromkeys(range(SHARDS * PER_SHARD), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_depends_on_seed_and_epoch_alone(shards, workers):
    epoch = SharedEpoch()
    loader = build(shards, epoch, workers=workers)
    first = numbers(loader)
    assert numbers(loader) == first == numbers(build(shards, workers=workers))
    epoch.set(1)
    second = numbers(loader)
    assert second != first and sorted(second) == sorted(first)
    assert numbers(build(shards, workers=workers, seed=4)) != first


def test_more_consumers_than_shards_are_refused(shards):
    with pytest.raises(AnchorSetError, match=r"4 pair shards for 6 loader workers \(2 processes x 3\)"):
        build(shards, workers=3, world_size=2)


def test_an_undecodable_pair_is_skipped_as_open_clip_does(tmp_path, shards, caplog):
    write_tar(
        tmp_path / "pairs" / "0.tar",
        {
            **{"bad.png": b"\x89PNG\r\n\x1a\n damaged inside", "bad.txt": b"number 7"},
            **{"good.png": data.image(1), "good.txt": b"number 8"},
        },
    )
    assert set(numbers(build(list_pair_shards(str(tmp_path)), num_batches=2))) == {8}
    assert "skipping a pair anchor that cannot be decoded" in caplog.text


@pytest.mark.parametrize(
    ("workers", "sizes", "wanted", "shards", "world", "expected"),
    [
        (8, (64, 64), None, 100, 1, (4, 4)),
        (8, (64, 16), None, 100, 1, (6, 2)),
        (8, (64, 0), None, 100, 1, (8, 0)),
        (8, (64, 64), None, 4, 2, (6, 2)),
        (8, (64, 64), 1, 100, 1, (7, 1)),
        (2, (64, 64), 5, 100, 1, (1, 5)),
        (1, (64, 64), None, 100, 1, (1, 1)),
        (0, (64, 64), None, 100, 1, (0, 0)),
    ],
)
def test_the_worker_budget_is_split(workers, sizes, wanted, shards, world, expected):
    assert split_workers(workers, BatchLayout(sizes[0], pairs=sizes[1]), wanted, shards, world) == expected


class Task(list):
    num_batches = 2
    num_samples = 4


def test_the_anchored_loader_says_when_pairs_run_out():
    task = Task([(torch.zeros(2, 1), torch.zeros(2, 1))] * 2)
    loader = AnchoredLoader(task, [(torch.ones(2, 1), torch.ones(2, 1))], BatchLayout(2, pairs=2))
    with pytest.raises(AnchorSetError, match="pair anchors ended before the epoch did"):
        list(loader)


def test_errors_from_loader_workers_lose_their_wrapping():
    # In a worker, so that the error arrives wrapped into the traceback of another process.
    dataset = torch.utils.data.DataLoader(Failing(), batch_size=None, num_workers=1)
    dataset.num_batches, dataset.num_samples = 1, 1
    with pytest.raises(AnchorSetError) as caught:
        list(AnchoredLoader(dataset, None, BatchLayout(1)))
    assert str(caught.value) == "one clear\nmessage"


class Failing(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise AnchorSetError("one clear\nmessage")
        yield
