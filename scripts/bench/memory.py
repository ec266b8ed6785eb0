"""Peak memory of a training step beside plain open_clip's: ARF, its cheaper settings, accumulation, checkpointing.

Every variant has a process of its own, which runs two whole optimizer steps (the second has the optimizer's state).
On a CPU the figure is the process's peak resident memory from the first step on (VmHWM, reset once the model is
built; freed blocks go back to the system at once); on CUDA, torch's own peak of allocated memory (not run here: no
GPU). *Weights and state* are what weights, gradients and AdamW's two moments take whatever the batch; the rest is
activations, which is what B, trimming, --accum-freq and --grad-checkpointing change. B is the same in every row: with
--accum-freq 4 there are four micro-batches of B/4.

    python scripts/bench/memory.py --model ViT-B-16 --batch-size 32 --json docs/figures/bench/memory.json

writes the figures that scripts/tables.py puts into docs/cheaper.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from common import Bar, parser, report
from tqdm import tqdm
from variants import StepBench, Variant

ARF = "ARF, A = B"
VARIANTS = (
    Variant("plain"),
    Variant("plain, trimmed", trim=True),
    Variant(ARF, 1),
    Variant("ARF, A = B, trimmed", 1, trim=True),
    Variant("ARF, A = B/4", 1 / 4),
    Variant("ARF, A = B/4, trimmed", 1 / 4, trim=True),
    Variant("ARF, A = B, trimmed, --accum-freq 2", 1, trim=True, accum_freq=2),
    Variant("ARF, A = B, trimmed, --accum-freq 4", 1, trim=True, accum_freq=4),
    Variant("plain, --grad-checkpointing", checkpointing=True),
    Variant("ARF, A = B, trimmed, --grad-checkpointing", 1, trim=True, checkpointing=True),
)
# glibc keeps freed blocks below a threshold that grows by itself; fixed, all tensors go back to the system.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> int:
    flags = parser(__doc__.split("\n")[0], rounds=1)
    flags.add_argument("--model", default="ViT-B-16", help="open_clip model, random weights")
    flags.add_argument("--batch-size", type=int, default=32, help="B, a multiple of 16")
    flags.add_argument("--device", default="cpu", help="cpu or cuda (cuda is written, but was not run)")
    flags.add_argument("--one", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args)))
        return 0
    found: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in VARIANTS}
    own = ["--model", args.model, "--batch-size", str(args.batch_size), "--device", args.device]
    for _ in range(args.rounds):
        for variant in tqdm(VARIANTS, desc="variants", disable=not sys.stderr.isatty()):
            command = [sys.executable, __file__, *own, "--one", variant.name]
            environment = {**os.environ, **ALLOCATOR}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(
                    f"{variant.name} ended with status {done.returncode}:\n{done.stderr[-2000:]}"
                )
            found[variant.name].append(json.loads(done.stdout.splitlines()[-1]))
    peaks = {name: min(each["peak"] for each in runs) for name, runs in found.items()}
    state = found["plain"][0]["state"]
    facts: dict[str, object] = {
        "model": args.model,
        "batch": f"B = {args.batch_size}",
        "device": args.device,
        "weights and state": f"{state:.0f} MB",
        **{
            name: f"{peak:.0f} MB, {peak / peaks['plain']:.3f} x plain; activations {peak - state:.0f} MB, "
            f"{(peak - state) / (peaks['plain'] - state):.3f} x plain"
            for name, peak in peaks.items()
        },
    }
    trimmed = f"{ARF}, trimmed"

    def share(name: str, of: str) -> float:
        return (peaks[name] - state) / (peaks[of] - state)

    bars = [Bar("activations, of untrimmed", share(trimmed, ARF), 1.0, of=trimmed)]
    for flag in ("--accum-freq 4", "--grad-checkpointing"):
        name = f"{trimmed}, {flag}"
        bars.append(Bar("activations, of those without", share(name, trimmed), 0.5, of=name))
    return report("memory: peak of an optimizer step", {}, bars, args.json, data=found, **facts)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Runs one variant in this process.

    Returns:
        ``peak`` and ``state`` in megabytes (10^6 bytes): the peak while it trains, what weights and state take.
    """
    logging.disable(logging.INFO)
    (variant,) = (each for each in VARIANTS if each.name == args.one)
    bench = StepBench(args.model, args.batch_size, args.device)
    step = bench.step(variant)
    # Weights, gradients and two moments.
    state = 4 * sum(p.numel() * p.element_size() for p in bench.core.parameters())
    if args.device == "cpu":
        before = resident("VmRSS") - state / 4
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(2):
            step()
        return {"peak": (resident("VmHWM") - before) / 1e6, "state": state / 1e6}
    torch.cuda.reset_peak_memory_stats()  # not run here: no GPU
    for _ in range(2):
        step()
    return {"peak": torch.cuda.max_memory_allocated() / 1e6, "state": state / 1e6}


def resident(what: str) -> float:
    """A figure of this process's memory from the kernel, in bytes."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return float(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
