"""ARF in several processes: cost of a step against plain open_clip, and what is gathered against the minimum.

Steps are those of open_clip's own ``train_one_epoch`` under DistributedDataParallel and gloo, one torch thread per
process. ARF's should cost what its FLOPs say, however many processes there are. With more processes than cores both
variants slow down alike, so the ratio still holds.

Each loss term gathers its own features, so those of the task's images travel twice. Bytes are counted by wrapping
``torch.distributed.all_gather``; the minimum is each feature once. What a single gather for all terms would save is
timed by the bare collectives, and set against the step.

    python scripts/bench/distributed.py --processes 1 2 4 --json runs/bench/distributed.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from common import Bar, interleave, paired_ratio, parser, report
from step import count_gflops
from variants import StepBench, Variant

ARF = "ARF, A = B"


def main() -> int:
    flags = parser(__doc__.split("\n")[0], rounds=7)
    flags.add_argument("--model", default="ViT-B-32", help="open_clip model, random weights")
    flags.add_argument("--batch-size", type=int, default=8, help="B = A, per process")
    flags.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    flags.add_argument("--local-loss", action="store_true", help="with --local-loss --gather-with-grad")
    args = flags.parse_args()
    args.device = "cpu"
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    steps = build_steps(args)
    gflops = {name: count_gflops(steps[name]) for name in ("plain", ARF)}
    del steps
    ratio = gflops[ARF] / gflops["plain"]
    facts: dict[str, object] = {
        "model": args.model,
        "batch": f"B = A = {args.batch_size} per process",
        "FLOPs ratio ARF / plain": f"{ratio:.3f}",
    }
    seconds, bars = {}, []
    for world_size in args.processes:
        found = run(args, world_size)
        seconds.update({f"{name}, {world_size} processes": v for name, v in found["seconds"].items()})
        cost = paired_ratio(found["seconds"][ARF], found["seconds"]["plain"])
        bars.append(
            Bar(
                "time of a step of ARF / plain, by the FLOPs ratio",
                cost / ratio,
                1.1,
                of=f"{world_size} processes",
            )
        )
        facts[f"time ratio ARF / plain, {world_size} processes"] = f"{cost:.3f}"
        if world_size > 1:
            facts.update(gathered(found, world_size))
            bars.append(
                Bar(
                    "bytes gathered / minimum",
                    found["bytes"] / found["minimum"],
                    1.25,
                    of=f"{world_size} processes",
                )
            )
    return report("distributed: one optimizer step", seconds, bars, args.json, **facts)


def gathered(found: dict, world_size: int) -> dict[str, str]:
    """What is said of the gathers."""
    each, once, step = (
        statistics.median(times) for times in (*found["gathers"].values(), found["seconds"][ARF])
    )
    kilobytes = ", ".join(f"{name} {found[name] / 1024:.1f} kB" for name in ("bytes", "minimum"))
    return {
        f"gathered from each of {world_size} processes per step": f"{kilobytes}, in {found['calls']} calls",
        f"gathers of {world_size} processes, per term / once": f"{1e3 * each:.3g} ms / {1e3 * once:.3g} ms; the "
        f"difference is {100 * (each - once) / step:.2g} % of the step",
    }


def run(args: argparse.Namespace, world_size: int) -> dict:
    """Starts the processes and returns what the first one measured."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (world_size, folder, args), nprocs=world_size)
        return json.loads(Path(folder, "found.json").read_text())


def work(rank: int, world_size: int, folder: str, args: argparse.Namespace) -> None:
    """One process: the same rounds as in all others, kept in step by the gradients' reduction."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
    with contextlib.redirect_stderr(io.StringIO()) if rank else contextlib.nullcontext():
        steps = build_steps(args, rank, world_size)
        found: dict[str, object] = {"seconds": interleave(steps, args.rounds)}
        if world_size > 1:
            with counting() as count:
                steps[ARF]()
            dimension = open_clip.get_model_config(args.model)["embed_dim"]
            size, floats = args.batch_size, torch.finfo(torch.float32).bits // 8
            images, texts = 2 * size, 3 * size
            found |= {**count, "minimum": (images + texts) * dimension * floats}
            found["gathers"] = interleave(bare_gathers(size, dimension, world_size), 20 * args.rounds)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    if world_size > 1:
        dist.destroy_process_group()


def build_steps(
    args: argparse.Namespace, rank: int = 0, world_size: int = 1
) -> dict[str, Callable[[], None]]:
    """A step of both kinds, on the same model."""
    bench = StepBench(args.model, args.batch_size, args.device, rank, world_size, args.local_loss)
    return {variant.name: bench.step(variant) for variant in (Variant("plain"), Variant(ARF, 1))}


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Counts bytes and calls of all_gather; open_clip looks it up at every call, also below its autograd version."""
    original, count = dist.all_gather, {"bytes": 0, "calls": 0}

    def wrapped(tensors, tensor, *rest, **named):
        count["bytes"] += tensor.nbytes
        count["calls"] += 1
        return original(tensors, tensor, *rest, **named)

    dist.all_gather = wrapped
    try:
        yield count
    finally:
        dist.all_gather = original


def bare_gathers(size: int, dimension: int, world_size: int) -> dict:
    """The collectives alone: images and texts of each of three terms, or each feature once in a single call."""

    def gather(rows: int) -> None:
        tensor = torch.ones(rows, dimension)
        dist.all_gather([torch.zeros_like(tensor) for _ in range(world_size)], tensor)

    return {"per term": lambda: [gather(size) for _ in range(6)], "once": lambda: gather(5 * size)}


if __name__ == "__main__":
    sys.exit(main())
