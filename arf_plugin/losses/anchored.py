"""The objective of ARF: open_clip's own loss, once for the task and once for each kind of anchor.

    L = base(x, t_cls) + w_cap * base(x, t_cap) + w_pair * base(x_a, t_a)

Source: Han et al., "Anchor-based Robust Finetuning of Vision-Language Models", CVPR 2024, section 3. The paper adds
the three terms with weight one; the weights are ours. So are steps without anchors: with ``every`` n the two anchor
terms are there on one step in n, with n times their weight, which leaves the expected gradient as it is. And so are
anchors by their features (`arf_plugin.losses.features`), whose terms do without the base loss and its temperature.

In several processes each base loss gathers the features of its own term, so those of the task's images travel twice:
1.2 times the minimum with A = B. A single gather for all terms would save far less than one per cent of a step
(scripts/bench/distributed.py), and would have to know how each base loss gathers; so there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from arf_plugin.data.batch import OptimizerStep
from arf_plugin.losses.features import CAPTION, PAIR, DifferenceTerm, FeatureTerm, total


class AnchoredLoss(nn.Module):
    """Splits the features of one concatenated forward and applies the base loss to each part.

    Args:
        build_base: Builds the loss that open_clip would have used for the same flags. It is called once per term,
            since open_clip's losses cache labels for one batch size.
        step: What the current optimizer step's micro-batches are made of; who loads them keeps it up to date.
        caption_weight: w_cap; None where no step has captions.
        pair_weight: w_pair; None where no step has pairs.
        every: One optimizer step in so many has anchors.
        caption_loss: ``contrastive``, the base loss; or ``feature``.
        pair_loss: The same, or ``difference``.
    """

    def __init__(
        self,
        build_base: Callable[[], nn.Module],
        step: OptimizerStep,
        caption_weight: float | None = 1.0,
        pair_weight: float | None = 1.0,
        every: int = 1,
        caption_loss: str = "contrastive",
        pair_loss: str = "contrastive",
    ) -> None:
        super().__init__()
        self.step = step
        self.caption_weight = (caption_weight or 0.0) * every
        self.pair_weight = (pair_weight or 0.0) * every
        self.task = build_base()
        self.caption_anchor = None if caption_weight is None else _term(caption_loss, CAPTION, build_base)
        self.pair_anchor = None if pair_weight is None else _term(pair_loss, PAIR, build_base)

    def forward(
        self, output_dict: bool = False, **outputs: torch.Tensor
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        """Computes the weighted terms.

        Args:
            output_dict: Return the terms by name; their sum otherwise, like open_clip's losses.
            **outputs: What the model returned for the step's micro-batches, one after the other: ``image_features``
                ``[n * (B + A), D]``, ``text_features`` ``[n * (2B + A), D]``, ``logit_scale`` and what else the base
                loss takes. Names that end in ``image_features`` or ``text_features`` (also a distillation teacher's)
                are split, others passed on. On a step without anchors there are ``n * B`` of either kind.

        Returns:
            Scalars: the base loss's own terms for the task, ``caption_anchor_loss`` and ``pair_anchor_loss``. They
            are weighted already, because the trainer sums every value it gets. On a step without anchors these two
            are 0: the trainer would go on to log the last value of a term that is gone.
        """
        task, caption, pair = self._split(outputs)
        losses = dict(self.task(**task, output_dict=True))
        for name, term, weight, part in (
            ("caption_anchor_loss", self.caption_anchor, self.caption_weight, caption),
            ("pair_anchor_loss", self.pair_anchor, self.pair_weight, pair),
        ):
            if term is None:
                continue
            if not self.step.anchored:
                losses[name] = outputs["logit_scale"].new_zeros(())
            elif isinstance(term, FeatureTerm):
                losses[name] = weight * term(part, self.step)
            else:
                losses[name] = weight * total(term(**part, output_dict=True))
        return losses if output_dict else total(losses)

    def _split(self, outputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
        """What the base loss takes for the task's own texts, for its captions and for pairs."""
        task, caption, pair = {}, {}, {}
        for name, value in outputs.items():
            if name.endswith("image_features"):
                task[name], pair[name] = self.step.split_images(value)
                caption[name] = task[name]
            elif name.endswith("text_features"):
                task[name], caption[name], pair[name] = self.step.split_texts(value)
            else:
                task[name] = caption[name] = pair[name] = value
        return task, caption, pair


def _term(loss: str, names: tuple[tuple[str, str], ...], build_base: Callable[[], nn.Module]) -> nn.Module:
    if loss == "contrastive":
        return build_base()
    return DifferenceTerm() if loss == "difference" else FeatureTerm(*names)
