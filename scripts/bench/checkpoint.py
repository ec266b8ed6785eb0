"""Cost of a step checkpoint: seconds and bytes against a bare torch.save, and its share of the time between two.

The checkpoint is one that the trainer saves: a model, its AdamW state after a step, and where the data streams are.
Between two checkpoints lie N optimizer steps of open_clip's own ``train_one_epoch`` on this machine; on a machine whose
steps are faster, the share is larger: seconds of a checkpoint / (N x seconds of a step).

    python scripts/bench/checkpoint.py --model ViT-B-32 --batch-size 64 --json runs/bench/checkpoint.json
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from common import Bar, interleave, paired_ratio, parser, report
from variants import StepBench, Variant

from arf_plugin.config import ArfConfig
from arf_plugin.data.batch import BatchLayout
from arf_plugin.data.loader import TrainingLoader
from arf_plugin.data.task import TaskLoader
from arf_plugin.hooks.resume import StepCheckpoints
from arf_plugin.hooks.session import Session, Training
from arf_plugin.resume.order import SampleOrder, ShardStream

EVERY = (100, 500, 1000)


def main() -> int:
    flags = parser(__doc__.split("\n")[0], rounds=7)
    flags.add_argument("--model", default="ViT-B-32", help="open_clip model, random weights")
    flags.add_argument("--batch-size", type=int, default=64, help="B = A, for the time of a step")
    flags.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    flags.add_argument(
        "--device", default="cpu", help="device of the model (cuda is written, but was not run)"
    )
    flags.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> int:
    """Times both ways to save the same content, and a step."""
    checkpoints, content = build_checkpoints(args, folder)
    plain = folder / "plain.pt"

    def bare() -> None:
        # Into new blocks of the disk, as a step checkpoint is; the file before it goes afterwards.
        new = plain.with_suffix(".new")
        with new.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(plain)

    seconds = interleave({"torch.save": bare, "step checkpoint": lambda: checkpoints.save(1, 1)}, args.rounds)
    (saved,) = folder.glob("epoch_*_step_*.pt")
    step = StepBench(args.model, args.batch_size, args.device).step(Variant("ARF, A = B", 1))
    step()
    start = time.perf_counter()
    step()
    step_seconds = time.perf_counter() - start
    cost = statistics.median(seconds["step checkpoint"])
    bars = [
        Bar(
            "step checkpoint / torch.save of its content, time",
            paired_ratio(seconds["step checkpoint"], seconds["torch.save"]),
            1.15,
        ),
        Bar(
            "step checkpoint / weights and optimizer alone, bytes",
            saved.stat().st_size / plain.stat().st_size,
            1.01,
        ),
        Bar(f"share of the training time at N = {EVERY[1]}", cost / (EVERY[1] * step_seconds), 0.01),
    ]
    facts = {
        "model": args.model,
        "threads": args.threads,
        "step checkpoint": f"{saved.stat().st_size / 1e6:.1f} MB",
        "torch.save": f"{plain.stat().st_size / 1e6:.1f} MB",
        f"ARF step, B = A = {args.batch_size}": f"{step_seconds:.3g} s",
        **{f"share at N = {every}": f"{cost / (every * step_seconds):.3%}" for every in EVERY},
    }
    return report("checkpoint: one step checkpoint", seconds, bars, args.json, **facts)


def build_checkpoints(args: argparse.Namespace, folder: Path) -> tuple[StepCheckpoints, dict]:
    """What saves in a run, and what open_clip itself would save of it."""
    model = open_clip.create_model(args.model, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    trainer = SimpleNamespace(
        rank=0,
        distributed=False,
        name="bench",
        save_most_recent=False,
        accum_freq=1,
        checkpoint_path=str(folder),
    )
    session = Session(ArfConfig(deterministic=True, checkpoint_every=1), open_clip.__version__)
    task, pairs = (ShardStream([], 8, SampleOrder(name, 0, lambda: 0, 0)) for name in ("task", "pairs"))
    loader = TrainingLoader(TaskLoader(task, 1000, 1000), pairs, BatchLayout(1, pairs=1), seed=0)
    checkpoints = StepCheckpoints(session, trainer, loader, {"seed": 0})
    checkpoints.before_epoch(Training(model, optimizer, None, 0, trainer, None))
    content = {
        "epoch": 0,
        "name": "bench",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    return checkpoints, content


if __name__ == "__main__":
    sys.exit(main())
