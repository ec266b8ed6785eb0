"""Training steps to compare: plain open_clip's, ARF's, and its cheaper settings, in open_clip's own train_one_epoch.

Batches are ready in memory, so what is measured is the step alone. Prompts, captions and pair texts have 12, 18 and 24
tokens unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip_train.precision import get_autocast
from open_clip_train.train import train_one_epoch

from arf_plugin.data.batch import IMAGES, TEXTS, Batch, BatchLayout, OptimizerStep, as_tuple
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.hooks.text import accept_trimmed, trimmer
from arf_plugin.losses.anchored import AnchoredLoss
from arf_plugin.losses.average import WeightAverage
from arf_plugin.losses.teacher import TeacherLoss, frozen_copy, teach

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.arguments import training_arguments

TEXT_LENGTHS = (12, 18, 24)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of step.

    Attributes:
        name: Row of the table.
        pairs: A as a part of B; None for a step without anchors.
        trim: Whether texts are cut to the longest of the batch.
        every: One step in so many has anchors, or the teacher.
        accum_freq: Micro-batches that B is divided into.
        checkpointing: Whether activations are computed again for the backward pass.
        pair_loss: --arf-pair-loss; with ``feature`` there are no captions.
        teacher: --arf-teacher, or None.
        bound: Promised time, in units of plain open_clip's; None for no promise.
    """

    name: str
    pairs: float | None = None
    trim: bool = False
    every: int = 1
    accum_freq: int = 1
    checkpointing: bool = False
    pair_loss: str = "contrastive"
    teacher: str | None = None
    bound: float | None = None


class Batches:
    """A loader of ready batches, which tells the loss of each as the trainer's loader does.

    Args:
        batches: Their parts.
        accum_freq: Micro-batches in an optimizer step.
        trimmer: Finds the length that their texts are cut to; None leaves them whole.

    Attributes:
        step: What the loss reads.
        before: Returns what a batch has beside its parts.
        after: Is called when the step of a batch has been made.
    """

    num_samples = 1

    def __init__(self, batches: list[Batch], accum_freq: int, trimmer: TextTrimmer | None) -> None:
        self.batches, self.trimmer = batches, trimmer
        self.step = OptimizerStep(accum_freq)
        self.num_batches = len(batches)
        self.before: Callable[[int, Batch], Batch] = lambda number, batch: {}
        self.after: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            self.step.note(number, {**batch, **self.before(number, batch)})
            yield as_tuple(batch, self.trimmer)
            self.after()


