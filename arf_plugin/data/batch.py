"""How the three kinds of samples share one forward: concatenated on the device, split again by known sizes.

Notation: B task samples and A pair anchors per process and micro-batch, L tokens per text, D features, n
micro-batches under ``--accum-freq``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The parts of a micro-batch.

    Images are ``[x; x_a]`` (B + A), texts ``[t_cls; t_cap; t_a]`` (B + B + A, or without a half that is off).
    The counts may differ, because CLIP's towers run independently of each other.

    Attributes:
        task: B, task samples per process and micro-batch.
        captions: Whether each task image has a caption anchor.
        pairs: A, pair anchors per process and micro-batch; 0 if that term is off.
    """

    task: int
    captions: bool = False
    pairs: int = 0

    @property
    def images(self) -> int:
        """Images in a micro-batch."""
        return self.task + self.pairs

    @property
    def image_sizes(self) -> list[int]:
        """Sizes of the image parts: task, pairs."""
        return [self.task, self.pairs]

    @property
    def text_sizes(self) -> list[int]:
        """Sizes of the text parts: class prompts, captions, pair texts."""
        return [self.task, self.task if self.captions else 0, self.pairs]

    def split_images(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Splits image features ``[n * (B + A), D]`` into task ``[n * B, D]`` and pairs ``[n * A, D]``."""
        return _split(features, self.image_sizes, "image")

    def split_texts(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Splits text features into class prompts, captions and pair texts, ``[n * size, D]`` each."""
        return _split(features, self.text_sizes, "text")


def _split(features: torch.Tensor, sizes: list[int], kind: str) -> list[torch.Tensor]:
    total = sum(sizes)
    count, rest = divmod(features.shape[0], total)
    if rest or not count:
        raise ValueError(
            f"{features.shape[0]} {kind} features are no multiple of the micro-batch's {total} ({sizes})"
        )
    if count == 1:
        return list(features.split(sizes))
    # Under gradient accumulation whole micro-batches follow one another, so each part is a strided slice.
    parts = features.unflatten(0, (count, total)).split(sizes, dim=1)
    return [part.flatten(0, 1) for part in parts]


class DeviceConcat:
    """Tensors that become one, along the first dimension, where the trainer moves them to its device.

    Concatenating on the device leaves the host with nothing to do but to start the copies.

    Args:
        *parts: The tensors, equal in all dimensions but the first.
        columns: Keep only so many of the second dimension; None for all. Done on the device, too, since a part of a
            tensor in pinned memory would have to be copied before it could be sent.
    """

    def __init__(self, *parts: torch.Tensor, columns: int | None = None) -> None:
        self.parts = parts
        self.columns = columns

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Moves every part like ``torch.Tensor.to`` and returns their concatenation."""
        return self.moved(lambda part: part.to(*args, **kwargs))

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Moves every part by a function and returns their concatenation."""
        parts = [move(part) for part in self.parts]
        if self.columns is not None:
            parts = [part[:, : self.columns] for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
