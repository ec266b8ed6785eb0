"""What is known of a run before its first step: its shape, its inputs, and whether they are sound.

The first error stops the run, the rest is logged. Only headers are read, and scans are cached, so a million samples
cost seconds. Remote shards would have to be downloaded for it and are left to ``arf check``. The rules are those of
:mod:`arf_plugin.checks.rules`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from arf_plugin.anchors.task import is_csv
from arf_plugin.checks.inputs import Inputs, Run
from arf_plugin.checks.rules import findings
from arf_plugin.config import ArfConfig
from arf_plugin.data.prompts import load_prompts
from arf_plugin.trainer_args import TrainerArgs
from arf_plugin.weights import require_known


def inputs_of(args: Any, **more: Any) -> Inputs:
    """Inputs with what the trainer's flags, or the same of a command, say of the task data; ``more`` is the rest."""
    flags = ("train_data", "dataset_type", "csv_img_key", "csv_caption_key", "csv_separator")
    return Inputs(**{name: getattr(args, name) for name in flags}, **more)


def inputs_of_run(args: TrainerArgs, config: ArfConfig, classes: Sequence[str] | None) -> Inputs:
    """What a run's flags say of its inputs, its shape included; class names where prompts or a head need them."""
    inputs = inputs_of(
        args,
        anchors=config.anchors,
        caption_weight=config.caption_weight,
        pair_weight=config.pair_weight,
        caption_loss=config.caption_loss,
        pair_loss=config.pair_loss,
        missing_caption=config.missing_caption,
        classes=classes,
        head=bool(config.head),
        texts_known=True,
        training=True,
    )
    shards = len(inputs.pair_shards) if config.pair_weight else 0
    inputs.run = shape_of_run(args, shards, args.world_size, config.pair_batch_size, config.workers)
    return inputs


def shape_of_run(
    args: Any,
    pair_shards: int,
    world_size: int,
    pair_batch_size: int | None = None,
    pair_workers: int | None = None,
) -> Run:
    """Which data a process gets; what a command has no flag for counts as open_clip's default.

    Args:
        args: Parsed arguments, of the trainer or of a command.
        pair_shards: Pair shards that are used.
        world_size: Processes.
        pair_batch_size: ``--arf-pair-batch-size``; None for ``--batch-size``.
        pair_workers: ``--arf-workers``; None for a share of ``--workers``.
    """
    pairs = (pair_batch_size or args.batch_size) if pair_shards else 0
    shares = split_workers(args.workers, args.batch_size, pairs, pair_workers, pair_shards, world_size)
    pretrained = getattr(args, "pretrained", None) or ":" in getattr(args, "model", "")
    return Run(
        batch_size=args.batch_size,
        accum_freq=args.accum_freq,
        world_size=world_size,
        workers=args.workers,
        task_workers=shares[0],
        pair_workers=shares[1],
        pair_batch=pairs,
        epochs=getattr(args, "epochs", 1),
        samples=getattr(args, "train_num_samples", None),
        resampled=bool(getattr(args, "dataset_resampled", False)),
        seed=getattr(args, "seed", 0),
        lr=getattr(args, "lr", None),
        warmup=getattr(args, "warmup", 0),
        pretrained=bool(pretrained),
    )


def split_workers(
    workers: int, task: int, pairs: int, wanted: int | None, pair_shards: int, world_size: int
) -> tuple[int, int]:
    """Divides ``--workers`` between the two loaders instead of doubling it.

    Args:
        workers: Loader workers per process.
        task: B; the default share goes by images loaded.
        pairs: A; 0 without pairs.
        wanted: ``--arf-workers``; None for the default.
        pair_shards: Pair shards there are; the default never asks for more workers than can be fed.
        world_size: Number of processes.

    Returns:
        Workers of the task loader and of the pair loader. With a single worker each loader gets one.
    """
    if not pairs:
        return workers, 0
    if wanted is not None:
        return max(workers - wanted, min(workers, 1)), wanted
    share = round(workers * pairs / (task + pairs))
    share = min(max(share, 1), max(workers - 1, 1), max(pair_shards // world_size, 1)) if workers else 0
    return max(workers - share, min(workers, 1)), share


def needs_count(args: TrainerArgs) -> bool:
    """Whether open_clip would ask for ``--train-num-samples``."""
    from open_clip_train.data import get_dataset_size

    if is_csv(args.train_data, args.dataset_type) or args.train_num_samples is not None:
        return False
    return not get_dataset_size(args.train_data)[0]


def check_there(args: TrainerArgs, config: ArfConfig) -> None:
    """Sees whether what a run is to read is there, before the trainer has made the run's folder or loaded anything.

    Raises:
        ArfError: The first that is not.
    """
    require_known(args.model, args.pretrained)
    if config.classnames is not None:
        load_prompts(config.classnames, config.templates or "imagenet")
    weights = {"caption_weight": config.caption_weight, "pair_weight": config.pair_weight}
    for finding in findings(inputs_of(args, anchors=config.anchors, training=True, **weights), quick=True):
        raise finding.error(finding.text)


def check_inputs(inputs: Inputs) -> int | None:
    """Checks everything that is known before the first step.

    Returns:
        The number of samples that training can use, if it is known: what ``--train-num-samples`` asks for.

    Raises:
        ArfError: The first error that the rules find.
    """
    logging.info("ARF: looking at the inputs (headers only, cached)")
    for finding in findings(inputs):
        if finding.level == "error":
            raise finding.error(finding.text)
        log = logging.warning if finding.level == "warning" else logging.info
        log(f"ARF: {finding.text}")
    if inputs.csv:
        return len(inputs.frame)
    return None if inputs.remote_task else sum(inputs.usable())
