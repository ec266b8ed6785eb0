"""What the trainer iterates over, and how it is put together: the data of a training step from top to bottom.

The way of a caption anchor from disk to loss:

    1. ``captions/*.parquet``        sorted once per machine into one memory-mapped table: `data.captions.CaptionStore`
    2. ``sample["caption_text"]``    found by the sample's id in a loader worker: `data.texts.TaskTexts`, called by
                                     `data.task.TaskSamples` beside the image that has just been decoded
    3. ``batch["caption_text"]``     ``[B, L]``, tokenized with the others of its batch: `data.batch.collate`
    4. `TrainingLoader`              adds the pair loader's parts, tells `data.batch.OptimizerStep` what is in the batch
    5. `data.batch.DeviceConcat`     joins ``[t_cls; t_cap; t_a]`` where the trainer moves texts to its device
    6. one forward of the model      open_clip's own: ``text_features [2B + A, D]``
    7. `losses.anchored.AnchoredLoss`   splits them again and applies open_clip's own loss to ``x`` and ``t_cap``, or
                                     compares them with ``caption_text_feature``, which came beside the text

Task images and prompts start at step 2, from ``KEY.jpg`` and ``KEY.cls`` of a tar (`data.task`); pairs come from a
loader of their own (`data.pairs`) and join at step 4.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from open_clip_train.data import SharedEpoch

from arf_plugin.anchors.features import caption_features, pair_features, read_header
from arf_plugin.anchors.pairs import list_pair_shards
from arf_plugin.checks.inputs import Run
from arf_plugin.config import ArfConfig
from arf_plugin.data.batch import Batch, BatchLayout, OptimizerStep, Preprocess, as_tuple
from arf_plugin.data.captions import open_captions
from arf_plugin.data.pairs import pair_loader
from arf_plugin.data.prompts import ClassIndices, ClassPrompts
from arf_plugin.data.task import TaskLoader, task_loader
from arf_plugin.data.texts import TaskTexts
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.errors import AnchorSetError, ArfError
from arf_plugin.flags import spelling
from arf_plugin.resume.checkpoint import ResumePoint
from arf_plugin.resume.order import RowStream, SampleOrder, ShardStream
from arf_plugin.resume.rng import restore_rng, rng_state, seed_everything
from arf_plugin.trainer_args import TrainerArgs

Adapt = Callable[[Batch, TextTrimmer | None], Any]  # gives a batch the trainer's form


class AnchorSteps:
    """Which optimizer steps of a run have anchors: all of them, or every n-th.

    With ``--arf-every N`` a step has anchors if its number, counted from 0 over the whole run, is a multiple of N.
    Their terms then weigh N times as much, so the expected gradient is that of anchors on every step; the other steps
    are FLYP's, and cost as much. Ours, not the paper's.

    Args:
        every: N; 1 for anchors on every step.
        accum_freq: Micro-batches in an optimizer step, which is with anchors or without as a whole.
        num_batches: Micro-batches of an epoch. The trainer drops those at its end that fill no step.
    """

    def __init__(self, every: int = 1, accum_freq: int = 1, num_batches: int = 0) -> None:
        self.every = every
        self.accum_freq = accum_freq
        self.steps_per_epoch = num_batches // accum_freq

    def has_anchors(self, epoch: int, batch: int) -> bool:
        """Whether a micro-batch of an epoch, counted from 0, has anchors."""
        return (self.steps_per_epoch * epoch + batch // self.accum_freq) % self.every == 0

    def count(self, epoch: int, batches: int) -> int:
        """How many of an epoch's first micro-batches have anchors."""
        return sum(self.has_anchors(epoch, batch) for batch in range(batches))

    def made(self, epoch: int, batches: int) -> int | None:
        """The run's optimizer steps after an epoch's first so many micro-batches; None in the middle of a step."""
        steps, rest = divmod(batches, self.accum_freq)
        return None if rest else self.steps_per_epoch * epoch + steps


