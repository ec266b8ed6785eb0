"""open_clip_train.main.create_model_and_transforms: what is done to the model before it trains.

BatchNorm is the one layer that mixes samples of a batch, so it is frozen or warned about. Two baselines need the
model, too: L2-SP its starting point, LP-FT a head on it. A teacher begins as a copy of it. Text towers learn to take
trimmed texts. Anchors that are held by features are compared with what the model makes of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from arf_plugin.anchors.features import caption_features, pair_features, weights_digest
from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.pairs import list_pair_shards, read_pairs
from arf_plugin.checks.inputs import StartingModel
from arf_plugin.config import ArfConfig
from arf_plugin.data.captions import open_captions
from arf_plugin.data.prompts import load_classnames
from arf_plugin.errors import AnchorSetError, ArfError, EvaluationError, FlagError
from arf_plugin.hooks.session import ModelFacts, Session
from arf_plugin.hooks.text import accept_trimmed, trimmer
from arf_plugin.losses.head import LinearHead, attach_head
from arf_plugin.losses.l2sp import starting_point
from arf_plugin.losses.teacher import frozen_copy
from arf_plugin.resume.rng import make_deterministic, preserved_rng
from arf_plugin.safe_loading import first_line, safe_loading
from arf_plugin.untrusted import utf8
from arf_plugin.weights import watching

CONSTANTS = ("logit_scale", "logit_bias")  # which begin with a value of their own, not with a random one
COMPARED = 8  # pairs and captions, with their features in the anchor set


def create_model_and_transforms(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Prepares the model for what the flags ask for, and notes in the session what others need of it."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if session.config.deterministic:  # after the trainer's own choice of kernels
            make_deterministic()
        try:
            # Also where torch's environment would unpickle --pretrained.
            with watching() as loaded, safe_loading():
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
            session.model.add_teacher(random, found)
            return result
        names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        if session.config.freeze_bn:
            frozen = freeze_batch_norm(model)
            logging.info(f"ARF: {frozen} BatchNorm layers keep their pretrained statistics.")
        elif names and session.config.anchors:
            logging.warning(
                f"ARF: the model has {len(names)} BatchNorm layers (first: {names[0]}). Anchors would enter their "
                "batch statistics, so the loss is not the sum of three separate ones. --arf-freeze-bn makes it exact."
            )
        if session.config.head:
            _start_from_probe(model, session.config.head, session.config.classnames or "")
        start = starting_point(model) if session.config.l2sp else None
        name = str(args[0] if args else kwargs["model_name"])
        starting = _starting_model(model, name, result[2], session.config, kwargs)
        teacher = frozen_copy(model) if session.config.teacher else None
        session.model = ModelFacts(model, random, found, start, starting, teacher)
        return result

    return wrapped


def _starting_model(
    model: nn.Module, name: str, preprocess: Any, config: ArfConfig, options: Mapping[str, Any]
) -> StartingModel | ArfError | None:
    """What the rules of the checks judge the starting model by: its features of a few anchors, beside those in the set.

    Leaves model and random numbers as they are. None where no features are needed, and in all processes but the first;
    an error where the set cannot be read.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if not first or not config.by_feature:
        return None
    known = inspect.signature(open_clip.get_tokenizer).parameters
    named = {"context_length": options.get("force_context_length"), "cache_dir": options.get("cache_dir")}
    named = {key: each for key, each in named.items() if each and key in known}
    tokenize = open_clip.get_tokenizer(name, **named)
    device = next(model.parameters()).device
    dtype = open_clip.get_input_dtype(options.get("precision", "fp32"))
    assert config.anchors is not None
    compared: list[tuple[str, float]] = []
    dim = 0
    try:
        with preserved_rng(), torch.no_grad(), _evaluating(model):
            towers: Any = model
            for place, tower, given, cached in _anchors(config, preprocess, tokenize):
                if tower == "image":
                    found = towers.encode_image(given.to(device=device, dtype=dtype), normalize=True)
                else:
                    found = towers.encode_text(given.to(device), normalize=True)
                dim = found.shape[1]
                if len(cached) == dim:
                    compared.append((place, float(found[0].cpu().double() @ torch.tensor(cached).double())))
        digest = weights_digest(model.state_dict())
    except ArfError as error:
        return error
    except (OSError, ValueError, ImportError) as cause:
        # Where the set is not there at all, a rule says so first.
        return AnchorSetError(
            f"{config.anchors}: pairs and captions cannot be compared with their features: {cause}"
        )
    exact = not any(each.dtype in (torch.float16, torch.bfloat16) for each in model.parameters())
    return StartingModel(name, digest, dim, exact, tuple(compared))


def _anchors(
    config: ArfConfig, preprocess: Any, tokenize: Any
) -> Iterator[tuple[str, str, torch.Tensor, Any]]:
    """Some anchors: place, tower, what it takes, and the feature in the set."""
    anchors = config.anchors or ""
    if config.pair_features:
        shards = list_pair_shards(anchors)
        chosen = shards[:: max(1, len(shards) // COMPARED)][:COMPARED]
        for url in chosen:
            cached = pair_features(anchors, url)
            rows = {key: row for row, key in enumerate(cached.keys)}
            pairs = (pair for pair in read_pairs(url) if utf8(pair.key) in rows)
            for pair in itertools.islice(pairs, COMPARED // len(chosen)):
                place, row = f"{url}, pair {pair.key}", rows[utf8(pair.key)]
                pixels = preprocess(decode_image(pair.image))[None]
                yield f"{place}, image", "image", pixels, cached.image[row]
                yield f"{place}, text", "text", tokenize([pair.text.decode("utf-8")]), cached.text[row]
    if config.caption_features:
        captions = open_captions(anchors)
        if captions is None:
            return
        features = caption_features(anchors)
        for row in range(len(captions))[:: max(1, len(captions) // COMPARED)][:COMPARED]:
            identity = captions.ids[row].as_py()
            for text, cached in zip(captions.get(identity)[:1], features.get(identity), strict=False):
                yield f"the caption of {identity}", "text", tokenize([text]), cached


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every layer in evaluation mode, and back into the one that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
    """Keeps every BatchNorm layer in evaluation mode, and counts them; its scale and shift still train.

    Replacing ``train`` on the layer leaves parameters, buffers and their names alone, so checkpoints stay ordinary.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.eval()
        layer.train = functools.partial(_stay_in_evaluation, layer)
    return len(layers)


def _stay_in_evaluation(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer
