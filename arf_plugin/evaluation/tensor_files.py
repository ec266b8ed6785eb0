"""Checkpoints read piece by piece, so that no whole model need be in memory.

The file is mapped into memory (``torch.load(mmap=True)``, safetensors' ``safe_open``): a page is read when a tensor on
it is used, and optimizer state, which a trainer's checkpoint holds beside the weights, never is. Pages that were used
count as memory until the file is closed, so readers open it for some tensors at a time.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import EvaluationError

if TYPE_CHECKING:
    import torch


def plain_numbers() -> list[Any]:
    """What `torch.load(weights_only=True)` may build beside tensors: numbers of numpy's type float64.

    open_clip before 2.30 leaves its learning rate in the optimizer's state as one.
    """
    import numpy as np

    number = np.float64(0).__reduce__()[0]
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")  # numpy 2, numpy 1
    return [*((number, name) for name in names), np.dtype, type(np.dtype(np.float64))]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        dtype: its type.
        shape: its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.count * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        """Describes a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))


class WeightsFile:
    """The weights of a checkpoint, left on disk until a tensor is used.

    Takes what open_clip's trainer writes, a bare state dict, or safetensors. Nothing in the file is executed
    (``weights_only``). The prefix ``module.`` of distributed training is removed.

    Args:
        path: a .pt or .safetensors file.

    Attributes:
        path: the file.
        tensors: shape and type by name, in the file's order.

    Raises:
        EvaluationError: if the file is missing or holds no weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole: dict[str, torch.Tensor] | None = None  # files of before torch 1.6 cannot be mapped
        with self.opened() as weights:
            self.tensors = {name: TensorInfo.of(tensor) for name, tensor in weights.items()}

    @property
    def bytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(info.bytes for info in self.tensors.values())

    @contextmanager
    def opened(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Maps the file. Its pages are given back when the block ends and no tensor of it is held any more.

        Yields:
            Tensors by name, on the CPU; to be read, not written.
        """
        if self._whole is not None:
            yield self._whole
        elif self.path.suffix == ".safetensors":
            yield self._map_safetensors()
        else:
            yield self._map_pickle()

    def _map_safetensors(self) -> dict[str, torch.Tensor]:
        self._exists()
        try:
            from safetensors import safe_open

            with safe_open(self.path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as cause:  # safetensors raises many kinds for a damaged file
            raise self._unreadable(cause) from cause
        return self._checked(weights)

    def _map_pickle(self) -> dict[str, torch.Tensor]:
        import torch

        self._exists()
        try:
            mapped = zipfile.is_zipfile(self.path)
            with torch.serialization.safe_globals(plain_numbers()):
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as cause:  # torch raises many kinds for a damaged file
            raise self._unreadable(cause) from cause
        weights = self._checked(content)
        if not mapped:
            self._whole = weights
        return weights

    def _checked(self, content: Any) -> dict[str, torch.Tensor]:
        import torch

        weights = content.get("state_dict", content) if isinstance(content, dict) else None
        if (
            not isinstance(weights, dict)
            or not weights
            or not all(isinstance(value, torch.Tensor) for value in weights.values())
        ):
            found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
            raise EvaluationError(
                f"{self.path} holds no weights (found: {found}). Expected a dict of tensors, or one under 'state_dict'."
            )
        return {str(name).removeprefix("module."): value for name, value in weights.items()}

    def _exists(self) -> None:
        if not self.path.is_file():
            raise EvaluationError(
                f"There is no checkpoint at {self.path}. Expected a .pt or .safetensors file."
            )

    def _unreadable(self, cause: Exception) -> EvaluationError:
        return EvaluationError(
            f"{self.path} cannot be read as a checkpoint: {str(cause).splitlines()[0] if str(cause) else cause!r}\n"
            "Expected tensors only, as open_clip's trainer saves them."
        )
