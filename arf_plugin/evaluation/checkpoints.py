"""Reads and writes open_clip checkpoints, tensors only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.anchors.files import replacing
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.head import Head, split_head
from arf_plugin.evaluation.tensor_files import WeightsFile

if TYPE_CHECKING:
    import torch


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads the weights of a checkpoint: one written by open_clip's trainer, a bare state dict, or safetensors.

    Nothing in the file is executed (``weights_only``). The prefix ``module.`` of distributed training is removed.

    Returns:
        Tensors by name, on the CPU, mapped from the file: a page is read when it is used.

    Raises:
        EvaluationError: if the file is missing or holds no weights.
    """
    with WeightsFile(path).opened() as weights:
        return dict(weights)


def write_weights(path: Path, weights: dict[str, torch.Tensor], name: str) -> None:
    """Writes weights as open_clip's trainer does, so that ``--resume`` and ``--pretrained`` take them.

    Args:
        path: target; a ``.safetensors`` file holds the bare tensors.
        weights: tensors by name.
        name: the run's name, kept in the checkpoint.
    """
    import torch

    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({key: value.contiguous() for key, value in weights.items()}, temporary)
        else:
            torch.save({"name": name, "state_dict": weights}, temporary)


def load_into(model: torch.nn.Module, path: Path) -> Head | None:
    """Loads a checkpoint's weights into a model of the same architecture.

    Returns:
        The linear head that the checkpoint holds beside the model's weights, if any.

    Raises:
        EvaluationError: naming the first weights that do not fit.
    """
    weights, head = split_head(read_weights(path))
    problems = difference(model.state_dict(), weights)
    if problems:
        raise EvaluationError(
            f"{path} is a checkpoint of another architecture than --model: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. Name the model it was trained with."
        )
    model.load_state_dict(weights)
    return head


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Says how two sets of weights differ in names and shapes; empty if they do not."""
    problems = []
    for name, tensor in expected.items():
        if name not in found:
            problems.append(f"'{name}' is missing")
        elif found[name].shape != tensor.shape:
            problems.append(f"'{name}' is {list(found[name].shape)} and not {list(tensor.shape)}")
    return problems + [f"'{name}' is not expected" for name in found if name not in expected]
