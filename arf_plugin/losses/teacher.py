"""A teacher on the task batch: features are held to those that a frozen model gives the same images and texts.

    L = base + w * mean(||f - f_T||^2 + ||g - g_T||^2)

f and g are the student's unit features of task images and of their texts, f_T and g_T the teacher's; squares are summed
over D, the mean is over the samples of the step. Anchors are left out: they have features of their own to keep.

Source: that an average of the weights along training (`arf_plugin.losses.average`) teaches fine-tuning is TRACER's
(arXiv 2605.29380), whose term distils similarities. Distilling features, the weight, and having the term on one step
in n are ours: with ``every`` n it weighs n times as much there, which leaves the expected gradient as it is.

Each process takes the mean over its own samples, and averaging gradients makes it that over all. The teacher runs in
the loader (`arf_plugin.hooks.teacher`): once per micro-batch, though the trainer's forward passes are two where it
accumulates gradients; its features come with the step's parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from arf_plugin.data.batch import Batch, OptimizerStep
from arf_plugin.losses.features import FeatureTerm, WithTerm

IMAGE, TEXT = "teacher_image_feature", "teacher_text_feature"  # parts of a batch, [B, D]


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that does not train, in evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def teach(
    teacher: nn.Module,
    images: torch.Tensor,
    texts: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Batch:
    """The features of images ``[B, 3, H, W]`` and texts ``[B, L]``, as parts of the batch; all on one device."""
    with autocast():
        output = teacher(images, texts)
    return {IMAGE: output["image_features"], TEXT: output["text_features"]}


class TeacherLoss(WithTerm):
    """Adds ``teacher_loss``, which is 0 on steps without the teacher's features.

    Args:
        base: The loss to add to; returns its terms by name.
        step: What the current optimizer step's micro-batches are made of.
        weight: w, on steps that have the term.
    """

    def __init__(self, base: nn.Module, step: OptimizerStep, weight: float) -> None:
        super().__init__(base, "teacher_loss")
        self.step = step
        self.weight = weight
        self.term = FeatureTerm(("image_features", IMAGE), ("text_features", TEXT))

    def value(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `WithTerm`."""
        if IMAGE not in self.step.parts[0]:
            return outputs["logit_scale"].new_zeros(())
        images = self.step.split_images(outputs["image_features"])[0]
        texts = self.step.split_texts(outputs["text_features"])[0]
        distance: torch.Tensor = self.term({"image_features": images, "text_features": texts}, self.step)
        return self.weight * distance
