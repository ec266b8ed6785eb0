"""WiSE-FT: a straight line in weight space between the original and the fine-tuned model.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, section 3:
theta = (1 - alpha) * theta_original + alpha * theta_fine-tuned.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.checkpoints import difference, read_weights, write_weights

if TYPE_CHECKING:
    import torch


def interpolate(
    original: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Mixes two sets of weights tensor by tensor: ``(1 - alpha) * original + alpha * tuned``.

    Sums are taken in fp64 and returned in the dtype of ``tuned``; at 0 and 1 the result is bit-equal to the end
    point. Integer tensors (BatchNorm's counters) are taken from the nearer end point.

    Args:
        original: tensors by name.
        tuned: the same names and shapes.
        alpha: 0 is the original, 1 the fine-tuned model.

    Raises:
        EvaluationError: if the names or shapes differ, or alpha is outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise EvaluationError(
            f"alpha is {alpha}. Expected a number from 0 (the first) to 1 (the second checkpoint)."
        )
    problems = difference(original, tuned)
    if problems:
        raise EvaluationError(
            f"The two checkpoints are of different architectures; in the second, {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. Only one model's weights can be mixed."
        )
    mixed = {}
    for name, end in tuned.items():
        start = original[name]
        if alpha in (0.0, 1.0) or not end.is_floating_point():
            mixed[name] = (start if alpha < 0.5 else end).clone()
        else:
            mixed[name] = ((1.0 - alpha) * start.double() + alpha * end.double()).to(end.dtype)
    return mixed


def interpolate_files(original: Path, tuned: Path, alpha: float, out: Path) -> None:
    """Mixes two checkpoints and writes the result atomically; see :func:`interpolate`."""
    weights = interpolate(read_weights(original), read_weights(tuned), alpha)
    write_weights(out, weights, f"{original.stem} and {tuned.stem} at {alpha:g}")
