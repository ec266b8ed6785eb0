"""Where models run, and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arf_plugin.errors import FlagError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "bf16")


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the device of a name; ``auto`` is this process's GPU if there is one, else the CPU.

    ``cuda`` without a number is this process's GPU, too, and gets its number: `torch.cuda.set_device` wants one.

    Raises:
        FlagError: if the device does not exist here.
    """
    import torch

    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise FlagError(f"--device {name} is no torch device. Expected auto, cpu, cuda or cuda:N.") from cause
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FlagError(f"--device {name}: torch sees no GPU here. Use --device cpu, or auto.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a precision; ``auto`` is fp16 on a GPU and fp32 elsewhere."""
    import torch

    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
