"""The average of a model's weights along its training, which can be a teacher and is a good model itself.

After optimizer step t of T, with the weights W_S of the model that trains:

    W <- (1 - w_t) W + w_t W_S,    w_t = k(tau_t) / sum_{j<=t} k(tau_j),    tau_t = (t + 1/2) / (T + 1)

k is the density of Beta(1/2, 1/2), and W begins, at t = 0, as the weights that training starts from. So W is the mean
of all weights so far, in which the first ones, and in the end the last ones, weigh most.

Source: Asadollahzadeh et al., "TRACER: Persistent Regularization for Robust Multimodal Finetuning", arXiv 2605.29380,
Algorithm 1, re-derived. Ours: BatchNorm statistics are those of the model that trains, as in torch's ``AveragedModel``
(means over batches are no weights), and in several processes those of the first one, as DistributedDataParallel has it;
weights below float32 are averaged in float32, where a step of w_t would be lost in rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import nn


def step_weights(steps: int) -> list[float]:
    """w_t for t = 0, ..., ``steps``; the density's constant cancels."""
    taus = [(step + 0.5) / (steps + 1) for step in range(steps + 1)]
    densities = [(tau * (1 - tau)) ** -0.5 for tau in taus]
    return [k / total for k, total in zip(densities, itertools.accumulate(densities), strict=True)]


class WeightAverage:
    """Keeps in ``model``, a copy of it, the average of the model that is ``trained`` for T ``steps``."""

    def __init__(self, model: nn.Module, trained: nn.Module, steps: int) -> None:
        self.model, self.trained = model, trained
        self.weights = step_weights(steps)
        # The model's own tensors where they are precise enough.
        self._sums = {name: _precise(p.detach()) for name, p in model.named_parameters()}
        self._buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after an optimizer step; step 0 is the start."""
        trained = dict(self.trained.named_parameters())
        sums = list(self._sums.values())
        torch._foreach_lerp_(sums, [_precise(trained[name]) for name in self._sums], self.weights[step])
        for name, parameter in self.model.named_parameters():
            if self._sums[name].dtype != parameter.dtype:
                parameter.copy_(self._sums[name])
        own, others = dict(self.model.named_buffers()), dict(self.trained.named_buffers())
        for name in self._buffers:
            own[name].copy_(others[name])
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(own[name], 0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights and buffers by the model's names."""
        return {**self.model.state_dict(), **self._sums}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on with what `state_dict` returned.

        Raises:
            RuntimeError: It is of another model.
        """
        self.model.load_state_dict(state)
        for name, kept in self._sums.items():
            kept.copy_(state[name])


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
