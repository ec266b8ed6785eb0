"""Reads and writes open_clip checkpoints, tensors only, and fits them into models as open_clip does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.anchors.files import replacing
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.head import Head, split_head
from arf_plugin.evaluation.tensor_files import RUN, WeightsFile
from arf_plugin.safe_loading import first_line, safe_loading

if TYPE_CHECKING:
    import torch

BIG_VISION = (".npz", ".npy")  # open_clip reads these by code of its own
# Beside a model's weights, and of no consequence: open_clip's loss uses the bias, OpenAI's files hold the sizes.
_NEEDLESS = ("logit_bias", "input_resolution", "context_length", "vocab_size")
CONSTANT = (".position_ids", ".num_batches_tracked")  # buffers that no image's features depend on


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads the weights of a checkpoint: one written by open_clip's trainer, a bare state dict, or safetensors.

    Nothing in the file is executed. What distributed training and torch.compile put before names is removed.

    Returns:
        Tensors by name, on the CPU, mapped from the file: a page is read when it is used.

    Raises:
        EvaluationError: if the file is missing or holds no weights.
    """
    with WeightsFile(path).opened() as weights:
        return dict(weights)


def write_weights(path: Path, weights: dict[str, torch.Tensor], name: str, run: str | None = None) -> None:
    """Writes weights as open_clip's trainer does, so that ``--resume`` and ``--pretrained`` take them.

    Args:
        path: target; a ``.safetensors`` file holds the bare tensors.
        weights: tensors by name.
        name: the run's name, kept in the checkpoint.
        run: what to tell of the run behind it, from :func:`arf_plugin.evaluation.run_flags.note`.
    """
    import torch

    told = {RUN: run} if run else {}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            tensors = {key: value.contiguous() for key, value in weights.items()}
            save_file(tensors, temporary, metadata={"format": "pt", **told} if told else None)
        else:
            torch.save({"name": name, "state_dict": weights, **told}, temporary)


def load_into(model: torch.nn.Module, path: Path) -> Head | None:
    """Loads a checkpoint's weights into a model of the same architecture, as ``open_clip.load_checkpoint`` does.

    Returns:
        The linear head that the checkpoint holds beside the model's weights, if any.

    Raises:
        EvaluationError: naming the first weights that do not fit; the model may then hold some of them.
    """
    if path.suffix in BIG_VISION:
        _load_big_vision(model, path)
        return None
    weights, head = split_head(read_weights(path))
    model.load_state_dict(fitted(model, weights, path))
    return head


def fitted(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """Converts weights to the form of a model, by the installed open_clip's own conversions.

    Its ``load_checkpoint`` runs as it is on the weights that have been read, and hands over what it would load: names
    of older releases and of other libraries, position embeddings of another size. What a checkpoint may hold or lack
    beside that is a bias of the loss and constant buffers; a model never keeps a random weight.

    Args:
        model: a model of open_clip.
        weights: tensors by name, without a head.
        path: their file, for messages.

    Returns:
        The model's whole state; tensors that need no conversion are those of `weights`.

    Raises:
        EvaluationError: naming the first weights that do not fit.
    """
    import torch

    own = model.state_dict()
    given = {name: tensor for name, tensor in weights.items() if name in own or not _is_needless(name)}
    _halves_to_float(given, own)
    state = _converted(model, given, path)
    for name, tensor in own.items():
        if name not in state and name.endswith(CONSTANT):
            state[name] = tensor
        elif (
            name not in state and name == "logit_bias"
        ):  # as open_clip does, which asks for a scale beside it
            state[name] = torch.zeros_like(tensor)
    for name in [name for name in state if name not in own and _is_needless(name)]:
        del state[name]
    problems = difference(own, state)
    if problems:
        raise EvaluationError(
            f"{path} is a checkpoint of another architecture than --model: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. Name the model it was trained with."
        )
    _warn_of_resizing(given, state, model, path)
    return {name: state[name] for name in own}


def _is_needless(name: str) -> bool:
    return name in _NEEDLESS or name.endswith(CONSTANT)


def _halves_to_float(given: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Lets position embeddings of half precision be interpolated, if they are to be."""
    for name in ("visual.positional_embedding", "positional_embedding", "text.positional_embedding"):
        if name in given and name in own and given[name].shape != own[name].shape:
            given[name] = given[name].float()


def _converted(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """What ``open_clip.load_checkpoint`` would load."""
    from open_clip import factory

    converted: dict[str, torch.Tensor] = {}
    read = factory.load_state_dict
    factory.load_state_dict = lambda *args, **named: dict(weights)
    model.load_state_dict = lambda state, *args, **named: converted.update(state)
    try:
        factory.load_checkpoint(model, "weights.pt")
    except Exception as cause:  # whatever a conversion meets
        raise EvaluationError(
            f"{path} is a checkpoint of another architecture than --model; open_clip cannot convert it: "
            f"{first_line(cause)}. Name the model it was trained with."
        ) from cause
    finally:
        factory.load_state_dict = read
        del model.load_state_dict
    return converted


def _warn_of_resizing(
    given: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], model: torch.nn.Module, path: Path
) -> None:
    """Says that a model sees another size than the checkpoint was trained for, and which flag changes that."""
    for name in state:
        old = given.get(name, given.get(name.removeprefix("text.")))
        if not name.endswith("positional_embedding") or old is None or old.shape == state[name].shape:
            continue
        if name.startswith("visual."):
            patches = len(old) - 1
            side = round(patches**0.5)
            patch = getattr(model.visual, "patch_size", None)
            patch = patch[0] if isinstance(patch, tuple) else patch
            size = str(side * patch) if side * side == patches and patch else "PIXELS"
            flag, what = f"--force-image-size {size}", "images of another size"
        else:
            flag, what = f"--force-context-length {len(old)}", "texts of another length"
        warnings.warn(
            f"{path} was trained on {what} than the model takes here; its position embedding is interpolated from "
            f"{len(old)} to {len(state[name])}, as open_clip does. To keep it as it is: {flag}",
            stacklevel=4,
        )


def _load_big_vision(model: torch.nn.Module, path: Path) -> None:
    """Loads what Big Vision saves for SigLIP; nothing of the model's own is left."""
    import open_clip
    import torch

    if not path.is_file():
        raise EvaluationError(f"There is no checkpoint at {path}.")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(float("nan"))
    try:
        with safe_loading():
            open_clip.load_checkpoint(model, str(path))
    except Exception as cause:  # numpy and open_clip raise many kinds
        raise EvaluationError(
            f"{path} cannot be loaded into --model as weights of Big Vision: {first_line(cause)}. Expected its .npz of "
            "a SigLIP model, and --model of the same architecture."
        ) from cause
    left = [name for name, tensor in model.named_parameters() if tensor.isnan().any()]
    if left:
        raise EvaluationError(
            f"{path} leaves {len(left)} of the model's weights without a value (first: {left[0]})."
        )


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Says how two sets of weights differ in names and shapes; empty if they do not."""
    problems = []
    for name, tensor in expected.items():
        if name not in found:
            problems.append(f"'{name}' is missing")
        elif found[name].shape != tensor.shape:
            problems.append(f"'{name}' is {list(found[name].shape)} and not {list(tensor.shape)}")
    return problems + [f"'{name}' is not expected" for name in found if name not in expected]
