"""Evaluates checkpoints of one model on several sets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.checkpoints import load_into, read_weights
from arf_plugin.evaluation.interpolation import interpolate
from arf_plugin.evaluation.sets import find_sets
from arf_plugin.evaluation.zeroshot import top1


def evaluate(
    checkpoints: Sequence[Path],
    model: str,
    data: Sequence[Path],
    *,
    pretrained: str | None = None,
    wise: float | None = None,
    batch_size: int = 256,
    device: str = "auto",
) -> dict[str, Any]:
    """Measures top-1 accuracy of each checkpoint on each set.

    Args:
        checkpoints: weights of `model`; without any, the model's own are evaluated under its name.
        model: open_clip model name, ``local-dir:`` folder or ``hf-hub:`` name.
        data: folders of sets, or of folders of sets.
        pretrained: open_clip tag or file, if there are no checkpoints.
        wise: also evaluate the first checkpoint mixed with each other one at this alpha.
        batch_size: images per forward.
        device: ``auto``, or a torch device.

    Returns:
        ``{"accuracy": {checkpoint: {set: percent}}, "samples": {set: count}}``. Mixed checkpoints are named
        ``CHECKPOINT+wise``.

    Raises:
        EvaluationError: for checkpoints or sets that cannot be evaluated.
    """
    import open_clip

    from arf_plugin.pipeline.device import pick_device
    from arf_plugin.pipeline.progress import Progress

    if wise is not None and len(checkpoints) < 2:
        raise EvaluationError(
            f"--wise mixes the first checkpoint with the others; {len(checkpoints)} were given."
        )
    sets = {}
    for folder in data:
        for found in find_sets(folder):
            if found.name in sets:
                raise EvaluationError(
                    f"Two sets are called '{found.name}'. Name a folder above both with --data."
                )
            sets[found.name] = found
    target = pick_device(device)
    try:
        built, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=pretrained, device=target
        )
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as cause:  # open_clip raises many kinds for names, files and downloads
        raise EvaluationError(
            f"open_clip cannot load the model {model!r} ({pretrained!r}): {cause}"
        ) from cause
    built.eval()
    models = {str(path): load_into(copy.deepcopy(built), path) for path in checkpoints} or {model: built}
    if wise is not None:
        original = read_weights(checkpoints[0])
        for path in checkpoints[1:]:
            mixed = copy.deepcopy(built)
            mixed.load_state_dict(interpolate(original, read_weights(path), wise))
            models[f"{path}+wise"] = mixed

    accuracy: dict[str, dict[str, float]] = {name: {} for name in models}
    samples = {}
    with Progress("evaluate") as progress:
        for name, dataset in sets.items():
            scores, samples[name] = top1(
                models, preprocess, tokenizer, dataset, target, batch_size, progress.advance
            )
            for checkpoint, score in scores.items():
                accuracy[checkpoint][name] = score
    return {"accuracy": accuracy, "samples": samples}
