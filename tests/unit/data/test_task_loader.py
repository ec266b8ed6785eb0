"""The loader of the task data against open_clip's own: the same samples, as many of them, in the same order."""

from __future__ import annotations

import collections
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset as wds
from open_clip_train import data as open_clip_data
from PIL import Image
from support import data
from support.tars import write_tar

from arf_plugin.data.task import shuffle_sizes, task_loader
from arf_plugin.data.texts import TaskTexts
from arf_plugin.errors import FlagError, TaskDataError
from arf_plugin.hooks.releases import PACKAGE
from arf_plugin.hooks.table import installed, trains_tasks

TASKS = trains_tasks(installed(PACKAGE) or "")
SHARDS, PER_SHARD = 6, 9
ODD = (3, 5, 8)  # image damaged, text not UTF-8, no text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tars of numbered samples, some of which open_clip passes over, and the same as a CSV."""
    folder, lines = tmp_path_factory.mktemp("task"), ["filepath\ttitle"]
    for shard in range(SHARDS):
        members: dict[str, bytes] = {}
        for n in range(PER_SHARD):
            number = shard * PER_SHARD + n
            (folder / f"{number}.png").write_bytes(data.image(number))
            lines.append(f"{folder}/{number}.png\ttext {number}")
            odd = shard == 2 and n in ODD
            members[f"{n}.png"] = b"\x89PNG damaged" if odd and n == ODD[0] else data.image(number)
            if not (odd and n == ODD[2]):
                members[f"{n}.txt"] = b"\xff\xfe" if odd and n == ODD[1] else f"text {number}".encode()
            members[f"{n}.json"] = b"{}"
        members["alone.txt"] = b"text 1000"
        write_tar(folder / f"{shard}.tar", members)
    (folder / "task.csv").write_text("\n".join(lines) + "\n")
    return folder


def arguments(folder: Path, csv: bool = False, **changes):
    return SimpleNamespace(
        **{
            "train_data": f"{folder}/task.csv" if csv else f"{folder}/{{0..{SHARDS - 1}}}.tar",
            **{"dataset_type": "csv" if csv else "webdataset", "train_num_samples": None if csv else 40},
            **{"dataset_resampled": False, "train_data_upsampling_factors": None},
            **{"csv_img_key": "filepath", "csv_caption_key": "title", "csv_separator": "\t"},
            **{"seed": 3, "batch_size": 4, "workers": 0, "distributed": False, "rank": 0, "world_size": 1},
            **changes,
        }
    )


def preprocess(image: Image.Image) -> torch.Tensor:
    """Pixels, and a number that shows what was drawn before."""
    return torch.cat([torch.tensor(image.convert("RGB").getpixel((3, 4))).float(), torch.rand(1)])


def tokenize(texts: str | list[str]) -> torch.Tensor:
    return torch.tensor([[int(text.split()[1])] for text in ([texts] if isinstance(texts, str) else texts)])


class Seeded:
    """webdataset as data.py sees it, with a shuffle of samples that does not ask the clock."""

    def __getattr__(self, name: str):
        return getattr(wds, name)

    def shuffle(self, **sizes):
        return lambda samples: wds.shuffle(**sizes, rng=random.Random(1))(samples)


@pytest.fixture
def seeded(monkeypatch):
    """Both loaders shuffle samples with the same seed."""
    monkeypatch.setattr(open_clip_data, "wds", Seeded())
    monkeypatch.setattr("arf_plugin.data.task.wds", Seeded())


def build_both(args):
    """open_clip's own data, and ours with its counts."""
    own = open_clip_data.get_dataset_fn(args.train_data, args.dataset_type)(
        args, preprocess, is_train=True, epoch=0, tokenizer=tokenize
    )
    shared = open_clip_data.SharedEpoch(0)
    ours = task_loader(
        args,
        TaskTexts(None, None),
        preprocess=preprocess,
        tokenize=tokenize,
        workers=args.workers,
        epoch=shared,
    )
    assert (ours.num_batches, ours.num_samples) == (own.dataloader.num_batches, own.dataloader.num_samples)
    return own, ours, shared


def batches_of(own, ours, shared, epochs=2):
    """Batches of some epochs as image and text tensors: open_clip's, ours."""
    found: tuple[list, list] = ([], [])
    for epoch in range(epochs):
        for loader, set_epoch, made in (
            (own.dataloader, own.set_epoch, found[0]),
            (ours.batches, lambda e: [set_by(e) for set_by in setters(ours, shared)], found[1]),
        ):
            torch.manual_seed(5 + epoch)
            set_epoch(epoch)
            for batch in loader:
                made.append((batch["image"], batch["text"]) if isinstance(batch, dict) else tuple(batch))
    return found


def setters(ours, shared):
    return [shared.set_value, *([ours.sampler.set_epoch] if ours.sampler is not None else [])]


def multiset(batches) -> collections.Counter:
    return collections.Counter(number for _, texts in batches for number in texts[:, 0].tolist())


