"""Cost of a training step beside plain open_clip's: ARF, its cheaper settings, and three separate forwards.

All steps but the last are those of open_clip's own ``train_one_epoch``; batches are ready in memory, so the figures are
compute alone. FLOPs are counted by torch on the same calls. Prompts, captions and pair texts have 12, 18 and 24 tokens.

    python scripts/bench/step.py --models ViT-B-32 ViT-B-16 --batch-size 4 --json runs/bench/step.json
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace

import open_clip
import torch
from common import Bar, interleave, paired_ratio, parser, report
from open_clip_train.train import train_one_epoch
from torch.utils.flop_counter import FlopCounterMode

from arf_plugin.data.batch import BatchLayout, DeviceConcat
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.hooks.images import shrink_pairs
from arf_plugin.hooks.text import accept_trimmed, trimmer
from arf_plugin.losses.anchored import AnchoredLoss

TEXT_LENGTHS = (12, 18, 24)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of step.

    Attributes:
        name: Row of the table.
        pairs: A as a share of B; None for a step without anchors.
        trim: Whether texts are cut to the longest of the batch.
        dropout: Whether pair images lose half their patches.
        bound: Promised time, in units of plain open_clip's; None for no promise.
    """

    name: str
    pairs: float | None
    trim: bool = False
    dropout: bool = False
    bound: float | None = None


VARIANTS = (
    Variant("plain", None),
    Variant("plain, trimmed", None, trim=True),
    Variant("ARF, A = B", 1),
    Variant("ARF, A = B, trimmed", 1, trim=True, bound=1.9),
    Variant("ARF, A = B/4", 1 / 4),
    Variant("ARF, A = B/4, trimmed", 1 / 4, trim=True, bound=1.2),
    Variant("ARF, A = B/4, dropout", 1 / 4, dropout=True),
    Variant("ARF, A = B/4, dropout, trimmed", 1 / 4, trim=True, dropout=True),
)


class OneBatch(list):
    """A loader of a single batch."""

    num_batches = 1
    num_samples = 1


def main() -> int:
    flags = parser(__doc__.split("\n")[0], rounds=7)
    flags.add_argument(
        "--models", nargs="+", default=["ViT-B-32", "ViT-B-16"], help="open_clip models, random weights"
    )
    flags.add_argument("--batch-size", type=int, default=4, help="B, a multiple of 4")
    flags.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    flags.add_argument(
        "--device", default="cpu", help="device of the model (cuda is written, but was not run)"
    )
    args = flags.parse_args(namespace=argparse.Namespace(local_loss=False))
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    seconds: dict[str, list[float]] = {}
    bars: list[Bar] = []
    facts: dict[str, object] = {"batch": f"B = {args.batch_size}", "threads": args.threads}
    for model in args.models:
        steps = build_steps(args, model)
        gflops = {name: count_gflops(step) for name, step in steps.items()}
        taken = interleave(steps, args.rounds)
        seconds |= {f"{model}: {name}": values for name, values in taken.items()}
        ratio = {name: paired_ratio(values, taken["plain"]) for name, values in taken.items()}
        for variant in VARIANTS[1:]:
            flops_ratio = gflops[variant.name] / gflops["plain"]
            name = f"{model}: {variant.name}"
            facts[name] = f"{ratio[variant.name]:.3f} x plain, FLOPs {flops_ratio:.3f} x"
            bars.append(
                Bar(f"{name} / plain, in units of the FLOPs ratio", ratio[variant.name] / flops_ratio, 1.05)
            )
            if variant.bound is not None:
                bars.append(Bar(f"{name} / plain", ratio[variant.name], variant.bound))
        speedup = paired_ratio(taken["three forwards"], taken["ARF, A = B"])
        bars.append(Bar(f"{model}: three forwards / ARF, A = B", speedup, 1.25, at_most=False))
    return report("step: one optimizer step", seconds, bars, args.json, **facts)


def build_steps(
    args: argparse.Namespace, name: str, rank: int = 0, world_size: int = 1
) -> dict[str, Callable[[], None]]:
    """One closure per variant, each running one optimizer step on the same model, alone or with other processes."""
    size = args.batch_size
    model, _, _ = open_clip.create_model_and_transforms(name, output_dict=True, device=args.device)
    layouts: list[BatchLayout] = []  # that of the step under way, if its pairs lose patches
    shrink_pairs(model, lambda: layouts[0] if layouts else None, dropout=0.5)
    trim = trimmer(model)
    assert isinstance(trim, TextTrimmer)
    accept_trimmed(model)  # texts of full length pass as before
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    height, width = model.visual.image_size
    context_length = model.context_length
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    images = [torch.randn(size, 3, height, width) for _ in range(2)]
    texts = [random_texts(size, length, context_length) for length in TEXT_LENGTHS]
    options = argparse.Namespace(
        **{"device": args.device, "precision": "fp32", "distill": False, "accum_freq": 1, "horovod": False},
        **{
            "skip_scheduler": True,
            "rank": rank,
            "world_size": world_size,
            "local_rank": rank,
            "wandb": False,
        },
        **{"log_every_n_steps": 1, "batch_size": size, "grad_clip_norm": None, "save_logs": False},
        **{
            "local_loss": args.local_loss,
            "gather_with_grad": args.local_loss,
            "model": name,
            "siglip": False,
            "log_local": False,
        },
    )

    def step(variant: Variant) -> Callable[[], None]:
        pairs = int(size * (variant.pairs or 0))
        layout = BatchLayout(task=size, captions=bool(pairs), pairs=pairs)
        parts = [texts[0], texts[1], texts[2][:pairs]] if pairs else [texts[0]]
        columns = trim.length(*parts) if variant.trim else None
        batch = (
            DeviceConcat(*([images[0], images[1][:pairs]] if pairs else [images[0]])),
            DeviceConcat(*parts, columns=columns),
        )
        data = {"train": SimpleNamespace(dataloader=OneBatch([batch]), set_epoch=lambda epoch: None)}
        loss = open_clip.create_loss(options)
        if pairs:
            loss = AnchoredLoss(lambda: open_clip.create_loss(options), layout)

        def run() -> None:
            layouts[:] = [layout] if variant.dropout else []
            train_one_epoch(model, data, loss, 0, optimizer, None, None, None, options)

        return run

    plain_loss = open_clip.create_loss(options)

    def three_forwards() -> None:
        layouts.clear()
        optimizer.zero_grad()
        total = 0
        for image, text in ((images[0], texts[0]), (images[0], texts[1]), (images[1], texts[2])):
            total = total + plain_loss(**model(image.to(args.device), text.to(args.device)))
        total.backward()
        optimizer.step()

    return {variant.name: step(variant) for variant in VARIANTS} | {"three forwards": three_forwards}


def random_texts(count: int, length: int, context_length: int) -> torch.Tensor:
    """Tokens ``[count, context_length]`` that end, with the highest number, at ``length``."""
    tokens = torch.zeros(count, context_length, dtype=torch.long)
    tokens[:, : length - 1] = torch.randint(1, 400, (count, length - 1))
    tokens[:, length - 1] = 49407
    return tokens


def count_gflops(step) -> float:
    """GFLOP of one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    sys.exit(main())
