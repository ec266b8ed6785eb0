"""Hyper-parameters that follow from the model and the data, each with its reason.

FLYP (Goyal et al., CVPR 2023, section 5 and appendix) fine-tunes CLIP's ViT-B/16 with AdamW at a learning rate of 1e-5,
weight decay 0.1, 500 steps of warm-up and batches of 512 for 10 epochs; ARF (Han et al., CVPR 2024, section 4) takes
these over. What follows for other sizes is ours: larger models learn at lower rates, in CLIP's pretraining, too
(Radford et al. 2021, table 20); the rate of an adaptive optimizer goes with the square root of the batch (Malladi et
al., NeurIPS 2022).
"""

from __future__ import annotations

import dataclasses
import math
import os

from arf_plugin.errors import FitError
from arf_plugin.flags import PAIR_SHARE

# Parameters of a model up to which a rate holds, at batches of 512.
RATES = (
    (30e6, 1.4e-3, "models below 30 M parameters, as in this project's benchmarks"),
    (250e6, 1e-5, "ViT-B/16, FLYP's"),
    (700e6, 7e-6, "ViT-L, ours: larger models learn at lower rates"),
    (math.inf, 4e-6, "ViT-H and larger, ours: larger models learn at lower rates"),
)
BATCH = 512
STEPS = 400  # at least so many, or weights hardly leave the start
MOST_EPOCHS = 50
LARGEST_ON_CPU = 64

# Terms by preset: flags of the trainer, and what is said of them.
PRESETS = {
    "paper": ([], "ARF as published: a caption and a pair per task image, contrastive"),
    "recommended": (
        ["--arf-preset", "recommended"],
        "pairs held to the starting model's features (ours), a quarter as many as task images",
    ),
    "fast": (
        ["--arf-preset", "recommended", "--arf-every", "2"],
        "the recommended terms on every second step (ours)",
    ),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What trains: CUDA devices, bytes of the smallest of them (0 without), and CPU cores."""

    gpus: int
    memory: int
    cores: int

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine, as far as it is to be used."""
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if device == "cpu" or not torch.cuda.is_available():
            return cls(0, 0, cores)
        count = 1 if device.startswith("cuda:") else torch.cuda.device_count()
        return cls(count, min(torch.cuda.get_device_properties(n).total_memory for n in range(count)), cores)


def recipe(
    *, parameters: int, pixels: int, samples: int, shards: int, preset: str, pairs: bool, machine: Machine,
    epochs: int | None = None, batch: int | None = None, accumulate: int = 1,
) -> dict[str, tuple[str, str]]:  # fmt: skip
    """Chooses the trainer's flags.

    Args:
        parameters: Of the model.
        pixels: Of an image, in one direction.
        samples: Task images to train on.
        shards: Task tars.
        preset: Which terms.
        pairs: Whether there are pair anchors.
        machine: What trains.
        epochs: Passes over the data, if that is decided.
        batch: Images in a micro-batch of a process, if that is decided.
        accumulate: Micro-batches in a step, beside `batch`.

    Returns:
        By flag, its value and why.

    Raises:
        FitError: There are too few images for a batch.
    """
    if samples < 2:
        raise FitError(f"There are {samples} images to train on. Expected at least a few per class.")
    processes = max(1, machine.gpus)
    # A step of the trainer needs a full batch; four in an epoch leave little of the data unseen.
    micro = max(1, min(BATCH, max(2, samples // 4)) // processes)
    if batch is not None:
        held, why = batch, "yours"
    elif machine.gpus:
        # Weights, gradients and AdamW's two moments, and activations of a tower in mixed precision; ours, cautious.
        per_image = 6e6 * (parameters / 150e6) ** 0.5 * (pixels / 224) ** 2 * 4
        room = max(1, int((0.8 * machine.memory - 16 * parameters) / per_image))
        held, why = min(micro, room), f"{machine.memory / 2**30:.0f} GiB of GPU memory"
    else:
        held, why = min(micro, LARGEST_ON_CPU), "on a CPU larger ones only need more memory"
    if batch is None:
        accumulate = max(1, round(micro / held))
    total = held * accumulate * processes
    if batch is None and total > samples:
        raise FitError(
            f"{processes} GPUs and {samples} images: an image a GPU is more than a batch. Use fewer GPUs."
        )
    per_epoch = max(1, samples // total)
    if epochs is None:
        epochs = min(MOST_EPOCHS, max(10, math.ceil(STEPS / per_epoch)))
    steps = epochs * per_epoch
    rate, whose = next((rate, whose) for bound, rate, whose in RATES if parameters <= bound)
    workers = max(0, min(4, machine.cores // processes - 1, shards // processes))
    scaled = "" if total == BATCH else f", times sqrt({total}/{BATCH}) for batches of {total}"
    length = f"{per_epoch} steps each, {steps} in all (at least {STEPS} steps, at most {MOST_EPOCHS} passes)"
    values = {
        "--lr": (
            f"{rate * math.sqrt(total / BATCH):.2g}",
            f"{whose}: {rate:g} at batches of {BATCH}{scaled}",
        ),
        "--warmup": (str(min(500, max(1, steps // 10))), f"a tenth of the {steps} steps, at most 500"),
        "--wd": ("0.1", "FLYP's"),
        "--epochs": (str(epochs), length),
        "--batch-size": (str(held), f"of {samples} images, at least 4 steps an epoch; {why}"),
        "--workers": (str(workers), f"{machine.cores} cores, {shards} shards"),
    }
    if accumulate > 1:
        values["--accum-freq"] = (str(accumulate), f"{total} images a step in micro-batches of {held}")
    values["--precision"] = (
        ("amp_bf16", "GPUs since 2020 have it, and it needs no loss scaling")
        if machine.gpus
        else ("fp32", "most CPUs gain nothing from less")
    )
    if pairs and preset != "paper":
        values["--arf-pair-batch-size"] = (str(max(1, held // PAIR_SHARE)), "a quarter of the task images")
    return values
