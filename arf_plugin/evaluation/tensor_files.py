"""Checkpoints read piece by piece, so that no whole model need be in memory.

The file is mapped into memory (``torch.load(mmap=True)``, safetensors' ``safe_open``): a page is read when a tensor on
it is used, and optimizer state, which a trainer's checkpoint holds beside the weights, never is. Pages that were used
count as memory until the file is closed, so readers open it for some tensors at a time.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import EvaluationError
from arf_plugin.safe_loading import UnsafeTorchError, first_line, safe_loading
from arf_plugin.untrusted import require_regular

if TYPE_CHECKING:
    import torch

RUN = "arf_run"  # key of what a checkpoint of ours tells of the run behind it; see arf_plugin.evaluation.run_flags
# What torch.compile, several processes, FSDP and activation checkpointing put into the names of weights.
_WRAPPERS = re.compile(
    r"^(module\.|_orig_mod\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


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
    (:mod:`arf_plugin.safe_loading`). What distributed training and torch.compile put before names is removed.

    Args:
        path: a .pt or .safetensors file.

    Attributes:
        path: the file.
        tensors: shape and type by name, in the file's order.
        run: what the file tells of the run behind it, as it stands there; None if nothing.

    Raises:
        EvaluationError: if the file is missing or holds no weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: Any = None
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
                self.run = (file.metadata() or {}).get(RUN)
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as cause:  # safetensors raises many kinds for a damaged file
            raise self._unreadable(cause) from cause
        return self._checked(weights)

    def _map_pickle(self) -> dict[str, torch.Tensor]:
        import torch

        self._exists()
        try:
            mapped = zipfile.is_zipfile(self.path)
            with safe_loading():
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except UnsafeTorchError:
            raise
        except Exception as cause:  # torch raises many kinds for a damaged file
            raise self._unreadable(cause) from cause
        self.run = content.get(RUN) if isinstance(content, dict) else None
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
            or not all(
                isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
            )
        ):
            found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
            raise EvaluationError(
                f"{self.path} holds no weights (found: {found}). Expected a dict of tensors, or one under 'state_dict'."
            )
        plain: dict[str, torch.Tensor] = {}
        for name, value in weights.items():
            if plain_name(name) in plain:
                raise EvaluationError(
                    f"{self.path} holds '{plain_name(name)}' twice, once as '{name}'. Expected the weights of one "
                    "model."
                )
            plain[plain_name(name)] = value
        return plain

    def _exists(self) -> None:
        require_regular(self.path, EvaluationError)
        if not self.path.is_file():
            raise EvaluationError(
                f"There is no checkpoint at {self.path}. Expected a .pt or .safetensors file."
            )

    def _unreadable(self, cause: Exception) -> EvaluationError:
        return EvaluationError(
            f"{self.path} cannot be read as a checkpoint: {first_line(cause)}\n"
            "Expected tensors only, as open_clip's trainer saves them."
        )


def plain_name(name: str) -> str:
    """The name of a weight as the bare model has it.

    >>> plain_name("module._orig_mod.visual.proj")
    'visual.proj'
    """
    return _WRAPPERS.sub("", name)
