"""The model that training starts from, compared with the features of an anchor set, before anything changes it.

`arf_plugin.checks.rules` judges what is found here.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import open_clip
import torch
from torch import nn

from arf_plugin.anchors.features import caption_features, pair_features, weights_digest
from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.pairs import list_pair_shards, read_pairs
from arf_plugin.checks.inputs import StartingModel
from arf_plugin.config import ArfConfig
from arf_plugin.data.captions import open_captions
from arf_plugin.errors import AnchorSetError, ArfError
from arf_plugin.resume.rng import preserved_rng
from arf_plugin.untrusted import utf8

COMPARED = 8  # pairs and captions


def starting_model(
    model: nn.Module, name: str, preprocess: Any, config: ArfConfig, options: Mapping[str, Any]
) -> StartingModel | ArfError | None:
    """Computes the features of a few anchors, leaving model and random numbers as they are.

    Args:
        model: As open_clip has just built it.
        name: Of its configuration.
        preprocess: Its image transform for evaluation.
        config: The ARF flags.
        options: With what open_clip was asked to build it.

    Returns:
        What is known of it; an error where the set cannot be read; None where no features are needed, and in all
        processes but the first.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if not first or not config.by_feature:
        return None
    known = inspect.signature(open_clip.get_tokenizer).parameters
    named = {"context_length": options.get("force_context_length"), "cache_dir": options.get("cache_dir")}
    tokenize = open_clip.get_tokenizer(
        name, **{key: each for key, each in named.items() if each and key in known}
    )
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
    except (
        OSError,
        ValueError,
        ImportError,
    ) as cause:  # where the set is not there at all, a rule says so first
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
