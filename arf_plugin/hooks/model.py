"""open_clip_train.main.create_model_and_transforms: BatchNorm is the one layer that mixes samples of a batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from arf_plugin.hooks.session import Session


def create_model_and_transforms(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Freezes BatchNorm statistics if asked to; warns where anchors would change them."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        names = [name for name, module in result[0].named_modules() if isinstance(module, _BatchNorm)]
        if session.config.freeze_bn:
            logging.info(
                f"ARF: {freeze_batch_norm(result[0])} BatchNorm layers keep their pretrained statistics."
            )
        elif names and session.config.anchors:
            logging.warning(
                f"ARF: the model has {len(names)} BatchNorm layers (first: {names[0]}). Anchors would enter their "
                "batch statistics, so the loss is not the sum of three separate ones. --arf-freeze-bn makes it exact."
            )
        return result

    return wrapped


def freeze_batch_norm(model: nn.Module) -> int:
    """Keeps every BatchNorm layer in evaluation mode; its scale and shift still train.

    Replacing ``train`` on the layer leaves parameters, buffers and their names alone, so checkpoints stay ordinary.

    Returns:
        The number of such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.eval()
        layer.train = functools.partial(_stay_in_evaluation, layer)
    return len(layers)


def _stay_in_evaluation(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer
