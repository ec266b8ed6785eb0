"""Memory and speed of caption look-ups: millions of captions, mapped by several loader workers.

python scripts/bench/captions.py --captions 5000000 --workers 4 --json runs/bench/captions.json
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from common import Bar, parser, report

from arf_plugin.data.captions import CaptionStore, open_captions

BLOCK = 500_000


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=5)
    args_parser.add_argument("--captions", type=int, default=5_000_000)
    args_parser.add_argument("--workers", type=int, default=4)
    args_parser.add_argument("--lookups", type=int, default=200_000, help="look-ups per worker and round")
    args = args_parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ARF_CACHE_DIR"] = f"{folder}/cache"
        parquet_bytes = write_captions(Path(folder), args.captions)
        start = time.perf_counter()
        store = open_captions(folder)
        build = time.perf_counter() - start
        file_bytes = store.path.stat().st_size
        jobs = [(store.path, args.captions, args.lookups, args.rounds, seed) for seed in range(args.workers)]
        barrier = multiprocessing.Barrier(args.workers)
        with multiprocessing.get_context("fork").Pool(args.workers, _start, (barrier,)) as pool:
            workers = pool.starmap(work, jobs, chunksize=1)
    private = [grown for grown, _ in workers]
    seconds = [value for _, values in workers for value in values]
    bars = [
        Bar("private memory a worker adds, of the caption file", max(private) / file_bytes, 0.05),
        Bar("median look-up in microseconds of processor time", 1e6 * statistics.median(seconds), 10),
    ]
    facts = {
        "captions": f"{args.captions:,}",
        "parquet": f"{parquet_bytes / 1e6:.0f} MB",
        "caption file": f"{file_bytes / 1e6:.0f} MB, built once in {build:.1f} s",
        "private memory added by each worker": ", ".join(f"{value / 1e6:.1f} MB" for value in private),
    }
    return report("captions: look-ups in loader workers", {"one look-up": seconds}, bars, args.json, **facts)


def write_captions(folder: Path, count: int) -> int:
    """Writes caption anchors of realistic length; returns their size in bytes."""
    (folder / "captions").mkdir()
    total = 0
    for part, first in enumerate(range(0, count, BLOCK)):
        numbers = range(first, min(first + BLOCK, count))
        table = {
            "id": [identity(number) for number in numbers],
            "caption": [
                f"a photo of a small brown thing with number {n} standing in tall green grass"
                for n in numbers
            ],
        }
        path = folder / "captions" / f"part-{part:05d}.parquet"
        pq.write_table(pa.table(table), path)
        total += path.stat().st_size
    return total


def identity(number: int) -> str:
    """The id of a task sample."""
    return f"imagenet-train-{number // 10_000:06d}/{number:09d}"


def private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


_barrier = None


def _start(barrier) -> None:
    global _barrier
    _barrier = barrier


def work(path: Path, count: int, lookups: int, rounds: int, seed: int) -> tuple[int, list[float]]:
    """Opens the captions and looks up random ids; returns the private memory that this took, and its speed."""
    rng = random.Random(seed)
    timings = []
    before = private_bytes()
    store = CaptionStore(path)
    for _ in range(rounds):
        wanted = [identity(rng.randrange(count)) for _ in range(lookups)]
        start = time.process_time()  # of this worker alone: there may be fewer cores than workers
        for name in wanted:
            store.get(name)
        timings.append((time.process_time() - start) / lookups)
        del wanted
    # A page of the mapped file counts as private while only one worker maps it: measure while all of them do.
    _barrier.wait()
    grown = private_bytes() - before
    _barrier.wait()
    return grown, timings


if __name__ == "__main__":
    sys.exit(main())
