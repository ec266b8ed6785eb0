"""How far features have moved from where training started: cosine similarity and linear CKA.

Source of CKA: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019 (arXiv
1905.00414), section 3. Cosine sees any movement, also a rotation of the whole space that image and text towers make
together and that costs no accuracy; CKA is blind to rotations and to scale, and falls where the geometry changes.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def mean_cosine(now: torch.Tensor, start: torch.Tensor) -> float:
    """Mean over rows of the cosine of the angle between ``[N, D]`` and ``[N, D]``; 1 where nothing has moved."""
    return float(functional.cosine_similarity(now.double(), start.double(), dim=1).mean())


def linear_cka(now: torch.Tensor, start: torch.Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same N inputs.

    ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms, X and Y being centred over the inputs.

    Args:
        now: ``[N, D]``.
        start: ``[N, D']``.

    Returns:
        From 0 to 1, which is the same geometry; NaN where all rows of one of them are equal, or one is not finite.
    """
    x, y = (features.double() - features.double().mean(dim=0) for features in (now, start))
    return float((y.T @ x).norm().square() / ((x.T @ x).norm() * (y.T @ y).norm()))


def drift(now: torch.Tensor, start: torch.Tensor) -> dict[str, float]:
    """Both measures by name."""
    return {"cosine": mean_cosine(now, start), "cka": linear_cka(now, start)}
