"""Zero-shot accuracy of several models on the same images, which are decoded once for all of them.

Classifiers are built by CLIP_benchmark's own function, so figures compare with others' published ones. Its `accuracy`
(1.6.2) fails with numpy 2.4, which no longer turns an array of one element into a float; top-1 is counted here.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import EvaluationError, MissingDependencyError
from arf_plugin.evaluation.sets import EvaluationSet

if TYPE_CHECKING:
    import torch


def build_classifier(
    model: torch.nn.Module, tokenizer: Any, dataset: EvaluationSet, device: torch.device
) -> torch.Tensor:
    """Builds a zero-shot classifier: per class, the mean of the unit text features over the templates.

    Returns:
        [dimension, classes], columns of unit norm, fp32.

    Raises:
        MissingDependencyError: without CLIP_benchmark.
    """
    try:
        from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
    except ImportError:
        raise MissingDependencyError("clip-benchmark", "Evaluation", "evaluation") from None
    with contextlib.redirect_stderr(io.StringIO()):  # its bar per class; ours counts images
        return zero_shot_classifier(
            model, tokenizer, list(dataset.classnames), list(dataset.templates), device.type, amp=False
        )


def top1(
    models: Mapping[str, torch.nn.Module],
    preprocess: Callable[[Any], torch.Tensor],
    tokenizer: Any,
    dataset: EvaluationSet,
    device: torch.device,
    batch_size: int = 256,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[dict[str, float], int]:
    """Measures top-1 accuracy of every model on one set.

    Args:
        models: models in evaluation mode, on `device`, by name.
        preprocess: PIL image to [3, H, W].
        tokenizer: texts to [n, L].
        dataset: the set.
        device: where the models are.
        batch_size: images per forward.
        advance: told of every batch that is done, for a progress bar.

    Returns:
        Accuracy in percent by model name, and the number of images.
    """
    import torch

    classifiers = {
        name: build_classifier(model, tokenizer, dataset, device) for name, model in models.items()
    }
    correct = dict.fromkeys(models, 0)
    total = 0
    for images, numbers in _batches(dataset, preprocess, batch_size):
        moved, target = images.to(device), numbers.to(device)
        with torch.inference_mode():
            for name, model in models.items():
                features = torch.nn.functional.normalize(model.encode_image(moved), dim=-1)
                correct[name] += int(((features @ classifiers[name]).argmax(dim=1) == target).sum())
        total += len(numbers)
        advance(len(numbers))
    if not total:
        raise EvaluationError(
            f"The set '{dataset.name}' has no images (tars: {', '.join(map(str, dataset.shards))})."
        )
    return {name: 100.0 * count / total for name, count in correct.items()}, total


def _batches(
    dataset: EvaluationSet, preprocess: Callable[[Any], torch.Tensor], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    images: list[torch.Tensor] = []
    numbers: list[int] = []
    for image, number in dataset.images():
        images.append(preprocess(image))
        numbers.append(number)
        if len(images) == batch_size:
            yield torch.stack(images), torch.tensor(numbers)
            images, numbers = [], []
    if images:
        yield torch.stack(images), torch.tensor(numbers)