class StepBench:
    """A model with random weights, and steps of it.

    Args:
        name: open_clip's name of the model.
        batch_size: B.
        device: Where it trains.
        rank: This process among all.
        world_size: Number of processes.
        local_loss: With --local-loss --gather-with-grad.
        lengths: Tokens of prompts, captions and pair texts.
        precision: --precision; ``amp`` has no scaler here.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        device: str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        local_loss: bool = False,
        lengths: Sequence[int] = TEXT_LENGTHS,
        precision: str = "fp32",
    ) -> None:
        self.size, self.device = batch_size, device
        self.core, _, _ = open_clip.create_model_and_transforms(name, output_dict=True, device=device)
        self.optimizer = torch.optim.AdamW(self.core.parameters(), lr=1e-6)
        self.image_size = self.core.visual.image_size[0]
        self.trimmer = trimmer(self.core)
        accept_trimmed(self.core)  # texts of full length pass as before
        self.model = torch.nn.parallel.DistributedDataParallel(self.core) if world_size > 1 else self.core
        torch.manual_seed(rank)
        self.images = [torch.randn(batch_size, 3, self.image_size, self.image_size) for _ in range(2)]
        self.texts = [self._texts(length) for length in lengths]
        self.arguments = functools.partial(
            training_arguments,
            device=device,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            model=name,
            precision=precision,
            local_loss=local_loss,
            gather_with_grad=local_loss,
        )

    def step(self, variant: Variant) -> Callable[[], None]:
        """A closure that runs one optimizer step, or a cycle of ``every`` of them."""
        size = self.size // variant.accum_freq
        pairs = int(size * (variant.pairs or 0))
        by_feature = variant.pair_loss == "feature"
        layout = BatchLayout(size, captions=bool(pairs) and not by_feature, pairs=pairs)
        options = self.arguments(accum_freq=variant.accum_freq)
        loss = open_clip.create_loss(options)
        parts = [self._batch(BatchLayout(size))] * variant.accum_freq
        if pairs:
            cached = self._features(pairs) if by_feature else {}
            parts = [self._batch(layout) | cached] * variant.accum_freq + parts * (variant.every - 1)
        elif variant.teacher:
            parts = parts * variant.every
        trimmer = self.trimmer if variant.trim and isinstance(self.trimmer, TextTrimmer) else None
        batches = Batches(parts, variant.accum_freq, trimmer)
        if pairs:
            build = functools.partial(open_clip.create_loss, options)
            weights = {"caption_weight": None, "pair_weight": 10.0} if by_feature else {}
            loss = AnchoredLoss(
                build, batches.step, **weights, every=variant.every, pair_loss=variant.pair_loss
            )
        if variant.teacher:
            loss = self._add_teacher(variant, batches, loss)
        data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}

        def run() -> None:
            self.core.set_grad_checkpointing(variant.checkpointing)
            train_one_epoch(self.model, data, loss, 0, self.optimizer, None, None, None, options)

        return run

    def _add_teacher(self, variant: Variant, batches: Batches, loss: torch.nn.Module) -> torch.nn.Module:
        """Has a teacher run on the first step of a cycle, and the average updated after each."""
        teacher = frozen_copy(self.core)
        average = WeightAverage(teacher, self.core, steps=1)
        autocast = get_autocast(self.arguments().precision, torch.device(self.device).type)

        def features(number: int, batch: Batch) -> Batch:
            if number >= variant.accum_freq:
                return {}
            columns = batches.trimmer.length(batch["text"]) if batches.trimmer else None
            texts = batch["text"][:, :columns].to(self.device)
            return teach(teacher, batch["image"].to(self.device), texts, autocast)

        batches.before = features
        if variant.teacher == "average":
            batches.after = functools.partial(average.update, 1)
        return TeacherLoss(loss, batches.step, 10.0 * variant.every)

    def three_forwards(self) -> None:
        """A step of three separate forwards, with A = B and whole texts."""
        self.core.set_grad_checkpointing(False)
        options = self.arguments()
        loss = open_clip.create_loss(options)
        self.optimizer.zero_grad()
        parts = zip((self.images[0], self.images[0], self.images[1]), self.texts, strict=True)
        with get_autocast(options.precision, torch.device(self.device).type)():
            total = sum(loss(**self.model(x.to(self.device), t.to(self.device))) for x, t in parts)
        total.backward()
        self.optimizer.step()

    def _batch(self, layout: BatchLayout) -> Batch:
        images = zip(IMAGES, self.images, layout.image_sizes, strict=True)
        names = [name for name in TEXTS if name != "label"]
        texts = zip(names, self.texts, layout.text_sizes, strict=True)
        return {name: part[:size] for name, part, size in (*images, *texts) if size}

    def _features(self, size: int) -> Batch:
        """Cached features ``[size, D]`` of pairs, as they are read: unit vectors in fp16."""
        dimension = open_clip.get_model_config(self.arguments().model)["embed_dim"]
        unit = [torch.nn.functional.normalize(torch.randn(size, dimension), dim=-1).half() for _ in range(2)]
        return dict(zip(("pair_image_feature", "pair_text_feature"), unit, strict=True))

    def move(self) -> None:
        """Moves the made images and texts to the device, for steps that wait for no copy."""
        self.images = [part.to(self.device) for part in self.images]
        self.texts = [part.to(self.device) for part in self.texts]

    def _texts(self, length: int) -> torch.Tensor:
        """Tokens ``[B, context_length]`` that end, with the highest number, at ``length``."""
        tokens = torch.zeros(self.size, self.core.context_length, dtype=torch.long)
        tokens[:, : length - 1] = torch.randint(1, 400, (self.size, length - 1))
        tokens[:, length - 1] = 49407
        return tokens
