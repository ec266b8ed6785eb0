"""Loading task data and anchors against open_clip's own loader: the same files, as many images, as many workers.

Both are built by the trainer's ``get_data``, ours with the hook around it: task tars with captions to join on the one
hand and pair tars on the other. open_clip's own loader reads the same tars as one data set, in batches of B + A.

Loading ends where the main process has a batch. The trainer then moves it to its device, where ARF's two tensors of
images become one. On a GPU that is a copy within its memory; a run on CPUs pays for it in the time told separately.

ARF has a third text for every two to tokenize, all of them in the workers of the task data. With one such worker and
one for pairs (--workers 2) the latter waits for the former at the end; with the trainer's default of four, the cores
even that out.

    python scripts/bench/loader.py --workers 1 2 4 8 --json runs/bench/loader.json
"""

from __future__ import annotations

import io
import logging
import os
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import Bar, interleave, paired_ratio, parser, report
from open_clip.transform import image_transform
from open_clip_train.data import get_data
from open_clip_train.params import parse_args
from PIL import Image

from arf_plugin.config import ArfConfig
from arf_plugin.hooks import data as hooked
from arf_plugin.hooks.session import Session
from arf_plugin.hooks.table import upstream_version

JOINED = "ARF, images joined on the CPU"


def main() -> int:
    flags = parser(__doc__.split("\n")[0], rounds=7)
    flags.add_argument("--images", type=int, default=2048, help="of the task; the pairs are as many")
    flags.add_argument("--size", type=int, default=256, help="pixels of the longer side")
    flags.add_argument("--shards", type=int, default=8, help="tars of each")
    flags.add_argument("--batch-size", type=int, default=64, help="B = A")
    flags.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="loader workers in all, as --workers of the trainer",
    )
    args = flags.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    seconds: dict[str, list[float]] = {}
    bars: list[Bar] = []
    facts: dict[str, object] = {
        "images": f"{args.images} of the task and {args.images} of pairs, {args.size} pixels, {args.shards} tars each"
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ARF_CACHE_DIR"] = str(folder / "cache")
        write(folder, args.images, args.shards, args.size)
        task, pairs = (
            f"{folder}/{part}/{{0000..{args.shards - 1:04d}}}.tar" for part in ("task", "anchors/pairs")
        )
        config = ArfConfig(anchors=str(folder / "anchors"))
        for workers in args.workers:
            ours = loader(task, args.images, args.batch_size, workers, config)
            own = loader(f"{task}::{pairs}", 2 * args.images, 2 * args.batch_size, workers, None)
            counts: dict[str, list[int]] = {"open_clip": [], "ARF": [], JOINED: []}
            runs = {
                name: epoch(own if name == "open_clip" else ours, made, name == JOINED)
                for name, made in counts.items()
            }
            taken = interleave(runs, args.rounds)
            rates = {
                name: [count / time for count, time in zip(counts[name][1:], times, strict=True)]
                for name, times in taken.items()
            }
            of = f"{workers} worker{'s' * (workers > 1)}"
            share = paired_ratio(rates["ARF"], rates["open_clip"])
            bars.append(Bar("images/s of ARF / open_clip", share, 0.98, at_most=False, of=of))
            seconds |= {f"{of}: {name}": times for name, times in taken.items()}
            facts[f"{of}: images per epoch"] = ", ".join(
                f"{name} {made[-1]}" for name, made in counts.items()
            )
            facts[f"{of}: images/s"] = ", ".join(
                f"{name} {statistics.median(made):.1f}" for name, made in rates.items()
            )
    return report("loader: one epoch, workers running", seconds, bars, args.json, **facts)


def loader(urls: str, images: int, batch_size: int, workers: int, config: ArfConfig | None) -> Callable:
    """The trainer's training data, with anchors or as open_clip has them; begins an epoch at each call."""
    argv = ["--train-data", urls, "--train-num-samples", images, "--batch-size", batch_size]
    argv += ["--workers", workers, "--dataset-type", "webdataset", "--device", "cpu"]
    args = parse_args(list(map(str, argv)))
    args.distributed, args.rank, args.world_size = False, 0, 1
    build = get_data
    if config is not None:
        session = Session(config, upstream_version())
        build = hooked.get_data(get_data, session)
    transforms = image_transform(224, is_train=True), image_transform(224, is_train=False)
    made = build(args, transforms, epoch=0, tokenizer=open_clip.get_tokenizer("ViT-B-32"))["train"]
    numbers = iter(range(1 << 30))

    def begin():
        made.set_epoch(next(numbers))
        return made.dataloader

    return begin


def epoch(begin: Callable, counts: list[int], move: bool = False) -> Callable[[], None]:
    """Loads one epoch, and moves its images if asked to; notes how many there were."""

    def run() -> None:
        counts.append(sum(len(images.to("cpu") if move else images) for images, _ in begin()))

    return run


def write(folder: Path, images: int, shards: int, size: int) -> None:
    """Tars of photograph-like JPEGs with texts, the same images as task data and as pairs, and captions."""
    (folder / "anchors" / "captions").mkdir(parents=True)
    ids: list[str] = []
    for part in ("task", "anchors/pairs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with (
            tarfile.open(folder / "task" / f"{shard:04d}.tar", "w") as task,
            tarfile.open(folder / "anchors" / "pairs" / f"{shard:04d}.tar", "w") as pairs,
        ):
            for number in range(shard, images, shards):
                ids.append(f"{shard:04d}/{number:06d}")
                for suffix, content in (("jpg", jpeg(number, size)), ("txt", f"a text {number}".encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(content)
                    for tar in (task, pairs):
                        tar.addfile(info, io.BytesIO(content))
    captions = pa.table({"id": ids, "caption": [f"a caption of {identity}" for identity in ids]})
    pq.write_table(captions, folder / "anchors" / "captions" / "part-00000.parquet")


def jpeg(seed: int, size: int) -> bytes:
    """Smooth colours with some grain, about as large as a photograph's."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((size, size * 3 // 4))
    grain = rng.normal(0, 12, (size * 3 // 4, size, 1))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
