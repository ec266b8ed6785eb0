"""Captions by the million: start without a cache, ``arf check``, look-ups by several workers; thousands of classes.

python scripts/bench/captions.py --captions 5000000 --workers 4 --json runs/bench/captions.json
git worktree add ../old f6325ce && python scripts/bench/captions.py --old ../old

Start and check run in processes of their own, each with an empty cache; their memory is the most that was resident.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from common import Bar, parser, report
from PIL import Image

from arf_plugin.data.captions import CaptionStore, open_captions

BLOCK = 500_000
ROOT = Path(__file__).resolve().parents[2]
# What runs in processes of their own; each says how much memory it had.
TASKS = {
    "cold start": "from arf_plugin.data.captions import open_captions; open_captions(sys.argv[1])",
    "arf check": "from arf_plugin.cli.main import main; main(['check', sys.argv[1]])",
}
CHECK_CLASSES = (
    "from arf_plugin.cli.main import main; at = sys.argv[1]; main(['check', at, '--train-data', "
    "at + '/task/00000.tar', '--arf-classnames', at + '/names.txt', '--batch-size', '512', '--workers', '1'])"
)
MEASURED = "import sys; {}; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=5)
    args_parser.add_argument("--captions", type=int, default=5_000_000)
    args_parser.add_argument("--workers", type=int, default=4)
    args_parser.add_argument("--lookups", type=int, default=200_000, help="look-ups per worker and round")
    args_parser.add_argument("--classes", type=int, default=20_000)
    args_parser.add_argument("--starts", type=int, default=3, help="times that start and check are measured")
    args_parser.add_argument("--old", type=Path, help="a checkout to compare start and check with")
    args = args_parser.parse_args()
    checkouts = {"": ROOT} | ({"before: ": args.old.resolve()} if args.old else {})
    starts: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ARF_CACHE_DIR"] = f"{folder}/cache"
        parquet_bytes = write_captions(Path(folder), args.captions)
        for _ in range(args.starts):
            for which, checkout in checkouts.items():
                for task, code in TASKS.items():
                    seconds, peak = alone(code, folder, checkout)
                    starts.setdefault(which + task, []).append(seconds)
                    memory[which + task] = max(peak, memory.get(which + task, 0))
        write_classes(Path(folder, "classes"), args.classes)
        of_classes = [alone(CHECK_CLASSES, f"{folder}/classes", ROOT)[0] for _ in range(args.starts)]
        store = open_captions(folder)
        file_bytes = store.path.stat().st_size
        jobs = [(store.path, args.captions, args.lookups, args.rounds, seed) for seed in range(args.workers)]
        barrier = multiprocessing.Barrier(args.workers)
        with multiprocessing.get_context("fork").Pool(args.workers, _start, (barrier,)) as pool:
            workers = pool.starmap(work, jobs, chunksize=1)
    private = [grown for grown, _, _ in workers]
    seconds = [value for _, values, _ in workers for value in values]
    decoding = [value for _, _, values in workers for value in values]
    scale = args.captions / 5_000_000
    bars = [
        Bar("cold start, in seconds per 5,000,000 captions", min(starts["cold start"]) / scale, 10),
        Bar("arf check, in seconds per 5,000,000 captions", min(starts["arf check"]) / scale, 30),
        *(Bar("resident memory in GB", memory[task] / 1e9, 1.0, of=task) for task in TASKS),
        Bar("arf check, in seconds per 20,000 class names", min(of_classes) * 20_000 / args.classes, 10),
        Bar("private memory a worker adds, of the caption file", max(private) / file_bytes, 0.05),
        Bar(
            "one look-up, of decoding an image",
            statistics.median(seconds) / statistics.median(decoding),
            0.01,
        ),
    ]
    facts = {
        "captions": f"{args.captions:,}",
        "parquet": f"{parquet_bytes / 1e6:.0f} MB",
        "caption file": f"{file_bytes / 1e6:.0f} MB",
        **{f"{task}: resident memory": f"{value / 1e6:,.0f} MB" for task, value in memory.items()},
        "private memory added by each worker": ", ".join(f"{value / 1e6:.1f} MB" for value in private),
    }
    timings = starts | {f"arf check of {args.classes:,} class names": of_classes}
    timings |= {"one look-up": seconds, "decoding an image of 500 x 375": decoding}
    return report(
        "captions: start, check and look-ups", timings, bars, args.json, {"memory": memory}, **facts
    )


def alone(code: str, anchors: str, checkout: Path) -> tuple[float, float]:
    """Runs a task with an empty cache; returns its seconds and the bytes that were resident at most."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {**os.environ, "ARF_CACHE_DIR": cache, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", MEASURED.format(code), anchors]
        start = time.perf_counter()
        done = subprocess.run(
            command, env=variables, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True
        )
        return time.perf_counter() - start, 1024 * float(done.stdout.split()[-1])


def write_captions(folder: Path, count: int, ids: list[str] | None = None) -> int:
    """Writes caption anchors of realistic length, by ImageNet's ids or others; returns their size in bytes."""
    (folder / "captions").mkdir()
    total = 0
    for part, first in enumerate(range(0, count, BLOCK)):
        numbers = range(first, min(first + BLOCK, count))
        table = {
            "id": [ids[number] if ids else identity(number) for number in numbers],
            "caption": [
                f"a photo of a small brown thing with number {n} standing in tall green grass"
                for n in numbers
            ],
        }
        path = folder / "captions" / f"part-{part:05d}.parquet"
        pq.write_table(pa.table(table), path)
        total += path.stat().st_size
    return total


def write_classes(folder: Path, count: int) -> None:
    """Writes task data of so many classes, an image each, with their names and captions."""
    (folder / "task").mkdir(parents=True)
    (folder / "names.txt").write_text("".join(f"thing with number {number}\n" for number in range(count)))
    write_captions(folder, count, [f"00000/{number:09d}" for number in range(count)])
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "JPEG")
    with tarfile.open(folder / "task" / "00000.tar", "w") as tar:
        for number in range(count):
            for ext, content in (("jpg", image.getvalue()), ("cls", str(number).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


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


def work(
    path: Path, count: int, lookups: int, rounds: int, seed: int
) -> tuple[int, list[float], list[float]]:
    """Opens the captions and looks up random ids; returns the private memory that this took, and its speed.

    Between the rounds an image is decoded as often as takes a while: what else a worker does for a sample.
    """
    rng = random.Random(seed)
    timings, decoding = [], []
    noise = Image.effect_noise((500, 375), 40).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=90)
    before = private_bytes()
    store = CaptionStore(path)
    for _ in range(rounds):
        wanted = [identity(rng.randrange(count)) for _ in range(lookups)]
        start = time.process_time()  # of this worker alone: there may be fewer cores than workers
        for name in wanted:
            store.get(name)
        timings.append((time.process_time() - start) / lookups)
        del wanted
        start = time.process_time()
        for _ in range(100):
            Image.open(file).convert("RGB")
        decoding.append((time.process_time() - start) / 100)
    # A page of the mapped file counts as private while only one worker maps it: measure while all of them do.
    _barrier.wait()
    grown = private_bytes() - before
    _barrier.wait()
    return grown, timings, decoding


if __name__ == "__main__":
    sys.exit(main())
