"""L2-SP, a baseline: the trained weights are held to those that fine-tuning starts from.

    L = base + W/2 * sum ||theta - theta_0||^2

Source: Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018
(arXiv 1802.01483), equation 3. Fine-tuning CLIP adds no layers, so the paper's second term, for new ones, is empty. The
sum runs over every parameter that is trained: biases, the scales and shifts of norms and the logit scale are as
pretrained as the rest (ours: the paper does not treat them one by one).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from arf_plugin.losses.features import WithTerm


def starting_point(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies the parameters that can train, by name, without gradient."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class L2SPLoss(WithTerm):
    """Adds the penalty as ``l2sp_loss``, whole in each process: averaging gradients leaves it as it is.

    Args:
        base: The loss to add to; returns its terms by name.
        model: The model that trains.
        start: Its parameters at the start, as `starting_point` copies them; those locked since are dropped.
        weight: W.
        accum_freq: Micro-batches per optimizer step, whose gradients the trainer adds up.
    """

    def __init__(
        self,
        base: nn.Module,
        model: nn.Module,
        start: Mapping[str, torch.Tensor],
        weight: float,
        accum_freq: int = 1,
    ) -> None:
        super().__init__(base, "l2sp_loss")
        self.weight = weight
        self.accum_freq = accum_freq
        # A plain list: the model is no part of the loss, and the copies are not saved anywhere.
        self._trained = [(p, start[name]) for name, p in model.named_parameters() if p.requires_grad]

    def value(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `WithTerm`."""
        squares = [_squared_distance(p, start) for p, start in self._trained]
        penalty = self.weight / 2 * torch.stack(squares).sum()
        share = penalty / self.accum_freq
        # The value is the whole penalty, as for the base loss; the gradient is this micro-batch's share of it.
        return share + (penalty - share).detach()


def _squared_distance(parameter: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    difference = parameter - start
    return difference.to(torch.promote_types(difference.dtype, torch.float32)).square().sum()
