"""The loader of pair anchors: every pair once per pass, another order each epoch, the same order for a seed."""

from __future__ import annotations

import collections
import functools
import itertools
import random
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from open_clip_train.data import SharedEpoch
from support import data
from support.tars import write_tar

from arf_plugin.anchors.features import PairFeatures, pair_features
from arf_plugin.anchors.pairs import list_pair_shards
from arf_plugin.data.batch import BatchLayout
from arf_plugin.data.loader import TrainingLoader
from arf_plugin.data.pairs import NAMED, pair_loader
from arf_plugin.data.startup import split_workers
from arf_plugin.data.task import TaskLoader
from arf_plugin.errors import AnchorSetError
from arf_plugin.resume.order import SampleOrder

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
    return pair_loader(shards, **{**options, **changes})


def numbers(loader) -> list[int]:
    return [number for batch in loader for number in batch["pair_text"][:, 0].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_shows_every_pair_once(shards, workers):
    counts = collections.Counter(numbers(build(shards, workers=workers)))
    assert counts == dict.fromkeys(range(SHARDS * PER_SHARD), 1)


def test_images_and_texts_stay_together(shards):
    from io import BytesIO

    from PIL import Image

    for batch in build(shards):
        parts = batch["pair_image"].tolist(), batch["pair_text"][:, 0].tolist()
        for value, number in zip(*parts, strict=True):
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
    epoch.set_value(1)
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


BAD = b"\x89PNG\r\n\x1a\n damaged inside"


def write_bad(folder, count):
    """Pairs none of which can be decoded: damaged images, and texts that are not UTF-8."""
    members = {}
    for n in range(count):
        members[f"{n}.png"] = data.image(n) if n % 2 else BAD
        members[f"{n}.txt"] = b"number 1\xff" if n % 2 else b"number 1"
    write_tar(folder / "pairs" / "0.tar", members)
    return list_pair_shards(str(folder))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_that_yields_nothing_ends_the_run_with_one_sentence(tmp_path, workers):
    loader = build(write_bad(tmp_path, 4), workers=workers)
    with pytest.raises(
        AnchorSetError, match=r"None of the 4 pairs of a whole pass .*0\.tar.* can be dec"
    ) as caught:
        list(TrainingLoader(task(2), loader, BatchLayout(2, pairs=4)))
    assert "Traceback" not in str(caught.value)


def test_a_pass_without_a_pair_ends_the_run(tmp_path):
    write_tar(tmp_path / "pairs" / "0.tar", {"0.png": data.image(0), "1.txt": b"number 1", "README": b"x"})
    with pytest.raises(AnchorSetError, match="has given no pair"):
        numbers(build(list_pair_shards(str(tmp_path))))


def test_a_pass_of_which_a_resumed_run_has_seen_a_part_is_not_judged(tmp_path):
    """The one good pair lies before the place where the run goes on; the next pass has it again."""
    members = {"0.png": data.image(0), "0.txt": b"number 8", "1.png": BAD, "1.txt": b"number 7"}
    write_tar(tmp_path / "pairs" / "0.tar", members)
    shards = list_pair_shards(str(tmp_path))
    for skip in (1, 2, 3):
        order = SampleOrder("pairs", 3, lambda: 0, 0)
        order.start_at(0, [skip])
        batches = list(build(shards, order=order, batch_size=2, num_batches=2))
        assert [batch["pair_text"][:, 0].tolist() for batch in batches] == [[8, 8]] * 2


def test_bad_pairs_are_named_once_and_not_without_end(tmp_path, caplog):
    write_bad(tmp_path, 60)
    write_tar(tmp_path / "pairs" / "1.tar", {"good.png": data.image(1), "good.txt": b"number 8"})
    assert set(numbers(build(list_pair_shards(str(tmp_path)), num_batches=6))) == {8}
    lines = [r.getMessage() for r in caplog.records if "skipping a pair" in r.getMessage()]
    assert len(lines) == len(set(lines)) == NAMED
    assert caplog.text.count("more pair anchors like these") == 1


def test_a_folder_with_brackets_and_files_that_are_still_being_written(tmp_path):
    folder = tmp_path / "set[1]*"
    data.write_pairs(folder, 1, 2)
    data.write_pairs(tmp_path / "set1x", 3, 2)
    (folder / "pairs" / ".incomplete-7@host@x.tar").write_bytes(b"half")
    shards = list_pair_shards(str(folder))
    assert len(shards) == 1 and "set[1]*" in shards[0]
    assert set(numbers(build(shards, num_batches=1))) == {0, 1}


def test_other_members_and_repeated_ones_change_nothing(tmp_path):
    """Each of these broke webdataset's decoding of all members, or its grouping."""
    pair = [("0.png", data.image(0)), ("0.txt", b"number 5")]
    for number, more in enumerate(
        (
            [("0.json", b"")],
            [("0.cls", b"cat")],
            [("0.id", b"n0144")],
            [("0.npy", b"x")],
            [("._0.png", b"apple"), ("README", b"")],
            [("0.txt", b"number 6")],
        )
    ):
        folder = tmp_path / str(number)
        write_tar(folder / "pairs" / "0.tar", [*pair, *more])
        assert set(numbers(build(list_pair_shards(str(folder)), num_batches=1))) == {5}


def test_a_damaged_shard_is_one_error(tmp_path):
    data.write_pairs(tmp_path, 1, 3)
    (path,) = (tmp_path / "pairs").iterdir()
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"IEND")])
    with pytest.raises(AnchorSetError, match="is cut off or corrupt"):
        numbers(build(list_pair_shards(str(tmp_path))))


