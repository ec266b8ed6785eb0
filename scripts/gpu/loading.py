"""The loaders against the step: whether a GPU is ever waited for, and with how many workers."""

from __future__ import annotations

import io
import logging
import os
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.context import Context, Outcome, median
from gpu.trainers import Trainers

STEPS = ("plain", "FLYP (class prompts), trimmed", "ARF, A = B, trimmed")


def write(folder: Path, images: int, shards: int, size: int = 256, different: int = 192) -> None:
    """Tars of JPEGs as task data and as pairs, and captions; the images repeat, decoding them costs the same."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from loader import jpeg

    made = [jpeg(number, size) for number in range(min(different, images))]
    ids = []
    (folder / "anchors" / "captions").mkdir(parents=True)
    for part in ("task", "anchors/pairs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for shard in range(shards):
            with tarfile.open(folder / part / f"{shard:04d}.tar", "w") as tar:
                for number in range(shard, images, shards):
                    if part == "task":
                        ids.append(f"{shard:04d}/{number:06d}")
                    text = f"a photograph number {number} of a thing, seen from its front".encode()
                    for suffix, content in (("jpg", made[number % len(made)]), ("cls", b"0"), ("txt", text)):
                        info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    captions = pa.table(
        {"id": ids, "caption": [f"a caption of the photograph {identity}" for identity in ids]}
    )
    pq.write_table(captions, folder / "anchors" / "captions" / "part-00000.parquet")


def loaders(context: Context) -> Outcome:
    """Images/s of the anchored loader and of open_clip's own, by workers, beside those of the steps."""
    import torch
    from loader import loader

    from arf_plugin.config import ArfConfig

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = Outcome()
    folder = context.folder
    os.environ["ARF_CACHE_DIR"] = str(folder / "cache")
    images, shards, batch, workers = (64, 4, 8, (2,)) if context.tiny else (4096, 16, 128, (16, 8, 4))
    assert images // shards >= batch, "a worker whose shards hold less than a batch never ends"
    write(folder, images, shards)
    task, pairs = (f"{folder}/{part}/{{0000..{shards - 1:04d}}}.tar" for part in ("task", "anchors/pairs"))
    rates: dict[str, dict[int, float]] = {"open_clip": {}, "ARF": {}}

    def epoch(begin: Callable[[], Any]) -> float:
        start, count = time.perf_counter(), 0
        for batch_of_images, texts in begin():
            count += len(batch_of_images.to(context.device))
            texts.to(context.device)
        context.wait()
        return count / (time.perf_counter() - start)

    slowest = 0.0
    for number in workers:  # the fastest first: what there is no time for takes the longest
        if context.left < 2.5 * slowest:
            found.notes.append(f"loaders: no time was left for {number} workers")
            break
        began = time.monotonic()
        for name, build in (
            ("ARF", lambda n: loader(task, images, batch, n, ArfConfig(anchors=str(folder / "anchors")))),
            ("open_clip", lambda n: loader(f"{task}::{pairs}", 2 * images, 2 * batch, n, None)),
        ):
            begin = build(number)
            epoch(begin)  # the workers start
            rates[name][number] = median([epoch(begin) for _ in range(1 if context.tiny else 2)])
            del begin  # and end
        slowest = time.monotonic() - began
    found.figures["images/s of loaders, by workers"] = rates
    steps = {
        f"{model} {kind}, {row}": figures["rows"][row]["images/s"]
        for model in ("ViT-B-32", "ViT-B-16")
        for kind in ("bf16", "fp32")
        if (figures := context.of(f"step-{model}-{kind}"))
        for row in STEPS
    }
    found.figures["images/s of steps"] = steps
    measured = sorted(rates["ARF"])
    found.figures["enough workers"] = {
        name: next((n for n in measured if rates["ARF"][n] >= rate), f"> {measured[-1]}")
        for name, rate in steps.items()
    }
    if not context.tiny:
        for number in measured:
            share = rates["ARF"][number] / rates["open_clip"][number]
            found.at_least(
                f"{number} workers: images/s of the anchored loader / of open_clip's own", share, 0.9
            )
    found.summary = "; ".join(
        f"{n} workers: ARF {rates['ARF'][n]:.0f}/s, open_clip {rates['open_clip'][n]:.0f}/s" for n in measured
    )
    return found


def waiting(context: Context) -> Outcome:
    """The real trainer on JPEGs: of each step, how long it waits for its data."""
    found = Outcome()
    model, batch, images, workers = (
        ("tiny-long", 8, 64, (2,)) if context.tiny else ("ViT-B-32", 256, 8192, (16,))
    )  # a shard holds two batches: a worker whose shards hold less than one never ends
    with Trainers(context) as trainers:
        folder = context.folder / "photographs"
        write(folder, images, 4 if context.tiny else 16)
        last = 3 if context.tiny else 15
        urls = f"{folder}/task/{{0000..{last:04d}}}.tar"
        flags = [
            "--train-data",
            urls,
            "--train-num-samples",
            images,
            "--precision",
            "amp_bf16",
            "--lr",
            "1e-5",
        ]
        for number in workers:
            for name, more in (("plain", []), ("ARF, A = B", ["--arf-anchors", folder / "anchors"])):
                own = [*flags, *more, "--workers", number]
                run = trainers.run(
                    name.replace(", ", "-").replace(" ", ""), *own, model=model, batch=batch
                ).check()
                times = [
                    (float(data), float(whole))
                    for data, whole in re.findall(r"Data \(t\): (\S+) Batch \(t\): (\S+),", run.output)
                ][3:]  # the first ones wait for the workers to start
                waited = sum(data for data, _ in times) / sum(whole for _, whole in times)
                found.figures[f"{name}, {number} workers"] = {
                    "data and whole step, seconds": times,
                    "waited": waited,
                }
    told = []
    for name, row in found.figures.items():
        step = median([whole for _, whole in row["data and whole step, seconds"]])
        told.append(f"{name}: {100 * row['waited']:.0f} % of {step * 1e3:.0f} ms")
    found.summary = "; ".join(told)
    found.notes.append(
        "A part of the time that a step waits for data is bound by the processor's cores, not the GPU."
    )
    return found
