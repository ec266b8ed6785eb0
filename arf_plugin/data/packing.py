"""Images of another size in the rows of a batch: one tensor reaches the model, whatever it holds.

The trainer moves one tensor of images and calls the model once, so smaller images travel as plain numbers in as many
rows of the large ones' shape as they fill. The vision tower takes them apart again (hooks/images.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def packed_rows(count: int, size: int, row_size: int) -> int:
    """Rows of ``row_size`` x ``row_size`` that images of ``size`` x ``size`` fill."""
    return math.ceil(count * size**2 / row_size**2)


def pack(images: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Packs images ``[A, 3, s, s]`` into ``[rows, *shape]``, the last row filled up with zeros."""
    if images.shape[1:] == shape:
        return images
    numbers = images.flatten()
    return F.pad(numbers, (0, -numbers.numel() % math.prod(shape))).view(-1, *shape)


def unpack(rows: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """Undoes `pack`: rows ``[rows, 3, S, S]`` to images ``[count, 3, size, size]``."""
    shape = (count, rows.shape[1], size, size)
    return rows.flatten()[: math.prod(shape)].view(shape)
