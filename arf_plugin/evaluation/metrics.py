"""Metrics over the predictions on one set, all in percent; and how far features have moved since training started.

Source of CKA: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019 (arXiv
1905.00414), section 3. Cosine sees any movement, also a rotation of the whole space that image and text towers make
together and that costs no accuracy; CKA is blind to rotations and to scale, and falls where the geometry changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from arf_plugin.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch

BINS = 15
TOP = 5


@dataclass(frozen=True)
class Predictions:
    """A model's answers on N images of a set; tensors [N] on the CPU."""

    target: torch.Tensor  # int64, true class numbers
    predicted: torch.Tensor  # int64, class of the largest logit
    among_top: torch.Tensor  # bool, whether the true class is among the five largest logits
    confidence: torch.Tensor  # float32, the predicted class's probability


def predictions(logits: torch.Tensor, target: torch.Tensor, scale: float = 1.0) -> Predictions:
    """Reduces logits [N, classes] of images of classes `target` to what the metrics need.

    Probabilities are the softmax of the logits times `scale`.
    """
    import torch

    logits = logits.float()
    # As CLIP_benchmark counts: argmax for top-1, topk for top-5.
    top = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    confidence = torch.softmax(scale * logits, dim=1).amax(dim=1)
    among = (top == target[:, None]).any(dim=1)
    return Predictions(target.cpu(), logits.argmax(dim=1).cpu(), among.cpu(), confidence.cpu())


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of several batches as one."""
    import torch

    names = [field.name for field in fields(Predictions)]
    return Predictions(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def measure(found: Predictions, classes: int) -> dict[str, float]:
    """All metrics of a set, in percent: those of :func:`accuracies`, and `ece`, the :func:`calibration_error`."""
    hits = found.target == found.predicted
    return {**accuracies(found, classes), "ece": 100.0 * calibration_error(found.confidence, hits)}


def accuracies(found: Predictions, classes: int) -> dict[str, float]:
    """The metrics that look at classes alone, not at confidences, in percent.

    `top1`; `top5` from five classes on; `mean_per_class`, the mean recall of the classes that occur (scikit-learn's
    balanced accuracy); `macro_f1`, the mean F1 of the classes that occur or are predicted (scikit-learn's f1_score
    with average="macro").
    """
    import torch

    hits = found.target == found.predicted
    images = len(found.target)
    occurs = torch.bincount(found.target, minlength=classes)
    guessed = torch.bincount(found.predicted, minlength=classes)
    right = torch.bincount(found.target[hits], minlength=classes)
    recall = (right[occurs > 0].double() / occurs[occurs > 0]).mean()
    either = occurs + guessed
    f1 = (2 * right[either > 0].double() / either[either > 0]).mean()
    top5 = {"top5": 100.0 * int(found.among_top.sum()) / images} if classes >= TOP else {}
    return {
        "top1": 100.0 * int(hits.sum()) / images,
        **top5,
        "mean_per_class": 100.0 * float(recall),
        "macro_f1": 100.0 * float(f1),
    }


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Expected calibration error over all images of a set, 15 bins of equal width, from 0 to 1.

    The mean over bins of |accuracy - mean confidence|, weighted by the bins' shares of images (Guo et al., "On
    calibration of modern neural networks", ICML 2017, equation 3).

    Args:
        confidence: float [N], probabilities of the predicted classes.
        correct: bool [N].

    Raises:
        MissingDependencyError: without torchmetrics.
    """
    try:
        from torchmetrics.functional.classification import binary_calibration_error
    except ImportError:
        raise MissingDependencyError("torchmetrics", "Evaluation", "evaluation") from None
    # torchmetrics gives a confidence of exactly 1, which fp32 often rounds to, a sixteenth bin of its own. Just below
    # 1 it falls into the last one. Its multi-class form reduces to this one, and wants all probabilities.
    below = confidence.double().clamp(max=1.0 - 2.0**-24)
    return float(binary_calibration_error(below, correct.long(), n_bins=BINS, norm="l1"))


def mean_cosine(now: torch.Tensor, start: torch.Tensor) -> float:
    """Mean cosine of the angle between vectors of ``[N, D]`` and ``[N, D]``; 1 where nothing has moved."""
    import torch

    return float(torch.nn.functional.cosine_similarity(now.double(), start.double(), dim=1).mean())


def linear_cka(now: torch.Tensor, start: torch.Tensor) -> float:
    """Linear centred kernel alignment of two representations ``[N, D]`` and ``[N, D']`` of the same N inputs.

    ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms, X and Y being centred over the inputs: from 0 to 1, which is the
    same geometry; NaN where all vectors of one of them are equal, or one is not finite.
    """
    x, y = (features.double() - features.double().mean(dim=0) for features in (now, start))
    return float((y.T @ x).norm().square() / ((x.T @ x).norm() * (y.T @ y).norm()))


def drift(now: torch.Tensor, start: torch.Tensor) -> dict[str, float]:
    """Both measures by name."""
    return {"cosine": mean_cosine(now, start), "cka": linear_cka(now, start)}
