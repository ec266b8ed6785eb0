"""How long a fit will take, told before it begins: a few steps and forwards of its model are timed, on made data.

As many images and texts as a step has, on the same device, by a model of the same architecture: what is computed. What
is left out is said where it is told: a captioner, downloads, the start of processes, and data that steps wait for.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from arf_plugin.anchors.tars import local_path, scan_samples
from arf_plugin.errors import PoolError

SECONDS = 1.0  # of a measurement, beside its first call
_BATCH = 64  # images that are embedded at a time


class Step(NamedTuple):
    """What a model computes in a micro-batch."""

    images: int
    texts: int
    teacher: float = 0.0  # images that a second model sees, without gradients


def step_of(terms: list[str], held: int, pairs: int, captions: bool) -> Step:
    """What an arm computes.

    Args:
        terms: Its flags of the plugin.
        held: Task images in a micro-batch.
        pairs: Pairs in a micro-batch.
        captions: Whether the anchors have captions.
    """
    if "--arf-anchors" not in terms:
        return Step(held, held, held / 4 if "--arf-teacher" in terms else 0.0)
    every = int(terms[terms.index("--arf-every") + 1]) if "--arf-every" in terms else 1
    return Step(held + pairs // every, held + (held * captions + pairs) // every)


def measure(
    built: tuple[Any, Any, Any], steps: Mapping[str, Step], device: torch.device, precision: str, threads: int
) -> tuple[dict[str, float], float]:
    """Times steps and the embedding of images.

    Args:
        built: Model, preprocessing and tokenizer, as of :func:`arf_plugin.evaluation.candidates.build`.
        steps: By arm.
        device: What trains.
        precision: As ``--precision`` of the trainer.
        threads: Of a CPU, that a run has.

    Returns:
        Seconds of a step by arm, and of an image that is embedded.
    """
    model, _, tokenizer = built
    shape = (3, *image_size(model))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    kind = torch.float16 if precision in ("amp", "fp16") else torch.bfloat16
    mixed: Callable[[], Any] = (
        contextlib.nullcontext if precision == "fp32" else lambda: torch.autocast(device.type, kind)
    )

    def train(step: Step) -> None:
        with mixed():
            features = [model.encode_image(torch.zeros(step.images, *shape, device=device))]
            features.append(model.encode_text(tokenizer(["a photo of a thing"] * step.texts).to(device)))
            if step.teacher:
                with torch.no_grad():
                    model.encode_image(torch.zeros(max(1, int(step.teacher)), *shape, device=device))
        sum(one.float().square().mean() for one in features).backward()
        optimizer.step()
        optimizer.zero_grad()

    def embed() -> None:
        with torch.no_grad(), mixed():
            model.encode_image(torch.zeros(_BATCH, *shape, device=device))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        of_arms = {arm: _seconds(functools.partial(train, step), device) for arm, step in steps.items()}
    finally:
        torch.set_num_threads(before)
    return of_arms, _seconds(embed, device) / _BATCH


def image_size(model: Any) -> tuple[int, int]:
    """Pixels of an image that a model sees: height and width."""
    size = getattr(model.visual, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def pool_size(tars: Sequence[str]) -> int | None:
    """Images of a pool, by the first of its tars and the bytes of all; None if they are not on this machine."""
    paths = [local_path(url) for url in tars]
    if not paths or not all(path.is_file() for path in paths):
        return None
    samples = sum(sample.image is not None for sample in scan_samples(tars[0], PoolError))
    return round(samples * sum(path.stat().st_size for path in paths) / paths[0].stat().st_size)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, after a first."""
    call()
    start, count = _now(device), 0
    while (passed := _now(device) - start) < SECONDS and count < 20:
        call()
        count += 1
    return passed / max(1, count)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
