"""Fine-tuning through a linear head with cross-entropy: LP-FT, a baseline.

Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022
(arXiv 2202.10054): first fit a linear probe on frozen features, then train all weights from that head. The head sees
unit image features, and takes the text tower's place: the trainer's batches carry labels instead of texts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class LinearHead(nn.Module):
    """Scores of classes from unit image features.

    In the checkpoints of a model that has it as ``arf_head`` it lies as ``arf_plugin.evaluation.head`` says.

    Args:
        weight: ``[classes, D]``.
        bias: ``[classes]``.
        classnames: Digest of the class names, uint8 ``[32]``; kept, not used here.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, classnames: torch.Tensor) -> None:
        super().__init__()
        # In torch's default dtype whatever the model's: a head is small, and cross-entropy wants the precision.
        self.weight = nn.Parameter(weight.detach().to(torch.get_default_dtype()).clone())
        self.bias = nn.Parameter(bias.detach().to(torch.get_default_dtype()).clone())
        self.register_buffer("classnames", classnames.clone())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``[n, D]`` -> ``[n, classes]``."""
        return functional.linear(features.to(self.weight.dtype), self.weight, self.bias)


def attach_head(model: nn.Module, head: LinearHead) -> None:
    """Makes a CLIP model classify while it trains; in evaluation mode it stays the CLIP model it was.

    The head becomes ``model.arf_head``, so that optimizer and checkpoints have it. What takes no part (text tower,
    logit scale) is frozen. The model is one of open_clip's that returns dictionaries.
    """
    for name, parameter in model.named_parameters():
        if not name.startswith("visual."):
            parameter.requires_grad_(False)
    model.arf_head = head
    model.forward = functools.partial(_forward, model, model.forward)


def _forward(model: Any, original: Any, image: Any = None, text: Any = None) -> Any:
    """open_clip's ``forward(image, text)``; ``text`` holds labels ``[B]`` while training."""
    if not model.training:
        return original(image, text)
    output = original(image)
    return {
        "logits": model.arf_head(output["image_features"]),
        "labels": text,
        "logit_scale": output["logit_scale"],
    }


class HeadLoss(nn.Module):
    """Cross-entropy of what a model with a head returns."""

    def forward(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        output_dict: bool = False,
        **unused: torch.Tensor,
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        """The mean over logits ``[n, classes]`` and labels ``[n]``, int64; the logit scale, which is logged, unused."""
        loss = functional.cross_entropy(logits, labels)
        return {"cross_entropy_loss": loss} if output_dict else loss
