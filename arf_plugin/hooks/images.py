"""open_clip's vision tower, with pair anchors that drop patches while task images keep all of theirs.

Images with and without dropped patches have different numbers of tokens, so the tower runs once for the task images
and once for the pairs. Patch dropout is open_clip's own module (Li et al. 2022, arXiv 2212.00794); it has no
parameters, so checkpoints stay what they were. Dropping patches of anchors alone is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import nn

from arf_plugin.data.batch import BatchLayout
from arf_plugin.errors import FlagError


def drop_pair_patches(model: nn.Module, probability: float, layout: Callable[[], BatchLayout | None]) -> None:
    """Makes the vision tower drop patches of pair anchors while it trains.

    Args:
        model: A model of open_clip.
        probability: Share of an image's patches that is left out.
        layout: Reads the sizes of a micro-batch; batches of another size, as in evaluation, pass as before.

    Raises:
        FlagError: The model's tower is not open_clip's own vision transformer.
    """
    visual: Any = getattr(model, "visual", None)
    if type(visual) is not VisionTransformer:
        raise FlagError(
            f"--arf-pair-patch-dropout needs open_clip's own vision transformer; this model's vision tower is "
            f"{type(visual).__name__}.\nDrop the flag, or use fewer pairs: --arf-pair-batch-size"
        )
    whole = visual.forward
    dropout = _Switch(visual.patch_dropout, PatchDropout(probability))

    def forward(images: torch.Tensor) -> torch.Tensor:
        sizes = layout()
        if not visual.training or sizes is None or not sizes.pairs or len(images) != sizes.images:
            return whole(images)
        task, pairs = images.split(sizes.image_sizes)
        task_features = whole(task)
        with dropout:
            return torch.cat([task_features, whole(pairs)])

    visual.patch_dropout = dropout
    visual.forward = forward


class _Switch(nn.Module):
    """The tower's own patch dropout, and inside a ``with`` block that of pair anchors."""

    def __init__(self, task: nn.Module, pairs: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.pairs = pairs
        self.on_pairs = False

    def __enter__(self) -> None:
        self.on_pairs = True

    def __exit__(self, *error: object) -> None:
        self.on_pairs = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens ``[N, 1 + patches, W]`` to ``[N, 1 + kept, W]``."""
        kept: torch.Tensor = (self.pairs if self.on_pairs else self.task)(tokens)
        return kept