class TrainingLoader:
    """The task loader and the pair loader, zipped: what open_clip calls ``data["train"]``, and its ``dataloader``.

    Attributes:
        task: The loader of task data, and its counts.
        pairs: The loader of pair anchors, or None.
        layout: What a batch with anchors is made of.
        step: What is told of each micro-batch, for the loss.
        steps: Which steps have anchors.
        trimmer: Finds the length that the texts of a batch are cut to; None leaves them whole.
        adapt: Gives a batch the trainer's form.
        seed: The run's seed where random numbers are to be the same in every run; None leaves them alone.
        num_batches: Micro-batches per epoch.
        num_samples: Images per epoch, anchors included, so that the trainer's progress counts add up: it
            multiplies batches by the images it sees in one. Of a step without anchors it counts fewer.
        epoch: The current epoch.
        first_batch: The number that the trainer is to count the first batch of this epoch with; not 0 where a run
            goes on in its middle.
        resume: Where the run goes on, or None.
        before_batch: Called with the number of a batch and the batch, to which it may add parts.
        after_batch: Each is called with the number of batches of this epoch that have been trained on.
    """

    def __init__(
        self,
        task: TaskLoader,
        pairs: Iterable[Batch] | None,
        layout: BatchLayout,
        *,
        step: OptimizerStep | None = None,
        steps: AnchorSteps | None = None,
        epoch: SharedEpoch | None = None,
        trimmer: TextTrimmer | None = None,
        adapt: Adapt = as_tuple,
        seed: int | None = None,
        rank: int = 0,
    ) -> None:
        self.task, self.pairs, self.layout = task, pairs, layout
        self.step = step or OptimizerStep()
        self.steps = steps or AnchorSteps(num_batches=task.num_batches)
        self.trimmer, self.adapt = trimmer, adapt
        self.seed, self.rank = seed, rank
        self.num_batches = task.num_batches
        self.num_samples = task.num_samples * layout.images // layout.task
        self.epoch = self.first_batch = 0
        self.resume: ResumePoint | None = None
        self.before_batch: Callable[[int, Batch], None] = lambda number, batch: None
        self.after_batch: list[Callable[[int], None]] = []
        self._shared_epoch = epoch or SharedEpoch()

    @property
    def dataloader(self) -> TrainingLoader:
        """The loader itself, where open_clip has two objects."""
        return self

    @property
    def streams(self) -> dict[str, ShardStream | RowStream]:
        """The loaders that know their position: those of a deterministic run."""
        named = {"task": self.task.batches, "pairs": self.pairs}
        return {name: each for name, each in named.items() if isinstance(each, ShardStream | RowStream)}

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, at its first batch or where the run was stopped."""
        self.epoch = epoch
        self._shared_epoch.set_value(epoch)
        if self.task.sampler is not None:
            self.task.sampler.set_epoch(epoch)
        if self.seed is not None:
            seed_everything("epoch", self.seed, epoch, self.rank)
        for stream in self.streams.values():
            stream.set_epoch(epoch)
        point = self.resume if self.resume is not None and self.resume.epoch == epoch else None
        self.first_batch = point.batches if point is not None else 0
        if point is not None and point.process is not None:
            self.load_state_dict(point.process)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this process, between two steps."""
        return {
            "rng": rng_state(),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on in the current epoch after `first_batch` batches, with the state as it was then."""
        restore_rng(state["rng"])
        for name, stream in self.streams.items():
            stream.load_state_dict(list(state["streams"][name]), self.epoch, self.first_batch)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        try:
            pairs = iter(self.pairs) if self.pairs is not None else None
            remaining = itertools.islice(self.task.batches, self.num_batches - self.first_batch)
            for number, batch in enumerate(remaining, self.first_batch):
                if not self.steps.has_anchors(self.epoch, number):
                    for part in ("caption_text", "caption_text_feature"):  # came along with the task data
                        batch.pop(part, None)
                elif pairs is not None:
                    batch |= _next(pairs)
                self.before_batch(number, batch)
                self.step.note(number, batch)
                yield self.adapt(batch, self.trimmer)
                # The trainer asks for the next batch when it is done with this one.
                for each in self.after_batch:
                    each(number + 1)
        except ArfError as error:
            # One that came from a loader worker has a whole traceback for its message.
            marker = f"{type(error).__module__}.{type(error).__qualname__}: "
            raise type(error)(str(error).rpartition(marker)[2].strip()) from None


def _next(pairs: Iterator[Batch]) -> Batch:
    batch = next(pairs, None)
    if batch is None:
        raise AnchorSetError("The pair anchors ended before the epoch did; check the set with: arf check")
    return batch


def training_loader(
    args: TrainerArgs,
    config: ArfConfig,
    shape: Run,
    transforms: tuple[Preprocess, Preprocess],
    tokenizer: Any,
    epoch: int = 0,
    classes: ClassPrompts | ClassIndices | None = None,
    trimmer: TextTrimmer | None = None,
    adapt: Adapt = as_tuple,
) -> TrainingLoader:
    """Puts the loader of a run together.

    Args:
        args: The trainer's arguments.
        config: The ARF flags.
        shape: Which data this process gets.
        transforms: The trainer's image transforms for training and for evaluation; pairs that are held by features
            take the latter.
        tokenizer: The trainer's tokenizer.
        epoch: The first epoch.
        classes: Class prompts, or class indices for a head.
        trimmer: Finds the length that the texts of a batch are cut to; None leaves them whole.
        adapt: Gives a batch the trainer's form.

    Raises:
        ArfError: The anchors cannot be read, or the data cannot be shared among as many loader workers.
    """
    anchors = config.anchors or ""
    shards = list_pair_shards(anchors) if anchors and shape.pair_batch else []
    captions = open_captions(anchors) if anchors and config.caption_weight else None
    features = caption_features(anchors) if captions is not None and config.caption_features else None
    shared = SharedEpoch(epoch)
    order = pair_order = None
    if config.deterministic:
        order = SampleOrder("task", args.seed, shared.get_value, args.rank)
        pair_order = SampleOrder("pairs", args.seed, shared.get_value, args.rank)
    task = task_loader(
        args,
        TaskTexts(classes, captions, config.missing_caption, args.seed, shared.get_value, features),
        preprocess=transforms[0],
        tokenize=tokenizer,
        workers=shape.task_workers,
        epoch=shared,
        order=order,
    )
    if order is not None:
        stream: ShardStream | RowStream = ShardStream(task.batches, shape.task_workers, order)
        if task.sampler is not None:
            stream = RowStream(task.batches, task.sampler, args.seed)
        task = task._replace(batches=stream)
    steps = AnchorSteps(config.every, args.accum_freq, task.num_batches)
    pairs: Iterable[Batch] | None = None
    if shards:
        header = read_header(anchors) if config.pair_features else None
        pairs = pair_loader(
            shards,
            preprocess=transforms[1] if config.pair_features else transforms[0],
            tokenize=tokenizer,
            batch_size=shape.pair_batch,
            num_batches=task.num_batches,
            workers=shape.pair_workers,
            seed=args.seed,
            epoch=shared,
            rank=args.rank,
            world_size=args.world_size,
            order=pair_order,
            features=functools.partial(pair_features, anchors, header=header)
            if config.pair_features
            else None,
        )
        if pair_order is not None:
            pairs = ShardStream(pairs, shape.pair_workers, pair_order, steps.count)
    layout = BatchLayout(args.batch_size, captions is not None, shape.pair_batch if shards else 0)
    if args.rank == 0:
        _log(config, layout, len(captions) if captions is not None else 0, len(shards))
    return TrainingLoader(
        task,
        pairs,
        layout,
        step=OptimizerStep(args.accum_freq),
        steps=steps,
        epoch=shared,
        trimmer=trimmer,
        adapt=adapt,
        seed=args.seed if config.deterministic else None,
        rank=args.rank,
    )


def _log(config: ArfConfig, layout: BatchLayout, captions: int, shards: int) -> None:
    if config.l2sp:
        logging.info(f"ARF: L2-SP holds the weights to where they start (weight {config.l2sp:g}).")
    if not config.anchors:
        trains_on = "class prompts (FLYP)" if config.classnames else "the samples' own texts"
        trains_on = "class labels, through the head (LP-FT)" if config.head else trains_on
        logging.info(f"ARF: no anchor set; training on {trains_on}.")
        return
    terms = [f"{layout.task} task pairs"]
    for name, size, weight, loss in (
        ("caption anchors", layout.captions * layout.task, config.caption_weight, config.caption_loss),
        ("pair anchors", layout.pairs, config.pair_weight, config.pair_loss),
    ):
        if size:
            terms.append(f"{size} {name} ({loss} loss, weight {weight:g})")
        else:
            reason = "its weight is 0" if weight == 0 else f"{config.anchors} has none"
            logging.info(f"ARF: the term of the {name} is off, because {reason}.")
    if config.preset:
        fields = (one.name for one in dataclasses.fields(config) if one.metadata["needs_anchors"])
        values = [
            f"{spelling(name)} {value}" for name in fields if (value := getattr(config, name)) is not None
        ]
        logging.info(f"ARF: {' '.join(values)}")
    every = config.every
    rarely = "" if every == 1 else f"One step in {every} has anchors, at {every} times the weight. "
    logging.info(
        f"ARF is on. Each micro-batch of a process: {' + '.join(terms)}; "
        f"{layout.images} images, {sum(layout.text_sizes)} texts. {rarely}Anchors: {config.anchors}, "
        f"{captions} captions, {shards} pair shards."
    )
