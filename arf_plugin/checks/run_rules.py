"""Rules about the run: who gets which data, how many steps there are, at which rate."""

from __future__ import annotations

from collections.abc import Iterator

from arf_plugin.checks.finding import Finding
from arf_plugin.checks.inputs import Inputs
from arf_plugin.data.dealing import dealt_shards
from arf_plugin.errors import TaskDataError

HIGH_RATE = 1e-4  # above it, CLIP is trained from scratch


def task_workers(inputs: Inputs) -> Iterator[Finding]:
    """Every loader worker of the task data gets a shard."""
    run = inputs.run
    if run is None or inputs.train_data is None or inputs.csv or run.resampled:
        return
    shards = len(inputs.task_urls)
    if shards < run.consumers:
        raise TaskDataError(
            f"{shards} task shards for {run.consumers} loader workers ({run.world_size} processes x "
            f"{max(1, run.task_workers)} of --workers {run.workers}); expected at least one shard each.\n"
            "Lower --workers, split the shards, or use --dataset-resampled."
        )
    yield from ()


def batches(inputs: Inputs) -> Iterator[Finding]:
    """Every epoch has steps, and no loader worker starves."""
    run = inputs.run
    if run is None or inputs.train_data is None or inputs.remote_task:
        return
    available = len(inputs.frame) if inputs.csv else sum(inputs.usable())
    if not available:
        raise TaskDataError(
            f"Training would pass over every sample of {inputs.train_data}: none has a readable image and a text "
            f"({len(inputs.task.ids)} samples with an image)."
        )
    samples = available if inputs.csv or run.samples is None else run.samples
    micro = run.micro_batches(samples, inputs.csv)
    if micro < 1:
        per_process = -(-samples // run.world_size)
        raise TaskDataError(
            f"{inputs.train_data} has {samples} rows, {per_process} for each of {run.world_size} processes: "
            "less than one "
            f"batch of --batch-size {run.batch_size}. open_clip would end without a step. Lower --batch-size"
            f"{' or start fewer processes' if run.world_size > 1 else ''}."
        )
    if micro < run.accum_freq:
        raise TaskDataError(
            f"An epoch has {micro} batches per process ({samples} samples, --batch-size {run.batch_size}, "
            f"{run.world_size} processes), fewer than --accum-freq {run.accum_freq}: there would be no step. "
            "Lower one of "
            "them."
        )
    if not inputs.csv:
        if run.samples is not None and run.samples > 1.5 * available:
            yield Finding(
                "warning",
                f"--train-num-samples {run.samples}, but there are {available} usable samples: an epoch shows each "
                f"{run.samples / available:.2g} times.",
            )
        yield from _starving(inputs, run.batch_size)


def _starving(inputs: Inputs, batch_size: int) -> Iterator[Finding]:
    """A loader worker whose shards hold less than a batch never gives one, and the trainer waits for it for ever."""
    run = inputs.run
    assert run is not None
    usable = inputs.usable()
    if run.resampled:
        return
    for epoch in range(min(run.epochs, 1000)):
        dealt = dealt_shards(len(usable), run.seed, epoch, run.world_size, run.task_workers)
        for consumer, shards in enumerate(dealt or []):
            samples = sum(usable[number] for number in shards)
            if samples < batch_size:
                rank, worker = divmod(consumer, max(1, run.task_workers))
                named = ", ".join(inputs.task_urls[number].rsplit("/", 1)[-1] for number in shards[:3])
                raise TaskDataError(
                    f"In epoch {epoch}, loader worker {worker} of process {rank} gets {len(shards)} task "
                    f"shards ({named}) with "
                    f"{samples} usable samples, less than a batch of --batch-size {batch_size}: training would "
                    "wait for it "
                    "for ever.\nLower --workers or --batch-size, pack the data into shards of equal size, or use "
                    "--dataset-resampled."
                )
    yield from ()


def schedule(inputs: Inputs) -> Iterator[Finding]:
    """The learning rate fits what is trained."""
    run = inputs.run
    if run is None or run.lr is None or inputs.train_data is None:
        return
    if run.pretrained and run.lr > HIGH_RATE:
        yield Finding(
            "warning",
            f"--lr {run.lr:g} is a rate for training from scratch (open_clip's default is 5e-4), and this run "
            "starts from "
            "trained weights, which it may destroy. FLYP and ARF fine-tune CLIP's ViT-B with 1e-5.",
        )
    if inputs.remote_task and run.samples is None:
        return
    samples = len(inputs.frame) if inputs.csv else run.samples or sum(inputs.usable())
    steps = run.micro_batches(samples, inputs.csv) // run.accum_freq * run.epochs
    if run.warmup >= steps > 0:
        yield Finding(
            "warning",
            f"--warmup {run.warmup} is not shorter than the run of {steps} steps: the learning rate only rises, to "
            f"{run.lr * steps / run.warmup:.2g} at most. Give about a tenth of the steps: --warmup "
            f"{max(1, steps // 10)}.",
        )
