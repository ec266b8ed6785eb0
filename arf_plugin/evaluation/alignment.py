"""The weights of one checkpoint in the form of another's, where both are of one architecture at heart.

A run may give its model another image size or text length, or a loss with a bias (``--siglip``), than the weights that
it started from had, and open_clip converts those when it loads them. Before the two are mixed, the older ones are
converted likewise, without a model: the newer ones say what form is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING

from arf_plugin.evaluation.checkpoints import CONSTANT

if TYPE_CHECKING:
    import torch

_VISUAL, _TEXTS = "visual.positional_embedding", ("positional_embedding", "text.positional_embedding")


def align(
    weights: Mapping[str, torch.Tensor], form: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Converts weights to the names and shapes of others, as open_clip does when it loads them.

    Names of older text towers, position embeddings of another size, a bias of the loss that only one has (zero, as
    open_clip sets it), constant buffers. Whatever else differs is left for the caller to refuse.

    Args:
        weights: tensors by name.
        form: tensors of the wanted names and shapes; their values do not count, but for constant buffers.

    Returns:
        The weights; tensors that need no conversion are the given ones.
    """
    if weights.keys() == form.keys() and all(weights[name].shape == form[name].shape for name in form):
        return weights
    found = dict(weights)
    if _TEXTS[0] in found and _TEXTS[0] not in form and _TEXTS[1] in form:
        from open_clip.model import convert_to_custom_text_state_dict

        found = convert_to_custom_text_state_dict(found)
    for name in [name for name in found if name not in form]:
        if name == "logit_bias" or name.endswith(CONSTANT):
            del found[name]
    for name, wanted in form.items():
        if name not in found and name == "logit_bias":
            found[name] = wanted.new_zeros(wanted.shape)
        elif name not in found and name.endswith(CONSTANT):
            found[name] = wanted
        elif name in found and name.startswith("logit_") and found[name].numel() == wanted.numel():
            found[name] = found[name].reshape(wanted.shape)
    _resize_image(found, form)
    _resize_text(found, form)
    return found


def _resize_image(found: dict[str, torch.Tensor], form: Mapping[str, torch.Tensor]) -> None:
    if not _differs(found, form, _VISUAL):
        return
    from open_clip.model import resize_pos_embed

    patches = len(form[_VISUAL]) - 1
    side = math.isqrt(max(patches, 0))
    old = len(found[_VISUAL]) - 1
    if side * side == patches and old > 0 and math.isqrt(old) ** 2 == old:  # which grid is it otherwise?
        dtype = found[_VISUAL].dtype
        found[_VISUAL] = found[_VISUAL].float()
        resize_pos_embed(found, SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side))))
        found[_VISUAL] = found[_VISUAL].to(dtype)


def _resize_text(found: dict[str, torch.Tensor], form: Mapping[str, torch.Tensor]) -> None:
    for name in _TEXTS:
        if _differs(found, form, name):
            from open_clip.model import resize_text_pos_embed

            dtype = found[name].dtype
            found[name] = found[name].float()
            resize_text_pos_embed(found, SimpleNamespace(positional_embedding=form[name]))
            found[name] = found[name].to(dtype)


def _differs(found: Mapping[str, torch.Tensor], form: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether both have position embeddings of one width and other lengths."""
    if name not in found or name not in form or found[name].ndim != 2 or form[name].ndim != 2:
        return False
    return len(found[name]) != len(form[name]) and found[name].shape[1] == form[name].shape[1]
