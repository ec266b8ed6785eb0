"""open_clip_train.main.create_model_and_transforms: what is done to the model before it trains.

BatchNorm is the one layer that mixes samples of a batch, so it is frozen or warned about. Two baselines need the
model, too: L2-SP its starting point, LP-FT a head on it. A teacher begins as a copy of it. Text towers learn to take
trimmed texts.
"""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from arf_plugin.data.prompts import load_classnames
from arf_plugin.errors import EvaluationError, FlagError
from arf_plugin.hooks.session import ModelFacts, Session
from arf_plugin.hooks.starting import starting_model
from arf_plugin.hooks.text import accept_trimmed, trimmer
from arf_plugin.losses.head import LinearHead, attach_head
from arf_plugin.losses.l2sp import starting_point
from arf_plugin.losses.teacher import frozen_copy
from arf_plugin.resume.rng import make_deterministic
from arf_plugin.safe_loading import first_line, safe_loading
from arf_plugin.weights import watching

CONSTANTS = ("logit_scale", "logit_bias")  # which begin with a value of their own, not with a random one


def create_model_and_transforms(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Freezes BatchNorm statistics if asked to, or warns where anchors would change them; prepares baselines."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if session.config.deterministic:  # after the trainer's own choice of kernels
            make_deterministic()
        try:
            with (
                watching() as loaded,
                safe_loading(),
            ):  # also where torch's environment would unpickle --pretrained
                result = original(*args, **kwargs)
        except pickle.UnpicklingError as error:
            raise FlagError(
                f"The model's weights cannot be loaded: {first_line(error)}\nExpected tensors only, as open_clip's "
                "trainer saves them: see --pretrained and --model."
            ) from error
        model = result[0]
        random = tuple(
            name for name in loaded.random_parts(model) if name.rpartition(".")[2] not in CONSTANTS
        )
        found = trimmer(model)
        if not isinstance(found, str) and session.config.trim_text != "off":
            accept_trimmed(model)
        if session.model is not None:  # the trainer's second model is a distillation teacher: left as it is
            session.model = session.model.with_teacher(random, found)
            return result
        names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        if session.config.freeze_bn:
            logging.info(
                f"ARF: {freeze_batch_norm(model)} BatchNorm layers keep their pretrained statistics."
            )
        elif names and session.config.anchors:
            logging.warning(
                f"ARF: the model has {len(names)} BatchNorm layers (first: {names[0]}). Anchors would enter their "
                "batch statistics, so the loss is not the sum of three separate ones. --arf-freeze-bn makes it exact."
            )
        if session.config.head:
            _start_from_probe(model, session.config.head, session.config.classnames or "")
        start = starting_point(model) if session.config.l2sp else None
        name = str(args[0] if args else kwargs["model_name"])
        starting = starting_model(model, name, result[2], session.config, kwargs)
        teacher = frozen_copy(model) if session.config.teacher else None
        session.model = ModelFacts(model, random, found, start, starting, teacher)
        return result

    return wrapped


def _start_from_probe(model: nn.Module, path: str, classnames: str) -> None:
    """Loads weights and head of a checkpoint of ``arf probe`` into the model."""
    # The one thing that training shares with evaluation is this format; no other run imports it.
    from arf_plugin.evaluation.checkpoints import fitted, read_weights
    from arf_plugin.evaluation.head import PREFIX, split_head

    weights, head = split_head(read_weights(Path(path)))
    if head is None:
        raise FlagError(f"--arf-head {path} has no head among its weights. Make one with: arf probe")
    if not head.fits(load_classnames(classnames)):
        raise FlagError(
            f"--arf-head {path} was made for other classes ({len(head.bias)} of them) than --arf-classnames "
            f"{classnames}.\nUse the file that `arf probe --classnames` was given; names and their order count."
        )
    try:
        model.load_state_dict(fitted(model, weights, Path(path)))
    except EvaluationError as error:
        raise FlagError(f"--arf-head {error}") from error
    parts = {name.removeprefix(PREFIX): tensor for name, tensor in head.tensors().items()}
    attach_head(model, LinearHead(**parts).to(next(model.parameters()).device))
    logging.info(f"ARF: LP-FT starts from the weights and the head of {path}; the text tower is frozen.")


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
