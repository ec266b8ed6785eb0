"""Cost of a training step beside plain open_clip's: ARF, its cheaper settings, and three separate forwards.

All steps but the last are those of open_clip's own ``train_one_epoch`` (variants.py); batches are ready in memory, so
the figures are compute alone. FLOPs are counted by torch on the same calls. With ``every 4`` a cycle of four steps is
measured, and a quarter of it is told. Each step is timed between two plain ones and compared with their mean: the speed
of a shared machine changes within a minute.

AdamW's update of all weights, and filling their gradients with zeros, take the same time whatever the batch and are no
FLOPs that torch counts. B has to be large enough for them not to matter: 16 with ViT-B/32, whose images are 50 tokens,
is about what 4 is with ViT-B/16. With less, steps that are cheaper than a plain one look dearer than their FLOPs.

    python scripts/bench/step.py --models ViT-B-32 ViT-B-16 --batch-size 16 4 --json docs/figures/bench/step.json

writes the figures that scripts/tables.py puts into docs/cheaper.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch
from common import Bar, bracket, median, parser, report
from torch.utils.flop_counter import FlopCounterMode
from variants import StepBench, Variant

VARIANTS = (
    Variant("plain"),
    Variant("plain, trimmed", trim=True),
    Variant("ARF, A = B", 1),
    Variant("ARF, A = B, trimmed", 1, trim=True, bound=1.9),
    Variant("ARF, A = B/4", 1 / 4),
    Variant("ARF, A = B/4, trimmed", 1 / 4, trim=True, bound=1.2),
    Variant("ARF, A = B, every 4, trimmed", 1, trim=True, every=4),
    Variant("feature anchors, A = B/4, trimmed", 1 / 4, trim=True, pair_loss="feature", bound=1.2),
    Variant("teacher start, every 4", every=4, teacher="start", bound=1.1),
    Variant("teacher average, every 4", every=4, teacher="average", bound=1.1),
)


def main() -> int:
    flags = parser(__doc__.split("\n")[0], rounds=5)
    flags.add_argument(
        "--models", nargs="+", default=["ViT-B-32", "ViT-B-16"], help="open_clip models, random weights"
    )
    flags.add_argument(
        "--batch-size", type=int, nargs="+", default=[16, 4], help="B for each model, multiples of 4"
    )
    flags.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    flags.add_argument(
        "--device", default="cpu", help="device of the model (cuda is written, but was not run)"
    )
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    seconds: dict[str, list[float]] = {}
    bars: list[Bar] = []
    if len(args.batch_size) != len(args.models):
        flags.error(f"{len(args.models)} --models and {len(args.batch_size)} numbers of --batch-size")
    facts: dict[str, object] = {"threads": args.threads}
    data: dict[str, dict[str, object]] = {}
    for model, size in zip(args.models, args.batch_size, strict=True):
        facts[f"{model}: batch"] = f"B = {size}"
        steps = build_steps(StepBench(model, size, args.device))
        gflops = {name: count_gflops(step) for name, step in steps.items()}
        taken, ratios = bracket(steps, "plain", args.rounds)
        for variant in VARIANTS[1:]:  # of a cycle, the mean step
            gflops[variant.name] /= variant.every
            for measured in (taken, ratios):
                measured[variant.name] = [value / variant.every for value in measured[variant.name]]
        seconds |= {f"{model}: {name}": values for name, values in taken.items()}
        costs = {name: median(values) for name, values in ratios.items()}
        flops = {name: count / gflops["plain"] for name, count in gflops.items()}
        each = {variant.name: (costs[variant.name][0], flops[variant.name]) for variant in VARIANTS[1:]}
        data[model] = {"batch size": size, "time and FLOPs, x plain": each}
        for variant in VARIANTS[1:]:
            name, more = f"{model}: {variant.name}", flops[variant.name]
            time, error = costs[variant.name]
            facts[name] = f"{time:.3f} ± {error:.3f} x plain, FLOPs {more:.3f} x"
            by_flops = ("time of a step / plain, by the FLOPs ratio", time / more, 1.05)
            bars.append(Bar(*by_flops, of=name, error=error / more))
            if variant.bound is not None:
                bars.append(Bar("time of a step / plain", time, variant.bound, of=name, error=error))
        three = zip(ratios["three forwards"], ratios["ARF, A = B"], strict=True)
        speedup, error = median([one / other for one, other in three])
        claim = "time of three forwards / ARF, A = B"
        bars.append(Bar(claim, speedup, 1.25, at_most=False, of=model, error=error))
    return report("step: one optimizer step", seconds, bars, args.json, data, **facts)


def build_steps(bench: StepBench) -> dict[str, Callable[[], None]]:
    """One closure per variant, each running one optimizer step on the same model."""
    steps = {variant.name: bench.step(variant) for variant in VARIANTS}
    return steps | {"three forwards": bench.three_forwards}


def count_gflops(step) -> float:
    """GFLOP of one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    sys.exit(main())