@pytest.mark.parametrize("resumed", [None, 0, 5])
def test_order_and_random_draws_are_those_of_webdatasets_stages(tmp_path, resumed):
    """Batches are equal to the last bit to those of the pipeline of webdataset's own stages that this one replaced."""
    data.write_pairs(tmp_path, SHARDS, PER_SHARD)
    write_tar(tmp_path / "pairs" / "bad.tar", {"b.png": BAD, "b.txt": b"number 7"})
    shards = list_pair_shards(str(tmp_path))

    def preprocess(image):
        return torch.tensor(image.getpixel((3, 4))) + torch.rand(3)

    def order():
        if resumed is None:
            return None
        made = SampleOrder("pairs", 3, lambda: 0, 0)
        made.start_at(0, [resumed])
        return made

    def tokenize(text):
        return torch.tensor([[int(text.rsplit(" ", 1)[1])]])

    torch.manual_seed(9)
    ours = list(build(shards, preprocess=preprocess, order=order()))
    torch.manual_seed(9)
    theirs = list(webdatasets_batches(shards, preprocess, tokenize, order()))
    for batch, expected in zip(ours, theirs, strict=True):
        assert len(batch) == len(expected) == (2 if resumed is None else 3)
        assert torch.equal(batch["pair_image"], expected[0]) and torch.equal(batch["pair_text"], expected[1])
        if resumed is not None:
            assert batch["index"].tolist() == expected[2].tolist()


def webdatasets_batches(shards, preprocess, tokenize, order):
    """Pairs as webdataset's own stages read, decode and batch them, with the seeds of the loader under test."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def raw():
        for number in itertools.count():
            urls = list(shards)
            random.Random(f"3/0/{number}").shuffle(urls)
            streams = ({"url": url, "stream": Path(url[7:]).open("rb")} for url in urls)  # noqa: SIM115
            samples = list(group_by_keys(tar_file_expander(streams)))
            random.Random(f"3/0/0/0/{number}").shuffle(samples)
            yield from samples

    def numbered(_):
        if order is None:
            yield from raw()
            return
        order.begin()
        for number, sample in order.number(raw()):
            yield {**sample, "__number__": number}

    dataset = wds.DataPipeline(
        lambda: iter([None]),
        numbered,
        wds.decode("pilrgb", handler=wds.ignore_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=preprocess, text=lambda text: tokenize(text)[0]),
        wds.to_tuple("image", "text", *([] if order is None else ["__number__"])),
        wds.batched(4, partial=False),
    ).with_epoch(6)
    return wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=0)


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
    assert split_workers(workers, *sizes, wanted, shards, world) == expected


def task(batches: int) -> TaskLoader:
    """Batches of two task samples."""
    return TaskLoader([{"image": torch.zeros(2, 1), "text": torch.zeros(2, 1)} for _ in range(batches)], 2, 4)


def test_the_loader_says_when_pairs_run_out():
    pairs = [{"pair_image": torch.ones(2, 1), "pair_text": torch.ones(2, 1)}]
    with pytest.raises(AnchorSetError, match="pair anchors ended before the epoch did"):
        list(TrainingLoader(task(2), pairs, BatchLayout(2, pairs=2)))


def test_errors_from_loader_workers_lose_their_wrapping():
    # In a worker, so that the error arrives wrapped into the traceback of another process.
    loader = torch.utils.data.DataLoader(Failing(), batch_size=None, num_workers=1)
    with pytest.raises(AnchorSetError) as caught:
        list(TrainingLoader(TaskLoader(loader, 1, 1), None, BatchLayout(1)))
    assert str(caught.value) == "one clear\nmessage"


class Failing(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise AnchorSetError("one clear\nmessage")
        yield


@pytest.fixture(scope="module")
def featured(tmp_path_factory, model_configs):
    """A set with features: folder and shards."""
    folder = tmp_path_factory.mktemp("featured")
    data.write_pairs(folder, 2, PER_SHARD)
    open_clip.add_model_config(model_configs)
    data.write_features(folder, data.start_of("tiny-vit", folder / "start.pt"), "tiny-vit")
    return folder, list_pair_shards(str(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_features_come_with_their_pairs(featured, workers):
    folder, shards = featured
    of = functools.partial(pair_features, folder)
    expected = {
        int(key): (image, text)
        for found in map(of, shards)
        for key, image, text in zip(found.keys, found.image, found.text, strict=True)
    }
    seen = set()
    for batch in build(shards, workers=workers, features=of, num_batches=3, batch_size=4):
        parts = batch["pair_text"][:, 0].tolist(), batch["pair_image_feature"], batch["pair_text_feature"]
        for number, image, text in zip(*parts, strict=True):
            assert image.dtype == torch.float32
            assert np.array_equal(image, expected[number][0]) and np.array_equal(text, expected[number][1])
            seen.add(number)
    assert seen == set(range(2 * PER_SHARD))


def test_a_pair_that_decodes_and_has_no_features_is_refused(featured):
    folder, shards = featured

    def all_but_one(url: str) -> PairFeatures:
        found = pair_features(folder, url)
        return PairFeatures(found.keys[1:], found.image[1:], found.text[1:])

    with pytest.raises(AnchorSetError, match=r"pair 00000[06] has no features of the starting model"):
        list(build(shards, features=all_but_one))
