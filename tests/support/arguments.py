"""The arguments that open_clip's train_one_epoch and its losses read, for calls of them without a command line."""

from __future__ import annotations

import argparse
from typing import Any


def training_arguments(**given: Any) -> argparse.Namespace:
    """What a quiet run of one process in single precision has, but for what is given."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "precision": "fp32",
        "rank": 0,
        "world_size": 1,
        "accum_freq": 1,
    }
    off = (
        "distill",
        "horovod",
        "wandb",
        "save_logs",
        "log_local",
        "local_loss",
        "gather_with_grad",
        "siglip",
    )
    defaults |= {**dict.fromkeys(off, False), "skip_scheduler": True, "log_every_n_steps": 1}
    arguments = argparse.Namespace(**{**defaults, "grad_clip_norm": None, "loss_dist_impl": None, **given})
    arguments.local_rank, arguments.distributed = arguments.rank, arguments.world_size > 1
    return arguments
