"""open_clip's text towers, on texts that were cut to what a batch needs.

`trimmer` knows the towers for which that is exact. `accept_trimmed` gives their transformer, where the time goes, the
part of the mask that fits. CLIP's own tower also adds its whole position embedding: there, token embeddings are padded
to the context length again, the transformer gets the positions that count, and what it leaves out comes back as zeros,
which the pooling never looks at. Parameters, their names and gradients stay what they were; texts of full length pass
untouched, in evaluation for example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import nn

from arf_plugin.data.trim import TextTrimmer
from arf_plugin.errors import IncompatibleUpstreamError


def trimmer(model: Any) -> TextTrimmer | str:
    """What cuts the texts of a model of open_clip's, or the reason in words why nothing can."""
    if type(model) is CLIP:
        end = getattr(model, "text_eos_id", None)
        return _trimmer(model, model.text_pool_type, end, model.context_length)
    if type(model) is not CustomTextCLIP:
        return f"{type(model).__name__} is none of the models for which it is known to be exact"
    text = model.text
    if type(text) is not TextTransformer:
        return f"its text tower is {type(text).__name__}"
    if text.cls_emb is not None:
        return "its text tower is pooled at a class token after the last position"
    return _trimmer(text, text.pool_type, getattr(text, "eos_id", None), text.context_length)


def _trimmer(tower: Any, pool: str, end_token: int | None, context_length: int) -> TextTrimmer | str:
    if tower.attn_mask is None:
        return "its text tower has no causal mask"
    if pool == "argmax":
        return TextTrimmer(context_length)
    if pool == "eos" and end_token is not None:
        return TextTrimmer(context_length, end_token)
    return f"its text tower is pooled by '{pool}', not at the end-of-text token"


def accept_trimmed(model: Any) -> None:
    """Makes a model that `trimmer` approves of take texts ``[N, L]`` shorter than its context length."""
    if type(model) is CLIP:
        padding = _Padding(model.context_length)
        model.token_embedding.register_forward_hook(padding.pad_embeddings)
        model.transformer.register_forward_pre_hook(padding.cut, with_kwargs=True)
        model.transformer.register_forward_hook(padding.pad)
    transformer = model.transformer if type(model) is CLIP else model.text.transformer
    transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)


def _cut_mask(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], named: Mapping[str, Any]
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A transformer's mask ``[context_length, context_length]`` to the positions of its input ``[N, L, W]``."""
    if len(inputs) != 1 or set(named) != {"attn_mask"}:
        raise IncompatibleUpstreamError(
            f"the text transformer was called with {len(inputs)} inputs and {sorted(named)}; expected one and an "
            "attn_mask.\nUse --arf-trim-text off, and please report the model."
        )
    length = inputs[0].shape[1]
    return inputs, {"attn_mask": named["attn_mask"][:length, :length]}


class _Padding:
    """Hooks on CLIP's own text tower; they run in the order of the methods, once in each forward."""

    def __init__(self, context_length: int) -> None:
        self.context_length = self.length = context_length

    def pad_embeddings(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """``[N, L, W]`` to ``[N, context_length, W]``, as the position embedding wants it."""
        self.length = output.shape[1]
        return self.pad(module, inputs, output)

    def cut(self, module: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The transformer's input ``[N, context_length, W]`` to ``[N, L, W]``."""
        return (inputs[0][:, : self.length], *inputs[1:]), named

    def pad(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """``[N, L, W]`` to ``[N, context_length, W]``."""
        missing = self.context_length - self.length
        return F.pad(output, (0, 0, 0, missing)) if missing else output
