"""Random number generators of a process: seeded, isolated, noted and put back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def make_deterministic() -> None:
    """Makes torch choose deterministic kernels, or refuse where it has none.

    cuBLAS reads its variable when it is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits that depends on all parts, on every machine and Python alike."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_loading(*parts: object) -> None:
    """Seeds what image transforms draw from: torch's CPU generator, NumPy's and Python's."""
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach a GPU's generator, too
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def seed_everything(*parts: object) -> None:
    """Seeds the generators of a training process, those of its GPUs included."""
    seed_loading(*parts)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(derive_seed(*parts))


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Leaves this process's CPU generators as they were, whatever is drawn inside."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def rng_state() -> dict[str, Any]:
    """The state of all generators as tensors and numbers, which ``torch.load(weights_only=True)`` reads."""
    numpy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, gauss = numpy
    version, words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(words), python_gauss],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` noted."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, python_gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), python_gauss))