CASES = {
    "tars": {},
    "resampled": {"dataset_resampled": True},
    "upsampled": {"dataset_resampled": True, "train_data_upsampling_factors": "1::4"},
    "csv": {"csv": True},
    "csv of two processes": {"csv": True, "distributed": True, "world_size": 2},
}


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_batches_are_open_clips_own(folder, case, workers, seeded, monkeypatch):
    """Bitwise identical images, augmentation included, and texts, over two epochs."""
    changes = dict(CASES[case])
    if "train_data_upsampling_factors" in changes:
        changes["train_data"] = f"{folder}/{{0..2}}.tar::{folder}/{{3..5}}.tar"
    if changes.get("distributed"):
        monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    theirs, ours = batches_of(*build_both(arguments(folder, workers=workers, **changes)))
    assert len(theirs) == len(ours) > 0
    for own, found in zip(theirs, ours, strict=True):
        assert torch.equal(own[0], found[0]) and torch.equal(own[1], found[1])


def test_an_epoch_has_the_same_samples_without_a_seed_for_their_order(folder):
    """As in a plain run, where samples are shuffled by process id and clock: each once, the odd ones passed over."""
    whole = SHARDS * PER_SHARD - len(ODD)
    args = arguments(folder, batch_size=1, train_num_samples=whole)
    theirs, ours = batches_of(*build_both(args), epochs=1)
    skipped = {2 * PER_SHARD + n for n in ODD}
    assert multiset(theirs) == multiset(ours) == {n: 1 for n in range(SHARDS * PER_SHARD) if n not in skipped}


def test_what_is_passed_over_is_logged_as_open_clip_does(folder, caplog, seeded):
    caplog.set_level(logging.DEBUG)
    own, ours, _ = build_both(arguments(folder, train_num_samples=SHARDS * PER_SHARD))
    said = []
    for loader in (own.dataloader, ours.batches):
        caplog.clear()
        list(loader)
        said.append(sum("Handling webdataset error" in record.getMessage() for record in caplog.records))
    assert said[1] > 0 and (TASKS or said[0] == said[1])


def test_a_sample_of_two_images_is_its_first(tmp_path):
    """open_clip decodes both and drops the sample if one is damaged; the caption is of the first."""
    members = {"0.jpg": data.image(7, format="JPEG"), "0.webp": b"damaged", "0.txt": b"text 7"}
    write_tar(tmp_path / "0.tar", members)
    args = arguments(tmp_path, train_data=str(tmp_path / "0.tar"), batch_size=1, train_num_samples=1)
    (batch,) = build_both(args)[1].batches
    assert batch["text"].tolist() == [[7]]


def test_shuffle_sizes_are_open_clips(monkeypatch):
    assert shuffle_sizes() == (2000, 500, 5000, 1000)
    if TASKS:
        monkeypatch.setenv("OPENCLIP_WDS_SAMPLE_SHUFFLE_SIZE", "7")
        assert shuffle_sizes() == (2000, 500, 7, 1000)


@pytest.mark.skipif(not TASKS, reason="open_clip has had these since release 4")
def test_empty_texts_and_large_images_are_passed_over_as_in_release_4(tmp_path):
    members = {}
    for n, (size, text) in enumerate(((32, b"text 0"), (32, b" "), (64, b"text 2"), (32, b"text 3"))):
        members |= {f"{n}.png": data.image(n, size), f"{n}.txt": text}
    write_tar(tmp_path / "0.tar", members)
    changes = {"train_data": str(tmp_path / "0.tar"), "batch_size": 1, "train_num_samples": 2}
    theirs, ours = batches_of(*build_both(arguments(tmp_path, **changes, max_image_pixels=32 * 32)), epochs=1)
    assert multiset(theirs) == multiset(ours) == {0: 1, 3: 1}


def test_what_open_clip_would_stumble_over_is_said(folder):
    def build(workers=0, **changes):
        args = arguments(folder, workers=workers, **changes)
        return task_loader(
            args,
            TaskTexts(None, None),
            preprocess=preprocess,
            tokenize=tokenize,
            workers=workers,
            epoch=open_clip_data.SharedEpoch(0),
        )

    with pytest.raises(TaskDataError, match=r"6 task shards for 7 loader workers \(1 processes x 7\)"):
        build(workers=7)
    with pytest.raises(FlagError, match="number of samples"):
        build(train_num_samples=None)
    with pytest.raises(FlagError, match="upsampling-factors needs --dataset-resampled"):
        build(train_data_upsampling_factors="1::2")


def test_random_numbers_of_the_process_are_drawn_as_open_clip_draws_them(folder):
    """A CSV's order comes from them; what the model draws afterwards must not depend on who loads."""
    args = arguments(folder, csv=True, workers=2)
    own, ours, _ = build_both(args)
    after = []
    for loader in (own.dataloader, ours.batches):
        torch.manual_seed(1)
        np.random.seed(1)
        list(loader)
        after.append((torch.rand(()).item(), np.random.rand()))
    assert after[0] == after[1]
