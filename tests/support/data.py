"""Writes small task data and anchor sets: real tars of real images."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from support.tars import write_tar

CLASSNAMES = ["cat", "dog", "tree", "house"]


def write_model_configs(folder: Path) -> Path:
    """Writes open_clip model configurations: tiny ViTs and a ResNet with BatchNorm.

    Of the ViTs one drops patches. Three have a text tower with room to trim: of a CLIP, and of a ``CustomTextCLIP``
    pooled at the end of the text, as CLIP's own, or at the last position.
    """
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    long = {**text, "context_length": 32}
    vit = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, vision, texts in (
        ("tiny-vit", vit, text),
        ("tiny-vit-dropout", {**vit, "patch_dropout": 0.3}, text),
        ("tiny-resnet", resnet, text),
        ("tiny-long", vit, long),
        ("tiny-custom", vit, {**long, "pool_type": "argmax"}),
        ("tiny-last", vit, {**long, "pool_type": "last"}),
    ):
        config = {
            "embed_dim": 16,
            "vision_cfg": vision,
            "text_cfg": texts,
            "custom_text": "pool_type" in texts,
        }
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def image(seed: int, size: int = 32, format: str = "PNG") -> bytes:
    """A square image of smooth random colours; every seed gives another one."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((size, size), Image.BICUBIC).save(buffer, format)
    return buffer.getvalue()


@dataclasses.dataclass
class Task:
    """Task data on disk.

    Attributes:
        folder: Where the shards are.
        shards: Number of shards.
        samples: Everything written, by sample id: image seed and class.
    """

    folder: Path
    shards: int
    samples: dict[str, tuple[int, int]]

    @property
    def ids(self) -> list[str]:
        return list(self.samples)

    @property
    def urls(self) -> str:
        """What --train-data takes."""
        return f"{self.folder}/task-{{0000..{self.shards - 1:04d}}}.tar"

    @property
    def classnames(self) -> Path:
        return self.folder / "classnames.txt"

    @property
    def templates(self) -> Path:
        return self.folder / "templates.txt"

    def text(self, identity: str) -> str:
        """The sample's own text."""
        return f"an own text number {self.samples[identity][0]}"


def write_task(folder: Path, shards: int, per_shard: int, text: bool = True) -> Task:
    """Writes shards of ``png``, ``cls`` and (unless `text` is off) ``txt``, with class names and templates."""
    task = Task(folder, shards, {})
    for shard in range(shards):
        members = {}
        for number in range(per_shard):
            seed = shard * per_shard + number
            key = f"{seed:06d}"
            identity = f"task-{shard:04d}/{key}"
            task.samples[identity] = (seed, seed % len(CLASSNAMES))
            members[f"{key}.png"] = image(seed)
            members[f"{key}.cls"] = str(seed % len(CLASSNAMES)).encode()
            if text:
                members[f"{key}.txt"] = task.text(identity).encode()
        write_tar(folder / f"task-{shard:04d}.tar", members)
    task.classnames.write_text("\n".join(CLASSNAMES) + "\n")
    task.templates.write_text("a photo of a {c}.\na drawing of a {c}.\n")
    return task


def write_csv_task(folder: Path, count: int, texts: Sequence[str] | None = None) -> Path:
    """Writes images and a CSV that names them, with classes and texts.

    The order of a CSV depends on torch's seed alone; WebDataset's shuffle differs from run to run.
    """
    lines = ["filepath\ttitle\tcls"]
    for number in range(count):
        path = folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
        text = f"an own text number {number}" if texts is None else texts[number]
        lines.append(f"{path}\t{text}\t{number % len(CLASSNAMES)}")
    (folder / "task.csv").write_text("\n".join(lines) + "\n")
    return folder / "task.csv"


def write_captions(anchors: Path, captions: Mapping[str, str], name: str = "part-00000.parquet") -> Path:
    """Writes one parquet file of captions."""
    path = anchors / "captions" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(captions), "caption": list(captions.values())}), path)
    return path


def pair_seed(number: int) -> int:
    """Image seed of a pair, apart from those of task data."""
    return 100_000 + number


def pair_text(number: int) -> str:
    """Text of a pair."""
    return f"a pair text number {number}"


def write_pairs(anchors: Path, shards: int, per_shard: int) -> None:
    """Writes pair shards of ``jpg`` (as PNG data would do, too) and ``txt``."""
    for shard in range(shards):
        members = {}
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            members[f"{number:06d}.png"] = image(pair_seed(number))
            members[f"{number:06d}.txt"] = pair_text(number).encode()
        write_tar(anchors / "pairs" / f"{shard:06d}.tar", members)
