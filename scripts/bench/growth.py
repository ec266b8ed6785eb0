"""How the time of each stage grows: at n, 10 n and 100 n samples, with the exponent over the last factor of ten.

OMP_NUM_THREADS=2 python scripts/bench/growth.py --samples 1000 --json runs/bench/growth.json
python scripts/bench/growth.py --samples 20

The stages run as their commands do, in this process, on made data; the first run of each, on n samples, is not
counted, so that libraries are loaded. What a stage takes whatever the number of samples makes small exponents of small
sizes: an exponent counts where the last time is seconds. Queries of the search are --queries at every size.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from captions import write_captions
from common import Bar, parser, report
from PIL import Image

from arf_plugin.anchors.task import scan_task_ids
from arf_plugin.checks.inputs import Inputs, Run
from arf_plugin.cli.main import main as arf
from arf_plugin.console import markdown_table
from arf_plugin.data.startup import check_inputs
from arf_plugin.pipeline.caption_cleaning import Cleaning
from arf_plugin.pipeline.embeddings import Embeddings
from arf_plugin.pipeline.near import exact_duplicates, near_duplicates
from arf_plugin.pipeline.retrieve import Selection, candidates, ordered, select

PER_SHARD = 1000
MOST = 1.1  # exponent that needs no explanation


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=1)
    args_parser.add_argument("--samples", type=int, default=50, help="n")
    args_parser.add_argument("--factors", type=int, nargs="+", default=[1, 10, 100])
    args_parser.add_argument("--queries", type=int, default=20)
    args = args_parser.parse_args()
    sizes = [args.samples * factor for factor in args.factors]
    timed: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model, queries = save_clip(root / "clip"), write_tars(root / "task", args.queries, seed=1)
        for number, size in enumerate([sizes[0], *sizes]):  # the first loads the libraries
            os.environ["ARF_CACHE_DIR"] = f"{root}/cache-{number}"
            for stage, run in stages(root / str(number), size, model, queries).items():
                seconds = []
                for _ in range(args.rounds if stage in REPEATABLE else 1):
                    start = time.perf_counter()
                    with contextlib.redirect_stdout(io.StringIO()):
                        assert not run(), f"{stage} of {size} samples failed"
                    seconds.append(time.perf_counter() - start)
                timed.setdefault(stage, {})[size] = min(seconds)
    exponents = {stage: exponent(of_size) for stage, of_size in timed.items()}
    header = ["stage", *(f"{size:,} samples, s" for size in sizes), "exponent"]
    lines = [
        [stage, *(f"{of_size[size]:.3g}" for size in sizes), f"{exponents[stage]:.2f}"]
        for stage, of_size in timed.items()
    ]
    print(markdown_table(header, lines))
    bars = [Bar("exponent of time", found, MOST, of=stage) for stage, found in exponents.items()]
    data = {"sizes": sizes, "seconds": timed, "exponents": exponents}
    return report("growth of each stage's time", {}, bars, args.json, data, queries=args.queries)


REPEATABLE = ("select", "near-duplicates", "caption cleaning")


def stages(root: Path, size: int, model: str, queries: str) -> dict[str, Callable[[], object]]:
    """Makes data of a size; returns what runs each stage on it, in order, and gives 0 or nothing if all is well."""
    pool = write_tars(root / "pool", size, seed=0)
    (root / "set").mkdir()
    write_captions(root / "set", size, [identity_of(i) for i in range(size)])
    embed = ["embed", "--model", model, "--device", "cpu", "--workers", "0"]
    run = Run(batch_size=1, epochs=1, lr=1e-5)

    def command(*words: object) -> Callable[[], object]:
        return lambda: arf([*map(str, words)])

    def start_of_training() -> None:
        inputs = Inputs(
            str(root / "set"), train_data=pool, texts_known=True, classes=["a", "b"], training=True
        )
        inputs.run = run
        check_inputs(inputs)

    def choose() -> None:
        rng = np.random.default_rng(0)
        columns = (np.arange(10 * size) // 10, rng.integers(size, size=10 * size), rng.random(10 * size))
        hits = ordered(pd.DataFrame(dict(zip(("query", "row", "similarity"), columns, strict=True))))
        select(hits, Selection(max_pairs=size))
        exact_duplicates(Embeddings(root / "emb"), candidates(hits))

    def without_near() -> None:
        near_duplicates(Embeddings(root / "vectors"), np.arange(size), 0.95, torch.device("cpu"))

    def clean() -> None:
        cleaning = Cleaning()
        for i in range(size):
            cleaning(f"there is a photo of a photo of a photo of thing {i} in in in tall green grass")

    write_vectors(root / "vectors", size)
    retrieve = ["retrieve", "--queries", root / "queries", "--pool", root / "emb", "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert not command(*embed, "--pool", queries, "--out", root / "queries")()
    return {
        "embed": command(*embed, "--pool", pool, "--out", root / "emb"),
        "index": command("index", "--embeddings", root / "emb", "--out", root / "index"),
        "retrieve": command(*retrieve, "--k", max(10, size // 20), "--out", root / "hits"),
        "select": choose,
        "near-duplicates": without_near,
        "pack": command("pack", "--retrieved", root / "hits", "--out", root / "packed"),
        "caption cleaning": clean,
        "scan": lambda: len(scan_task_ids(pool).ids) - size,
        "start of training": start_of_training,
        "check": command("check", root / "set", "--train-data", pool),
    }


def exponent(seconds: dict[int, float]) -> float:
    """The slope of the logarithms over the last two sizes."""
    (small, before), (large, after) = sorted(seconds.items())[-2:]
    return math.log(after / before) / math.log(large / small)


def identity_of(number: int) -> str:
    """The id of a sample of `write_tars`."""
    return f"{number // PER_SHARD:05d}/{number:09d}"


def write_tars(folder: Path, samples: int, seed: int) -> str:
    """Writes made images of 32 x 32 pixels with texts and classes, `PER_SHARD` a tar; returns their name in braces."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for shard, first in enumerate(range(0, samples, PER_SHARD)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(first, min(samples, first + PER_SHARD)):
                image = io.BytesIO()
                Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(image, "JPEG")
                parts = {
                    "cls": str(number % 2),
                    "jpg": image.getvalue(),
                    "txt": f"a thing with number {number}",
                }
                for ext, content in parts.items():
                    content = content.encode() if isinstance(content, str) else content
                    info = tarfile.TarInfo(f"{number:09d}.{ext}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{00000..{(samples - 1) // PER_SHARD:05d}}}.tar"


def write_vectors(folder: Path, rows: int, dimension: int = 64) -> None:
    """Writes an embedding folder of random directions: an untrained model's are all near each other."""
    vectors = np.random.default_rng(0).standard_normal((rows, dimension), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", vectors.astype(np.float16))
    table = pa.table({"image_path": [str(row) for row in range(rows)]})
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet")


def save_clip(folder: Path) -> str:
    """A tiny CLIP with random weights; returns its name."""
    import open_clip
    from safetensors.torch import save_file

    model = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    weights = {name: value.contiguous() for name, value in open_clip.CLIP(**model).state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"


if __name__ == "__main__":
    sys.exit(main())
