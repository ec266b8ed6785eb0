"""open_clip's vision tower, with pair anchors that pass it at less cost than task images.

Pairs may drop patches, or come at a lower resolution. Either way they have fewer tokens than task images, so the tower
runs twice: once for the task images as always, once for the pairs. Parameters, and with them checkpoints, stay as they
were: patch dropout (Li et al. 2022, arXiv 2212.00794) is open_clip's own module and has none, and the position
embedding of the smaller grid is interpolated from the tower's at every step, as open_clip does once when it loads
weights for another image size. Cheaper anchors are ours, not the paper's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import nn

from arf_plugin.data.batch import BatchLayout
from arf_plugin.data.packing import unpack
from arf_plugin.errors import FlagError


def shrink_pairs(
    model: nn.Module,
    layout: Callable[[], BatchLayout | None],
    *,
    dropout: float = 0.0,
    size: int | None = None,
) -> None:
    """Makes the vision tower treat pair anchors on their own while it trains; called again, it forgets the last call.

    Args:
        model: A model of open_clip.
        layout: Reads the sizes of a micro-batch; batches of another size, as in evaluation, pass as before.
        dropout: Part of a pair image's patches that is left out.
        size: Pixels of a pair image's sides, where pairs come smaller (packed into rows); None for the tower's own.

    Raises:
        FlagError: The model's tower is not open_clip's own vision transformer, or cannot take images of that size.
    """
    flags = [*(["--arf-pair-patch-dropout"] if dropout else []), *(["--arf-pair-image-size"] if size else [])]
    visual = _own_transformer(model, " and ".join(flags))
    own = visual.patch_dropout
    own = own.task if isinstance(own, _Switch) else own
    visual.patch_dropout = _Switch(own, PatchDropout(dropout)) if dropout else own
    visual.arf_pairs = _Pairs(layout, size, _Positions(visual, size) if size is not None else None)
    # A method of the tower, so that a copy of the model (a moving average of its weights) has one of its own.
    visual.forward = types.MethodType(_forward, visual)


@dataclasses.dataclass
class _Pairs:
    """How a tower treats pairs; the arguments of `shrink_pairs`."""

    layout: Callable[[], BatchLayout | None]
    size: int | None
    positions: _Positions | None


def _forward(visual: Any, images: torch.Tensor) -> torch.Tensor:
    """The tower's ``forward``: its own, or once for the task images and once for the pairs."""
    whole, pairs, sizes = VisionTransformer.forward, visual.arf_pairs, visual.arf_pairs.layout()
    if not visual.training or sizes is None or not sizes.pairs or len(images) != sizes.rows:
        return whole(visual, images)
    if images.shape[-1] == pairs.size:  # unpacked already: the call below comes through here, too
        return whole(visual, images)
    task, rows = images.split([sizes.task, sizes.rows - sizes.task])
    features = [whole(visual, task)]
    switch = visual.patch_dropout
    with switch if isinstance(switch, _Switch) else contextlib.nullcontext():
        if pairs.positions is None:
            features.append(whole(visual, rows))
        else:
            smaller = {"positional_embedding": pairs.positions(visual.positional_embedding)}
            unpacked = unpack(rows, sizes.pairs, pairs.size)
            features.append(torch.func.functional_call(visual, smaller, (unpacked,)))
    return torch.cat(features)


def pair_transform(model: nn.Module, size: int, augmentation: Any) -> Callable[[Any], torch.Tensor]:
    """The trainer's transform for training images, to images of another size.

    Args:
        model: The model, which knows its preprocessing.
        size: Pixels of the sides.
        augmentation: The trainer's ``--aug-cfg``.
    """
    visual: Any = model.visual
    preprocessing = PreprocessCfg(**{**visual.preprocess_cfg, "size": size})
    transform: Callable[[Any], torch.Tensor] = image_transform_v2(
        preprocessing, is_train=True, aug_cfg=augmentation
    )
    return transform


def _own_transformer(model: nn.Module, flags: str) -> Any:
    visual: Any = getattr(model, "visual", None)
    if type(visual) is not VisionTransformer:
        raise FlagError(
            f"{flags}: only open_clip's own vision transformer can do that; this model's vision tower is "
            f"{type(visual).__name__}.\nDrop the flag, or use fewer pairs: --arf-pair-batch-size"
        )
    return visual


class _Positions:
    """The position embedding for smaller images, interpolated.

    Bicubic interpolation is linear, so it is one small matrix: its backward pass is the same in every run, which torch
    does not promise of its own on GPUs.

    Args:
        visual: The vision tower.
        size: Pixels of the images' sides.
    """

    def __init__(self, visual: Any, size: int) -> None:
        (height, width), (patch_height, patch_width) = visual.image_size, visual.patch_size
        if height != width or patch_height != patch_width or size % patch_height or not 0 < size < height:
            raise FlagError(
                f"--arf-pair-image-size {size}: expected a multiple of the patches' {patch_height} pixels below the "
                f"{height} x {width} of the model's images, which must be square."
            )
        grid, smaller = height // patch_height, size // patch_height
        each = torch.eye(grid**2, dtype=torch.float64).view(1, grid**2, grid, grid)
        resized = F.interpolate(each, (smaller, smaller), mode="bicubic", antialias=True, align_corners=False)
        self.matrix = resized.flatten(2)[0].T  # [s * s, g * g]

    def __call__(self, embedding: torch.Tensor) -> torch.Tensor:
        """``[1 + g * g, W]`` of the tower to ``[1 + s * s, W]``, in single precision at least."""
        with torch.autocast(embedding.device.type, enabled=False):
            precise = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            self.matrix = self.matrix.to(precise)
            return torch.cat([precise[:1], self.matrix @ precise[1:]]).to(embedding.dtype)


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
