"""Looking at task data before the first step, by headers alone, against another version of this package.

git worktree add ../old 472e89c && python scripts/bench/scan.py --old ../old --json runs/bench/scan.json
python scripts/bench/scan.py --old ../old --samples 1000000 --texts --rounds 3

Each call begins with an empty cache, and writes it. Both versions work in a process of their own, in turn.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import Bar, interleave, paired_ratio, parser, report

PER_SHARD = 10_000

# One call per line of input: an empty folder for the cache.
WORKER = """
import os, sys
from arf_plugin.anchors.task import scan_task_ids
for line in sys.stdin:
    os.environ["ARF_CACHE_DIR"] = line.strip()
    print(len(scan_task_ids(sys.argv[1]).ids), flush=True)
"""


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=7)
    args_parser.add_argument("--old", type=Path, required=True, help="a checkout to compare with")
    args_parser.add_argument("--samples", type=int, default=200_000)
    args_parser.add_argument("--bytes", type=int, default=2_000, help="per image")
    args_parser.add_argument("--texts", action="store_true", help="samples have a txt, too")
    args = args_parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_tars(folder / "task", args.samples, args.bytes, args.texts)
        checkouts = {"before": args.old.resolve(), "now": Path(__file__).resolve().parents[2]}
        workers = {which: start(checkout, data) for which, checkout in checkouts.items()}
        calls = {which: scan(worker, folder, args.samples) for which, worker in workers.items()}
        seconds = interleave(calls, args.rounds)
        for worker in workers.values():
            worker.communicate()
    ratio = paired_ratio(seconds["now"], seconds["before"])
    bars = [Bar("time for a scan by headers, of what it took before", ratio, 1.3)]
    facts = {
        "samples": f"{args.samples:,} of jpg, cls{' and txt' if args.texts else ''}",
        "now, per million samples": f"{min(seconds['now']) / args.samples * 1e6:.1f} s",
    }
    return report("scan: looking at tars by their headers", seconds, bars, args.json, **facts)


def write_tars(folder: Path, samples: int, size: int, texts: bool) -> str:
    """Writes task data whose images look whole; returns its name with braces."""
    folder.mkdir()
    image = b"\xff\xd8" + os.urandom(size - 4) + b"\xff\xd9"
    shards = -(-samples // PER_SHARD)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * PER_SHARD, min(samples, (shard + 1) * PER_SHARD)):
                members = {"cls": str(number % 1000).encode(), "jpg": image}
                if texts:
                    members["txt"] = f"a photo with the number {number}".encode()
                for ext, content in members.items():
                    info = tarfile.TarInfo(f"{number:09d}.{ext}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def start(checkout: Path, data: str) -> subprocess.Popen[str]:
    """Starts a process that scans the data with a checkout's package, whenever it is told to."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, data],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def scan(worker: subprocess.Popen[str], folder: Path, samples: int) -> Callable[[], None]:
    """A call that lets a process scan the data."""

    def call() -> None:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(tempfile.mkdtemp(dir=folder) + "\n")
        worker.stdin.flush()
        found = worker.stdout.readline().strip()
        assert found == str(samples), found

    return call


if __name__ == "__main__":
    sys.exit(main())
