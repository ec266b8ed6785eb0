"""Feature anchors: what the starting model made of an anchor is what the fine-tuned one shall make of it.

With f, g the unit features that the model gives image and text of an anchor, f0, g0 those of the starting model, read
from the anchor set, u = f - f0 and v = g - g0 (squares summed over D, means over samples)

    feature      mean(||u||^2 + ||v||^2); for captions, which have no image of their own, mean(||v||^2)
    difference   mean(||u - m||^2 + ||v - m||^2 + ||u - v||^2), m the exponential mean of all u and v

Source of `difference`: Suzuki et al., "Difference Vector Equalization for Robust Fine-tuning of Vision-Language Models"
(DiVE), AAAI 2026, arXiv 2511.09973: average and pairwise vector loss, re-derived. Ours: that f0 and g0 are cached, so
that there is no teacher to run; `feature`; both for the anchors of ARF. docs/anchored-features.md has the details.

Each process takes the mean over its own samples. Processes have as many each, and their gradients are averaged, so the
gradient is that of the mean over all of them.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed
from torch import nn

from arf_plugin.data.batch import OptimizerStep

DECAY = 0.99
MEAN = "arf_difference_mean"  # key of m

# The student's features, and the cached ones that they are held to.
PAIR = (("image_features", "pair_image_feature"), ("text_features", "pair_text_feature"))
CAPTION = (("text_features", "caption_text_feature"),)


class WithTerm(nn.Module):
    """Another loss, which returns its terms by name, and a term of our own beside it: `value`, under ``name``."""

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self.base, self.name = base, name

    def forward(
        self, output_dict: bool = False, **outputs: torch.Tensor
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        """Computes all terms from what the base loss takes; by name, or their sum."""
        losses = {**self.base(**outputs, output_dict=True), self.name: self.value(outputs)}
        return losses if output_dict else total(losses)

    def value(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted term, a scalar."""
        raise NotImplementedError


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of terms."""
    return torch.stack(list(losses.values())).sum()


class FeatureTerm(nn.Module):
    """The term ``feature``.

    Args:
        *names: What the model returns and the part of the batch that it is compared with, for each tower.
    """

    def __init__(self, *names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names

    @torch.compiler.disable  # the parts of a step are no inputs of what the trainer compiles
    def forward(self, outputs: dict[str, torch.Tensor], step: OptimizerStep) -> torch.Tensor:
        """Computes the term, a scalar, in float32 or more.

        Args:
            outputs: The model's unit features ``[n, D]`` of the anchors, all micro-batches one after the other.
            step: The step that they belong to, with the cached features.
        """
        return self.value(*self._differences(outputs, step), step=step)

    def value(self, *differences: torch.Tensor, step: OptimizerStep) -> torch.Tensor:
        """The term of ``u [n, D]`` and ``v [n, D]``."""
        return _mean_square(*differences)

    def _differences(self, outputs: dict[str, torch.Tensor], step: OptimizerStep) -> list[torch.Tensor]:
        found = []
        for output, part in self.names:
            feature = outputs[output]
            feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
            found.append(feature - step.part(part).to(feature, non_blocking=True))
        return found


class DifferenceTerm(FeatureTerm):
    """The term ``difference``.

    m is 0 at first, as u and v are while the model is the starting one. A step uses m as the steps before have left it,
    in all its micro-batches; then 1 % of it becomes the mean of the step's u and v, over all processes.

    Attributes:
        state: What m is kept in between steps, under `MEAN`.
    """

    def __init__(self) -> None:
        super().__init__(*PAIR)
        self.state: MutableMapping[str, Any] = {}
        self._mean: torch.Tensor | None = None
        self._step = -1  # that `_mean` belongs to

    def value(self, *differences: torch.Tensor, step: OptimizerStep) -> torch.Tensor:
        """The term of ``u [n, D]`` and ``v [n, D]``; updates m in the first call of a step."""
        u, v = differences
        if self._mean is None or self._step != step.number:
            mean = self.state.get(MEAN)
            self._mean = torch.zeros_like(u[0]) if mean is None else mean.to(u)
            self._step = step.number
            self.state[MEAN] = torch.lerp(_mean_of_all(u, v), self._mean, DECAY)
        return _mean_square(u - self._mean, v - self._mean, u - v)


@torch.no_grad()
def _mean_of_all(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Mean ``[D]`` of u and v over the samples of all processes."""
    mean = torch.cat([u, v]).mean(0)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


def _mean_square(*vectors: torch.Tensor) -> torch.Tensor:
    """Mean over samples of the sum of squared norms of ``[n, D]``."""
    return torch.stack([each.square().sum(-1) for each in vectors]).sum(0).mean()
