"""Loads weights of others, and executes nothing that they hold: what training, evaluation and building share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from arf_plugin.errors import ArfError
from arf_plugin.untrusted import printable

_SAFE_TORCH = (2, 6)
_FORCE, _FORCE_NO = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class UnsafeTorchError(ArfError):
    """A torch whose ``weights_only`` can be got round."""

    def __init__(self, version: str) -> None:
        wanted = ".".join(map(str, _SAFE_TORCH))
        super().__init__(
            f"torch {version} runs code that is hidden in a checkpoint, even with weights_only (CVE-2025-32434). "
            f"Loading checkpoints needs torch {wanted} or later: pip install 'torch>={wanted}'",
        )


@contextmanager
def safe_loading() -> Iterator[None]:
    """Within, every ``torch.load`` of this process reads tensors and plain values, and executes nothing.

    Whoever calls it (open_clip, timm, transformers), whatever they ask for, and whatever the environment says: torch
    has a variable that switches the protection off, which does not count here.

    Raises:
        UnsafeTorchError: this torch cannot do so.
    """
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        raise UnsafeTorchError(torch.__version__)
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NO)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(plain_numbers()):
            yield
    finally:
        os.environ.pop(_FORCE, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def plain_numbers() -> list[Any]:
    """What `torch.load(weights_only=True)` may build beside tensors: numbers of numpy's type float64.

    open_clip before 2.30 leaves its learning rate in the optimizer's state as one.
    """
    import numpy as np

    number = np.float64(0).__reduce__()[0]
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")  # numpy 2, numpy 1
    return [*((number, name) for name in names), np.dtype, type(np.dtype(np.float64))]


def first_line(cause: BaseException) -> str:
    """What an error of torch's says first, without the escape sequences that it is coloured with."""
    text = str(cause).strip()
    return printable(re.sub(r"\x1b\[\d*m", "", text.splitlines()[0]))[:300] if text else repr(cause)
