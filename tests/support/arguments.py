"""The arguments that open_clip's train_one_epoch and its losses read, for calls of them without a command line."""

from __future__ import annotations

import argparse
from typing import Any


def training_arguments(**given: Any) -> argparse.Namespace:
    """What a quiet run of one process in single precision has, but for what is given."""
    defaults = {
        "device": "cpu",
        "precision": "fp32",
        "rank": 0,
        "world_size": 1,
        "accum_freq": 1,
        "skip_scheduler": True,
        "grad_clip_norm": None,
        "siglip": False,
        "local_loss": False,
        "gather_with_grad": False,
        "loss_dist_impl": None,
        "distill": False,
        "horovod": False,
        "wandb": False,
        "save_logs": False,
        "log_local": False,
        "log_every_n_steps": 1,
    }
    arguments = argparse.Namespace(**{**defaults, **given})
    arguments.local_rank, arguments.distributed = arguments.rank, arguments.world_size > 1
    return arguments
