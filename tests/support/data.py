"""Writes small task data and anchor sets: real tars of real images."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from arf_plugin.anchors.features import (
    Embedded,
    FeatureHeader,
    PairFeatures,
    join_caption_parts,
    weights_digest,
    write_caption_part,
    write_header,
    write_pair_features,
)
from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.pairs import read_pairs
from arf_plugin.files import content_digest
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
    def flags(self) -> list[object]:
        """The trainer's flags for one pass."""
        return ["--train-data", self.urls, "--train-num-samples", len(self.samples)]

    @property
    def prompts(self) -> list[object]:
        """Those for class prompts."""
        return ["--arf-classnames", self.classnames, "--arf-templates", self.templates]

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


def write_csv_captions(anchors: Path, csv: Path, captions: Sequence[str] | None = None) -> Path:
    """Writes captions of the images that `write_csv_task` has written, by the paths of its CSV."""
    paths = [line.partition("\t")[0] for line in csv.read_text().splitlines()[1:]]
    captions = [f"a caption of {number}" for number in range(len(paths))] if captions is None else captions
    return write_captions(anchors, dict(zip(paths, captions, strict=True)))


def start_of(name: str, path: Path, dtype: torch.dtype = torch.float32) -> open_clip.CLIP:
    """Makes a model with random weights and writes these to a file for ``--pretrained``."""
    with _default_dtype(dtype), torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), path)
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write_features(anchors: Path, model: open_clip.CLIP, name: str) -> None:
    """Writes what a model gives the pairs and captions of a set made by hand."""
    dtype = next(model.parameters()).dtype
    tokenize = open_clip.get_tokenizer(name)
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=32), is_train=False
    )
    embedded: dict[str, dict[str, Embedded]] = {"pairs": {}, "captions": {}}

    def note(kind: str, path: Path, rows: int) -> None:
        size = path.stat().st_size
        embedded[kind][path.name] = Embedded(bytes=size, sha256=content_digest([path]), rows=rows)

    def texts(given: list[str]) -> np.ndarray:
        return model.encode_text(tokenize(given), normalize=True).half().numpy()

    parts: list[Path] = []
    with torch.no_grad(), _default_dtype(dtype):
        for path in sorted(anchors.glob("pairs/*.tar")):
            pairs = list(read_pairs(str(path)))
            pixels = torch.stack([preprocess(decode_image(pair.image)) for pair in pairs])
            images = model.encode_image(pixels, normalize=True).half().numpy()
            found = PairFeatures([p.key for p in pairs], images, texts([p.text.decode() for p in pairs]))
            write_pair_features(anchors, path, found)
            note("pairs", path, len(pairs))
        for path in sorted(anchors.glob("captions/*.parquet")):
            table = pq.read_table(path)
            captions = table["caption"].to_pylist()
            parts.append(anchors / "features" / "parts" / path.name)
            write_caption_part(parts[-1], table["id"].to_pylist(), texts(captions))
            note("captions", path, len(captions))
    join_caption_parts(anchors, parts)
    digest = weights_digest(model.state_dict())
    header = {"model": name, "weights_sha256": digest, "precision": "float32", "preprocessing": {}, "dim": 16}
    write_header(anchors, FeatureHeader(**header, **embedded))


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
