"""Exact search of a large pool within --memory: by one process, and by the parts of a SLURM array.

python scripts/bench/pool.py --json runs/bench/pool.json          11 GB of disk in $TMPDIR, half an hour on two cores
python scripts/bench/pool.py --rows 100000 --queries 64           a try

Vectors are random directions in fp16, written as ``arf embed`` writes them. Each search is ``arf retrieve`` in a
process of its own; the array's tasks run one after the other, each told its number as SLURM tells it. Pages of the
pool's files, which the system may drop at any time, are no memory that a search allocates, so anonymous memory counts.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import Bar, parser, report
from retrieve import write_vectors

from arf_plugin.cli.options import byte_size
from arf_plugin.console import text_table

BEYOND = (100_000_000, 1_000_000_000)  # rows that are projected to


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=1)
    args_parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    args_parser.add_argument("--queries", type=int, default=1024)
    args_parser.add_argument("--dimension", type=int, default=512)
    args_parser.add_argument("--memory", default="1G", help="as of arf retrieve")
    args_parser.add_argument("--tasks", type=int, default=4, help="of the array")
    args = args_parser.parse_args()
    seconds: dict[str, list[float]] = {}
    bars, found = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in range(args.tasks):  # a file of queries is a shard of the stage
            write_vectors(
                folder / "parts" / str(part), args.queries // args.tasks, args.dimension, seed=part + 1
            )
        _merge(folder / "parts", folder / "queries")
        started = folder / "started"
        write_vectors(started, 1000, args.dimension, seed=0)
        base = retrieve(folder / "queries", started, folder / "base", args.memory)[1]
        for rows in args.rows:
            pool = folder / str(rows)
            write_vectors(pool, rows, args.dimension, seed=0)
            taken, peak = retrieve(folder / "queries", pool, folder / f"whole-{rows}", args.memory)
            tasks = [
                retrieve(folder / "queries", pool, folder / f"array-{rows}", args.memory, (task, args.tasks))
                for task in range(args.tasks)
            ]
            same = _hits(folder / f"whole-{rows}") == _hits(folder / f"array-{rows}")
            seconds[f"{rows:,} rows, one process"] = [taken]
            seconds[f"{rows:,} rows, a task of {args.tasks}"] = [one for one, _ in tasks]
            added = max(peak, *(one for _, one in tasks)) - base
            found.append(
                {"rows": rows, "seconds": taken, "memory": added, "tasks": [one for one, _ in tasks]}
            )
            bars.append(
                Bar(
                    "memory that a search adds, of --memory",
                    added / byte_size(args.memory),
                    1.0,
                    of=f"{rows:,} rows",
                )
            )
            bars.append(
                Bar(
                    "the array's parts are the whole, byte for byte",
                    float(same),
                    1.0,
                    False,
                    f"{rows:,} rows",
                )
            )
    lines = [
        [
            f"{f['rows']:,}",
            f"{f['seconds']:.1f} s",
            f"{1e6 * f['seconds'] / f['rows']:.2f} s",
            f"{f['memory'] / 2**20:.0f} MiB",
        ]
        for f in found
    ]
    last = found[-1]
    rate = last["seconds"] / last["rows"]
    lines += [
        [f"{rows:,} (projected)", _time(rate * rows), f"{1e6 * rate:.2f} s", "the same"] for rows in BEYOND
    ]
    print(text_table([f"rows ({args.queries} queries)", "time", "per million rows", "memory"], lines))
    facts: dict[str, object] = {"queries": args.queries, "dimension": args.dimension, "memory": args.memory}
    if len(found) > 1:
        first = found[-2]
        growth = math.log(last["seconds"] / first["seconds"]) / math.log(last["rows"] / first["rows"])
        bars.append(Bar("exponent of time in rows", growth, 1.1))
    return report("pool: exact search of a large pool", seconds, bars, args.json, found, **facts)


def _merge(parts: Path, folder: Path) -> None:
    """One embedding folder with a file of each part."""
    for kind in ("img_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
        for part in parts.iterdir():
            for path in (part / kind).iterdir():
                path.rename(folder / kind / path.name.replace("_0000", f"_{int(part.name):04d}"))


def retrieve(
    queries: Path, pool: Path, out: Path, memory: str, task: tuple[int, int] | None = None
) -> tuple[float, int]:
    """Seconds and the largest anonymous memory in bytes of one ``arf retrieve``, as a task of an array or alone."""
    array = {} if task is None else {
        "SLURM_ARRAY_TASK_ID": str(task[0]), "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": str(task[1])
    }  # fmt: skip
    words = [
        "retrieve",
        "--queries",
        queries,
        "--pool",
        pool,
        "--out",
        out,
        "--memory",
        memory,
        "--device",
        "cpu",
    ]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "arf_plugin.cli.main", *map(str, words), "--quiet"],
        env={**os.environ, **array}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    peak, ended = [0], threading.Event()

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while not ended.wait(0.05):
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak[0] = max(peak[0], 1024 * int(line.split()[1]))

    thread = threading.Thread(target=watch)
    thread.start()
    code = process.wait()
    ended.set()
    thread.join()
    if code:
        raise SystemExit(f"arf retrieve has failed ({code})")
    return time.perf_counter() - start, peak[0]


def _hits(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in [*sorted((out / "hits").iterdir()), out / "pairs.parquet"]
    }


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
