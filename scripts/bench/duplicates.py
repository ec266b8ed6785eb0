"""Near-duplicates by an index against all pairs: time, memory, and how many planted copies are found.

OMP_NUM_THREADS=2 python scripts/bench/duplicates.py --json runs/bench/duplicates.json
python scripts/bench/duplicates.py --rows 20000 50000 --exact 50000

Vectors are random directions, the hardest case for an index, and the given fraction of them copies of others at
cosines from the threshold to 1. Each size runs in a process of its own. Growth is the exponent between the last two.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Bar, parser, report

from arf_plugin.console import text_table
from arf_plugin.pipeline import near
from arf_plugin.pipeline.embeddings import Embeddings

ROWS_PER_FILE = 100_000


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=1)
    args_parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    args_parser.add_argument("--dimension", type=int, default=512)
    args_parser.add_argument("--copies", type=float, default=0.05, help="fraction of the rows")
    args_parser.add_argument(
        "--similarity", type=float, default=0.95, help="least cosine of a near-duplicate"
    )
    args_parser.add_argument(
        "--exact", type=int, default=100_000, help="most rows that all pairs are compared of"
    )
    args_parser.add_argument("--one", help="for this program itself: folder, kind of search")
    args = args_parser.parse_args()
    if args.one:
        return one(Path(args.one.split(":")[0]), args.one.split(":")[1], args.similarity)
    found: list[dict[str, object]] = []
    seconds: dict[str, list[float]] = {}
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            originals = write(folder, rows, args.dimension, args.copies, args.similarity)
            dropped = {}
            for kind in ["index", "exclusion", *(["all pairs"] if rows <= args.exact else [])]:
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    f"{name}:{kind}",
                    "--similarity",
                    str(args.similarity),
                ]
                for _ in range(args.rounds):
                    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                    seconds.setdefault(f"{rows:,} rows, {kind}", []).append(result["seconds"])
                dropped[kind] = {row: near for row, near in result["dropped"]}
                right = sum(
                    dropped[kind].get(row) == near for row, near in originals[kind == "exclusion"].items()
                )
                wanted = len(originals[kind == "exclusion"])
                line = {"rows": rows, "kind": kind, "seconds": result["seconds"], "memory": result["memory"]}
                found.append(
                    line | {"planted": wanted, "recall": right / wanted, "dropped": len(dropped[kind])}
                )
            if "all pairs" in dropped:
                found[-1]["agreement"] = len(dropped["index"].keys() & dropped["all pairs"].keys()) / len(
                    dropped["all pairs"].keys() | dropped["index"].keys()
                )
    print(
        text_table(
            ["rows", "kind", "seconds", "GB", "planted", "dropped", "recall"],
            [
                (
                    f"{f['rows']:,}",
                    f["kind"],
                    f"{f['seconds']:.1f}",
                    f"{f['memory'] / 1e9:.2f}",
                    f"{f['planted']:,}",
                    f"{f['dropped']:,}",
                    f"{f['recall']:.5f}",
                )
                for f in found
            ],
        )
    )
    bars = [
        Bar(
            f"{f['kind']}: recall of planted copies",
            f["recall"],
            0.999,
            at_most=False,
            of=f"{f['rows']:,} rows",
        )
        for f in found
        if f["kind"] != "all pairs"
    ]
    bars += [
        Bar(
            "rows that index and all pairs drop alike",
            f["agreement"],
            0.999,
            at_most=False,
            of=f"{f['rows']:,} rows",
        )
        for f in found
        if "agreement" in f
    ]
    facts: dict[str, object] = {
        "dimension": args.dimension,
        "similarity": args.similarity,
        "copies": args.copies,
    }
    index = [f for f in found if f["kind"] == "index"]
    for before, after in itertools.pairwise(index):
        growth = math.log(after["seconds"] / before["seconds"]) / math.log(after["rows"] / before["rows"])
        facts[f"exponent of time from {before['rows']:,} to {after['rows']:,} rows"] = f"{growth:.2f}"
    return report("duplicates: an index against all pairs", seconds, bars, args.json, found, **facts)


def write(
    folder: Path, rows: int, dimension: int, copies: float, similarity: float
) -> tuple[dict[int, int], dict[int, int]]:
    """Writes a pool of vectors in fp16 and as many excluded images; returns the planted copies of both.

    Returns:
        Row to the row that it copies; row of the pool to the excluded image that copies it.
    """
    rng = np.random.default_rng(0)
    planted = round(copies * rows)
    places = rng.permutation(rows)[: 2 * planted].reshape(2, -1)
    originals, copied = places.min(axis=0), places.max(axis=0)  # a copy comes after its original
    shown = rng.permutation(np.setdiff1d(np.arange(rows), copied))[:planted]  # by excluded images
    excluded = rng.permutation(rows)[:planted]
    for name in ("pool", "excluded"):
        for part in ("img_emb", "metadata"):
            (folder / name / part).mkdir(parents=True)
    # The vectors of a row are a function of its number, so that no array holds all of them.
    of_copy, of_excluded = dict(zip(copied, originals, strict=True)), dict(zip(excluded, shown, strict=True))
    for number, start in enumerate(range(0, rows, ROWS_PER_FILE)):
        span = range(start, min(start + ROWS_PER_FILE, rows))
        for name, source, stream in (("pool", of_copy, 0), ("excluded", of_excluded, 1)):
            vectors = np.stack([vector(row, source.get(row), stream, dimension, similarity) for row in span])
            np.save(folder / name / "img_emb" / f"img_emb_{number:04d}.npy", vectors.astype(np.float16))
            table = pa.table({"image_path": [str(row) for row in span], "id": [str(row) for row in span]})
            pq.write_table(table, folder / name / "metadata" / f"metadata_{number:04d}.parquet")
    pool_copies = {int(copy): int(original) for copy, original in of_copy.items()}
    return pool_copies, {int(row): int(image) for image, row in of_excluded.items()}


def vector(row: int, original: int | None, stream: int, dimension: int, similarity: float) -> np.ndarray:
    """A random direction [dimension], or one at a random cosine, of at least the threshold, to that of a pool's row."""
    rng = np.random.default_rng([stream, row])
    found = unit(rng.standard_normal(dimension, np.float32))
    if original is None:
        return found
    other = vector(original, None, 0, dimension, similarity)
    across = unit(found - (found @ other) * other)
    cosine = rng.uniform(similarity + 0.001, 1)  # a little above the threshold, for the rounding of fp16
    return cosine * other + math.sqrt(1 - cosine**2) * across


def unit(vector: np.ndarray) -> np.ndarray:
    """The direction of a vector."""
    return vector / np.linalg.norm(vector)


def one(folder: Path, kind: str, similarity: float) -> int:
    """Looks for near-duplicates, or excluded images, in one way; prints what it took and found."""
    import torch

    pool, device = Embeddings(folder / "pool"), torch.device("cpu")
    rows = np.arange(pool.rows)
    near.EXACT = {"cpu": pool.rows if kind == "all pairs" else 0}
    start = time.perf_counter()
    if kind == "exclusion":
        found = near.Exclusion((Embeddings(folder / "excluded"),), similarity).near(pool, rows, device)
    else:
        found = near.near_duplicates(pool, rows, similarity, device)
    seconds = time.perf_counter() - start
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    dropped = [(item.row, int(str(item.near).split(":")[-1])) for item in found]
    print(json.dumps({"seconds": seconds, "memory": peak, "dropped": dropped}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
