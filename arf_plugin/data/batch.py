"""The one form of data between disk and loss: a sample, and a batch, is a dictionary of named parts.

    part                  of a sample     of a batch
    image                 [3, H, W]       [B, 3, H, W]    task images x
    text                  a text          [B, L]          their class prompts t_cls, or own texts
    label                 a number        [B]             their classes; a linear head reads them in the texts' place
    caption_text          a text          [B, L]          their caption anchors t_cap
    caption_text_feature  [D]             [B, D]          what the starting model makes of these, from the anchor set
    pair_image            [3, H, W]       [A, 3, H, W]    images of pair anchors x_a
    pair_text             [L]             [A, L]          their texts t_a
    pair_image_feature    [D]             [A, D]          what the starting model makes of x_a
    pair_text_feature     [D]             [A, D]          and of t_a
    index                 a number        [B] or [A]      of a seeded stream: which raw samples these are
    teacher_image_feature, teacher_text_feature  [B, D]    what a teacher makes of x and t_cls, where a step has one

B task samples and A pair anchors per process and micro-batch, L tokens per text, D features. A new part is a name that
a loader puts into its samples: `collate` stacks it, the loaders hand it on, and `OptimizerStep.parts` brings to the
loss what no tower takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from arf_plugin.data.trim import TextTrimmer

Sample = dict[str, Any]
Batch = dict[str, torch.Tensor]
Preprocess = Callable[[Any], torch.Tensor]
Tokenize = Callable[[list[str]], torch.Tensor]

# What the two towers take, in this order; the features that come out are split by it again.
IMAGES = ("image", "pair_image")
TEXTS = ("text", "label", "caption_text", "pair_text")


def collate(samples: list[Sample], tokenize: Tokenize) -> Batch:
    """Makes a batch of samples: tensors and numbers are stacked, texts tokenized all at once."""
    batch: dict[str, Any] = default_collate(samples)
    return {name: tokenize(part) if isinstance(part, list) else part for name, part in batch.items()}


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """What a micro-batch is made of.

    Images are ``[x; x_a]`` (B + A), texts ``[t_cls; t_cap; t_a]`` (B + B + A, or without a kind that is off).
    The counts may differ, because CLIP's towers run independently of each other.

    Attributes:
        task: B, task samples per process and micro-batch.
        captions: Whether each task image has a caption anchor.
        pairs: A, pair anchors per process and micro-batch; 0 without.
    """

    task: int
    captions: bool = False
    pairs: int = 0

    @classmethod
    def of(cls, batch: Batch) -> BatchLayout:
        """The layout of a batch."""
        pairs = batch.get("pair_image")
        return cls(len(batch["image"]), "caption_text" in batch, 0 if pairs is None else len(pairs))

    @property
    def images(self) -> int:
        """B + A."""
        return self.task + self.pairs

    @property
    def image_sizes(self) -> list[int]:
        """Sizes of the image parts: task, pairs."""
        return [self.task, self.pairs]

    @property
    def text_sizes(self) -> list[int]:
        """Sizes of the text parts: class prompts, captions, pair texts."""
        return [self.task, self.task if self.captions else 0, self.pairs]


class OptimizerStep:
    """What the loss needs to know of an optimizer step beside features: its micro-batches, in order.

    The loader notes each micro-batch as it hands it out; the loss, which gets the features of all of them one after
    the other, reads what they were made of.

    Args:
        accum_freq: Micro-batches in an optimizer step.

    Attributes:
        number: Of the current step, among all that have been noted.
        layouts: Of each micro-batch of the current step.
        parts: Of each of them, the parts that no tower takes, as they were loaded.
    """

    def __init__(self, accum_freq: int = 1) -> None:
        self.accum_freq = accum_freq
        self.number = 0
        self.layouts: list[BatchLayout] = []
        self.parts: list[Batch] = []

    def note(self, number: int, batch: Batch) -> None:
        """Notes a micro-batch; its number in the epoch tells whether a step begins with it."""
        if number % self.accum_freq == 0:
            self.number += 1
            self.layouts.clear()
            self.parts.clear()
        self.layouts.append(BatchLayout.of(batch))
        self.parts.append({name: part for name, part in batch.items() if name not in IMAGES + TEXTS})

    @property
    def anchored(self) -> bool:
        """Whether the step has anchors."""
        return any(layout.captions or layout.pairs for layout in self.layouts)

    def part(self, name: str) -> torch.Tensor:
        """A part that no tower takes, of all micro-batches one after the other."""
        return torch.cat([parts[name] for parts in self.parts])

    def split_images(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Splits image features of all micro-batches into those of the task and of pairs, ``[n, D]`` each."""
        return _split(features, [layout.image_sizes for layout in self.layouts], "image")

    def split_texts(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Splits text features into those of class prompts, captions and pair texts, ``[n, D]`` each."""
        return _split(features, [layout.text_sizes for layout in self.layouts], "text")


def _split(features: torch.Tensor, sizes: list[list[int]], kind: str) -> list[torch.Tensor]:
    flat = [size for one in sizes for size in one]
    if features.shape[0] != sum(flat):
        raise ValueError(
            f"{features.shape[0]} {kind} features, expected {sum(flat)}: {sizes} of the step's micro-batches"
        )
    pieces = features.split(flat)
    if len(sizes) == 1:
        return list(pieces)
    return [torch.cat(pieces[part :: len(sizes[0])]) for part in range(len(sizes[0]))]


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


def as_tuple(batch: Batch, trimmer: TextTrimmer | None = None) -> tuple[DeviceConcat, DeviceConcat]:
    """The form of a batch that open_clip's trainer takes up to 3.3: ``(images, texts)``.

    Args:
        batch: Its parts.
        trimmer: Finds the length that its texts are cut to; None leaves them whole.
    """
    images, texts = _present(batch, IMAGES), _present(batch, TEXTS)
    return DeviceConcat(*images), DeviceConcat(*texts, columns=trimmer.length(*texts) if trimmer else None)


def as_dictionary(batch: Batch, trimmer: TextTrimmer | None = None) -> dict[str, DeviceConcat]:
    """The form that open_clip 4 takes, where the task's ``prepare_batch`` moves it; see `as_tuple`."""
    images, texts = as_tuple(batch, trimmer)
    return {"image": images, "text": texts}


def _present(batch: Batch, names: Sequence[str]) -> list[torch.Tensor]:
    return [batch[name] for name in names if name in batch]
