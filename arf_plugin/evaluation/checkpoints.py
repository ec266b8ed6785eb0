"""Checkpoints of open_clip: read without running what is in them, written, and fitted into models as open_clip does.

Files are mapped into memory (``torch.load(mmap=True)``, safetensors' ``safe_open``): a page is read when a tensor on it
is used, and optimizer state, which a trainer's checkpoint holds beside the weights, never is.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.head import Head, split_head
from arf_plugin.files import replacing
from arf_plugin.safe_loading import UnsafeTorchError, first_line, safe_loading
from arf_plugin.untrusted import require_regular

if TYPE_CHECKING:
    import torch

RUN = "arf_run"  # key of what a checkpoint of ours tells of the run behind it; see arf_plugin.evaluation.run_settings
BIG_VISION = (".npz", ".npy")  # open_clip reads these by code of its own
CONSTANT = (".position_ids", ".num_batches_tracked")  # buffers that no image's features depend on
# Beside a model's weights, and of no consequence: open_clip's loss uses the bias, OpenAI's files hold the sizes.
_NEEDLESS = ("logit_bias", "input_resolution", "context_length", "vocab_size")
# What torch.compile, several processes, FSDP and activation checkpointing put into the names of weights.
_WRAPPERS = re.compile(
    r"^(module\.|_orig_mod\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that has been opened; `run` is what it tells of the run behind it, as it stands there."""

    path: Path
    weights: dict[str, torch.Tensor]  # by name, on the CPU, mapped from the file; to be read, not written
    run: Any = None

    @property
    def bytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens what open_clip's trainer writes, a bare state dict, or safetensors.

    Nothing in the file is executed (:mod:`arf_plugin.safe_loading`). What distributed training and torch.compile put
    before names is removed.

    Raises:
        EvaluationError: if the file is missing or holds no weights.
    """
    require_regular(path, EvaluationError)
    if not path.is_file():
        raise EvaluationError(f"There is no checkpoint at {path}. Expected a .pt or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                run = (file.metadata() or {}).get(RUN)
        else:
            import torch

            mapped = zipfile.is_zipfile(path)  # files of before torch 1.6 cannot be mapped
            with safe_loading():
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            run = content.get(RUN) if isinstance(content, dict) else None
    except UnsafeTorchError:
        raise
    except Exception as cause:  # torch and safetensors raise many kinds for a damaged file
        raise EvaluationError(
            f"{path} cannot be read as a checkpoint: {first_line(cause)}\n"
            "Expected tensors only, as open_clip's trainer saves them."
        ) from cause
    return Checkpoint(path, _plain_weights(content, path), run)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by name; see :func:`open_checkpoint`."""
    return open_checkpoint(path).weights


def _plain_weights(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors in what a file holds, under the names that the bare model has for them."""
    import torch

    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    whole = isinstance(weights, dict) and weights
    if not whole or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise EvaluationError(
            f"{path} holds no weights (found: {found}). Expected a dict of tensors, or one under 'state_dict'."
        )
    plain: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        bare = plain_name(name)
        if bare in plain:
            raise EvaluationError(
                f"{path} holds '{bare}' twice, once as '{name}'. Expected the weights of one model."
            )
        plain[bare] = value
    return plain


def plain_name(name: str) -> str:
    """The name of a weight as the bare model has it.

    >>> plain_name("module._orig_mod.visual.proj")
    'visual.proj'
    """
    return _WRAPPERS.sub("", name)


def write_weights(path: Path, weights: Mapping[str, torch.Tensor], name: str, run: str | None = None) -> None:
    """Writes weights as open_clip's trainer does, so that ``--resume`` and ``--pretrained`` take them.

    Equal weights are equal bytes. A ``.safetensors`` file holds the bare tensors.

    Args:
        path: target.
        weights: tensors by name.
        name: the run's name, kept in the checkpoint.
        run: what to tell of the run behind it, from :func:`arf_plugin.evaluation.run_settings.note`.

    Raises:
        EvaluationError: if they cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    told = {RUN: run} if run else {}
    try:
        with replacing(path) as temporary:
            if path.suffix == ".safetensors":
                tensors = {key: value.contiguous() for key, value in weights.items()}
                save_file(tensors, temporary, metadata={"format": "pt", **told})
            else:
                with temporary.open("wb") as file:  # by its name, torch would put that into the archive
                    torch.save({"name": name, "state_dict": dict(weights), **told}, file)
    except (RuntimeError, SafetensorError) as cause:
        raise EvaluationError(
            f"{path} cannot be written: {first_line(cause)}. Make room, or name another place."
        ) from cause


def load_into(model: torch.nn.Module, path: Path) -> Head | None:
    """Loads a checkpoint into a model of its architecture, as ``open_clip.load_checkpoint`` does; returns its head.

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
    for name in ("visual.positional_embedding", "positional_embedding", "text.positional_embedding"):
        if name in given and name in own and given[name].shape != own[name].shape:
            given[name] = given[name].float()  # half precision cannot be interpolated
    state = _converted(model, given, path)
    for name, tensor in own.items():
        if name not in state and name.endswith(CONSTANT):
            state[name] = tensor
        elif (
            name not in state and name == "logit_bias"
        ):  # as open_clip does, which asks for a scale beside it
            state[name] = torch.zeros_like(tensor)
    state = {name: tensor for name, tensor in state.items() if name in own or not _is_needless(name)}
    if problems := difference(own, state):
        raise EvaluationError(
            f"{path} is a checkpoint of another architecture than --model: {listed(problems)}. Name the model it was "
            "trained with."
        )
    _warn_of_resizing(given, state, model, path)
    return {name: state[name] for name in own}


def _is_needless(name: str) -> bool:
    return name in _NEEDLESS or name.endswith(CONSTANT)


def _converted(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """What ``open_clip.load_checkpoint`` would load."""
    from open_clip import factory

    converted: dict[str, torch.Tensor] = {}
    read = factory.load_state_dict
    factory.load_state_dict = lambda *args, **named: dict(weights)
    vars(model)["load_state_dict"] = lambda state, *args, **named: converted.update(state)
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


def difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """Says how two sets of weights differ in names and shapes; empty if they do not."""
    problems = [f"'{name}' is missing" for name in expected if name not in found]
    problems += [
        f"'{name}' is {list(found[name].shape)} and not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return problems + [f"'{name}' is not expected" for name in found if name not in expected]


def listed(problems: Sequence[str]) -> str:
    """The first three of some problems, and how many more there are."""
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
