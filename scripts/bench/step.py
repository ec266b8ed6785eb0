"""Cost of a training step: plain open_clip, ARF with one concatenated forward, and three separate forwards.

Plain and ARF steps are those of open_clip's own ``train_one_epoch``; batches are ready in memory, so the figures are
compute alone. FLOPs are counted by torch on the same calls.

    python scripts/bench/step.py --model ViT-B-16 --batch-size 2 --json runs/bench/step.json
"""

from __future__ import annotations

import argparse
import logging
import sys
from types import SimpleNamespace

import open_clip
import torch
from common import Bar, interleave, paired_ratio, parser, report
from open_clip_train.train import train_one_epoch
from torch.utils.flop_counter import FlopCounterMode

from arf_plugin.data.batch import BatchLayout, DeviceConcat
from arf_plugin.losses.anchored import AnchoredLoss


class OneBatch(list):
    """A loader of a single batch."""

    num_batches = 1
    num_samples = 1


def main() -> int:
    flags = parser(__doc__.split("\n")[0], rounds=7)
    flags.add_argument("--model", default="ViT-B-16", help="open_clip model, random weights")
    flags.add_argument("--batch-size", type=int, default=2, help="B = A")
    flags.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    flags.add_argument(
        "--device", default="cpu", help="device of the model (cuda is written, but was not run)"
    )
    args = flags.parse_args(namespace=argparse.Namespace(local_loss=False))
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    steps = build_steps(args)
    gflops = {name: count_gflops(step) for name, step in steps.items()}
    seconds = interleave(steps, args.rounds)
    flops_ratio = gflops["ARF"] / gflops["plain"]
    time_ratio = paired_ratio(seconds["ARF"], seconds["plain"])
    speedup = paired_ratio(seconds["three forwards"], seconds["ARF"])
    bars = [
        Bar("step time of ARF / plain, in units of the FLOPs ratio", time_ratio / flops_ratio, 1.05),
        Bar("three forwards / ARF", speedup, 1.25, at_most=False),
    ]
    facts = {
        "model": args.model,
        "batch": f"B = A = {args.batch_size}",
        "threads": args.threads,
        "GFLOP per step": ", ".join(f"{name} {value:.4g}" for name, value in gflops.items()),
        "FLOPs ratio ARF / plain": f"{flops_ratio:.3f}",
        "time ratio ARF / plain": f"{time_ratio:.3f}",
    }
    return report("step: one optimizer step", seconds, bars, args.json, **facts)


def build_steps(args: argparse.Namespace, rank: int = 0, world_size: int = 1) -> dict:
    """One closure per variant, each running one optimizer step on the same model, alone or with other processes."""
    size = args.batch_size
    model, _, _ = open_clip.create_model_and_transforms(args.model, output_dict=True, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    height, width = model.visual.image_size
    length = model.context_length
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    images = [torch.randn(size, 3, height, width) for _ in range(2)]
    texts = [torch.randint(1, 400, (size, length)) for _ in range(3)]
    options = argparse.Namespace(
        **{"device": args.device, "precision": "fp32", "distill": False, "accum_freq": 1, "horovod": False},
        **{
            "skip_scheduler": True,
            "rank": rank,
            "world_size": world_size,
            "local_rank": rank,
            "wandb": False,
            "log_local": False,
        },
        **{
            "log_every_n_steps": 1,
            "batch_size": size,
            "grad_clip_norm": None,
            "save_logs": False,
            "siglip": False,
        },
        **{"local_loss": args.local_loss, "gather_with_grad": args.local_loss, "model": args.model},
    )

    def trainer_step(batch: tuple, loss: torch.nn.Module) -> None:
        data = {"train": SimpleNamespace(dataloader=OneBatch([batch]), set_epoch=lambda epoch: None)}
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, options)

    plain_loss = open_clip.create_loss(options)
    layout = BatchLayout(task=size, captions=True, pairs=size)
    arf_loss = AnchoredLoss(lambda: open_clip.create_loss(options), layout)

    def three_forwards() -> None:
        optimizer.zero_grad()
        total = 0
        for image, text in ((images[0], texts[0]), (images[0], texts[1]), (images[1], texts[2])):
            total = total + plain_loss(**model(image, text))
        total.backward()
        optimizer.step()

    return {
        "plain": lambda: trainer_step((images[0], texts[0]), plain_loss),
        "ARF": lambda: trainer_step((DeviceConcat(*images), DeviceConcat(*texts)), arf_loss),
        "three forwards": three_forwards,
    }


def count_gflops(step) -> float:
    """GFLOP of one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    sys.exit(main())
