"""Retrieval against the bare operations it is made of: torch, faiss, and requests to a knn service.

OMP_NUM_THREADS=2 python scripts/bench/retrieve.py --json runs/bench/retrieve.json
python scripts/bench/retrieve.py --rows 100000 --rounds 5 --backends exact
python scripts/bench/retrieve.py --rows --service-url http://127.0.0.1:1234 --service-queries EMB/task

The stage's side of each comparison is what ``arf retrieve`` does per file of queries: it reads the vectors from disk,
checks the queries, searches, and writes the hits. The bare side has all vectors in memory and writes nothing; only
faiss has the same memory-mapped index on both sides, and the cost of mapping it is shown beside.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import Bar, interleave, paired_ratio, parser, report
from tqdm import tqdm

from arf_plugin.cli.options import byte_size
from arf_plugin.pipeline.embeddings import Embeddings
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.knn import block_sizes
from arf_plugin.pipeline.knn_backends import Search
from arf_plugin.pipeline.retrieve import RetrieveStage, Selection
from arf_plugin.pipeline.runner import describe

ROWS_PER_FILE = 100_000


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=3)
    args_parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000], help="pool sizes")
    args_parser.add_argument("--queries", type=int, default=1024)
    args_parser.add_argument("--dimension", type=int, default=512)
    args_parser.add_argument("--k", type=int, default=10)
    args_parser.add_argument("--memory", type=byte_size, default=byte_size("1G"), help="as of arf retrieve")
    args_parser.add_argument("--backends", nargs="*", default=["exact", "faiss"], choices=("exact", "faiss"))
    args_parser.add_argument("--service-url", help="a running knn service; without it that part is left out")
    args_parser.add_argument("--service-index", help="name of its index")
    args_parser.add_argument("--service-queries", type=Path, help="embedding folder with queries for it")
    args = args_parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    seconds: dict[str, list[float]] = {}
    bars: list[Bar] = []
    facts: dict[str, object] = {"queries": args.queries, "k": args.k, "threads": threads}
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            name = f"{rows:,} x {args.dimension}"
            write_vectors(Path(folder) / "pool", rows, args.dimension, seed=0)
            write_vectors(Path(folder) / "queries", args.queries, args.dimension, seed=1)
            if "exact" in args.backends:
                facts[f"{name}: peak memory"], found = measure_memory(Path(folder), args)
                bars.append(Bar("peak memory of exact search, of --memory", found, 1.0, of=name))
                compare("exact", "torch", name, exact(Path(folder), args), 0.9, args, seconds, bars, facts)
            if "faiss" in args.backends:
                compare("faiss", "faiss", name, flat(Path(folder), args), 0.95, args, seconds, bars, facts)
    if args.service_url and args.service_queries:
        # The service's own speed wanders by 10% within seconds: many short rounds, so that both sides see the same.
        args = argparse.Namespace(**vars(args) | {"queries": 40, "rounds": max(30, args.rounds)})
        compare("service", "requests", "service", service(args), 0.95, args, seconds, bars, facts)
    else:
        facts["service"] = "left out: give --service-url and --service-queries"
    return report("retrieve: cost of a search", seconds, bars, args.json, **facts)


def compare(what, bare, name, variants, bound, args, seconds, bars, facts) -> None:
    """Times the stage against the bare operation and adds its bar."""
    timed = interleave(variants, args.rounds)
    ours, theirs, *_ = timed.values()
    seconds |= {f"{name}: {variant}": values for variant, values in timed.items()}
    ratio = paired_ratio(theirs, ours)
    bars.append(Bar(f"{what} search, of the rate of bare {bare}", ratio, bound, at_most=False, of=name))
    for variant, values in timed.items():
        cost = 1e3 * statistics.median(values) / args.queries
        facts[f"{name}: {variant}, cost per query"] = f"{cost:.3f} ms"


def write_vectors(folder: Path, rows: int, dimension: int, seed: int) -> None:
    """Writes an embedding folder of random directions, fp16 as the stage embed stores them."""
    rng = np.random.default_rng(seed)
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    starts = range(0, rows, ROWS_PER_FILE)
    for part, start in enumerate(tqdm(starts, desc="vectors", disable=not sys.stderr.isatty())):
        count = min(ROWS_PER_FILE, rows - start)
        vectors = rng.standard_normal((count, dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder / f"img_emb/img_emb_{part:04d}.npy", vectors.astype(np.float16))
        table = pa.table({"image_path": [f"{start + i:09d}" for i in range(count)]})
        pq.write_table(table, folder / f"metadata/metadata_{part:04d}.parquet")


def search(folder: Path, args, **how) -> Callable[[], object]:
    """The stage, ready to process its shards: the search of all queries and the writing of the hits."""
    stage = RetrieveStage(
        folder / "hits",
        Embeddings(folder / "queries"),
        Embeddings(folder / "pool"),
        Selection(k=args.k),
        search=Search(memory=args.memory, **how),
    )
    shards = stage.plan()
    execution = Execution(device="cpu")
    stage.prepare(execution)
    return lambda: [stage.process(shard, execution, lambda count: None) for shard in shards]


def exact(folder: Path, args) -> dict[str, Callable[[], object]]:
    """The exact search, and the plainest loop of matrix products and top-k with the same blocks."""
    pool = torch.from_numpy(np.concatenate([np.load(p) for p in sorted(folder.glob("pool/img_emb/*.npy"))]))
    queries = torch.from_numpy(np.load(folder / "queries/img_emb/img_emb_0000.npy"))
    at_once, block = block_sizes(args.memory, args.dimension, args.k)

    def bare() -> None:
        for some in queries.split(at_once):
            query = some.float()
            found = [(query @ part.float().T).topk(args.k, dim=1) for part in pool.split(block)]
            torch.cat([part.values for part in found], dim=1).topk(args.k, dim=1)

    return {"arf exact": search(folder, args), "bare torch": bare}


def measure_memory(folder: Path, args) -> tuple[str, float]:
    """Peak of resident memory that a search adds to a process that has searched a little before."""
    first = Path(tempfile.mkdtemp(dir=folder))
    for name in ("pool", "queries"):
        write_vectors(first / name, 300, args.dimension, seed=2)
    search(first, args)()  # loads what a search needs, beside the blocks
    run = search(folder, args)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    grown = status("VmHWM") - before
    return f"{grown / 2**20:.0f} MiB of {args.memory / 2**20:.0f}", grown / args.memory


def status(name: str) -> int:
    """A memory figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def flat(folder: Path, args) -> dict[str, Callable[[], object]]:
    """The stage on a faiss index, and faiss's own search."""
    import faiss

    from arf_plugin.pipeline.index import IndexStage
    from arf_plugin.pipeline.runner import run_stage

    pool = Embeddings(folder / "pool")
    stage = IndexStage(folder / "index", pool)
    if not describe(stage)["shards_done"]:
        run_stage(stage)
    path = str(folder / "index/image.index")
    mapped = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)  # as the stage reads it
    index = faiss.read_index(path)
    queries = np.load(folder / "queries/img_emb/img_emb_0000.npy").astype(np.float32)
    ours = search(folder, args, backend="faiss", index=folder / "index")
    return {
        "arf faiss": ours,
        "bare faiss": lambda: mapped.search(queries, args.k),
        "bare faiss, index in memory": lambda: index.search(queries, args.k),
    }


def service(args) -> dict[str, Callable[[], object]]:
    """The client with one thread, a loop of posts on one connection, and the client as it is by default."""
    import requests

    from arf_plugin.pipeline.knn_service import KnnClient

    queries = Embeddings(args.service_queries).vectors(np.arange(args.queries)).astype(np.float32)
    client = KnnClient(args.service_url, args.service_index, threads=1)
    usual = KnnClient(args.service_url, args.service_index)
    session = requests.Session()
    for each in (client, usual):
        each.check_index()
    name = client.index

    def bare() -> None:
        for query in queries:
            body = {
                "embedding_input": query.tolist(), "modality": "image", "indice_name": name, "num_images": args.k,
                "num_result_ids": args.k, "deduplicate": False, "use_safety_model": False,
                "use_violence_detector": False,
            }  # fmt: skip
            session.post(f"{args.service_url.rstrip('/')}/knn-service", json=body, timeout=60).json()

    return {
        "arf client": lambda: client.search(queries, args.k),
        "bare requests": bare,
        f"arf client, {usual.threads} threads": lambda: usual.search(queries, args.k),
    }


if __name__ == "__main__":
    sys.exit(main())
