"""The task data as batches of named parts: open_clip's own pipeline, built from its own pieces.

Same shards for the same worker, same shuffling, same counts, and the same samples passed over as open_clip's loader;
tests/unit/data/test_task_loader.py compares the two. What differs is a sample: a dictionary (`arf_plugin.data.batch`)
with its class prompt and its caption anchor in it.

    tar or CSV  ->  RawSample (bytes)  ->  sample (image tensor, texts)  ->  batch (tensors)
"""

from __future__ import annotations

import functools
import itertools
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import webdataset as wds
from open_clip_train import data as open_clip_data
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from arf_plugin.anchors.headers import ENCODING
from arf_plugin.anchors.ids import sample_id
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, decode_image
from arf_plugin.anchors.task import is_csv
from arf_plugin.anchors.task_csv import CLASS_COLUMN, read_csv
from arf_plugin.data.batch import Batch, Preprocess, Sample, Tokenize, collate
from arf_plugin.data.texts import TaskTexts
from arf_plugin.errors import FlagError, TaskDataError
from arf_plugin.resume.order import Pipeline, SampleOrder, decoded
from arf_plugin.resume.rng import seed_loading
from arf_plugin.trainer_args import TrainerArgs


class TaskLoader(NamedTuple):
    """A loader of task batches, and what open_clip counts of it.

    Attributes:
        batches: Yields them; an epoch in each iteration.
        num_batches: Micro-batches of an epoch.
        num_samples: Samples of an epoch, in all processes.
        sampler: That of a CSV's rows; None for tars.
    """

    batches: Iterable[Batch]
    num_batches: int
    num_samples: int
    sampler: LaterBatches | None = None


class RawSample(NamedTuple):
    """What is read of a sample of a tar; its other members are left where they are."""

    url: str
    key: str
    image: bytes | None
    cls: bytes | None
    text: bytes | None

    @classmethod
    def of(cls, members: dict[str, Any]) -> RawSample:
        """Takes it from what open_clip reads: extension -> bytes."""
        image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        return cls(
            members["__url__"], members["__key__"], image, members.get(CLASS_COLUMN), members.get("txt")
        )


class TaskSamples:
    """A stage of the pipeline: shards -> samples, those left out that open_clip passes over.

    open_clip passes over samples without an image or a text, or whose image or text (where it is needed) cannot be
    decoded; from release 4 on also those with an empty text, or an image of more than ``most_pixels``.
    """

    def __init__(
        self, texts: TaskTexts, preprocess: Preprocess, order: SampleOrder | None = None, most_pixels: int = 0
    ) -> None:
        self.texts, self.preprocess, self.order = texts, preprocess, order
        self.decode = decode_image
        self.takes_empty_texts = not hasattr(open_clip_data, "FilterNonEmptyText")
        if hasattr(open_clip_data, "decode_pil_rgb"):
            self.decode = functools.partial(open_clip_data.decode_pil_rgb, max_pixels=most_pixels or None)

    def __call__(self, shards: Iterator[dict[str, Any]]) -> Iterator[Sample]:
        """One pass over this worker's shards."""
        # webdataset lets the locale say how names are decoded; ids are the same under every locale.
        tarfile.TarFile.encoding = ENCODING
        raw = map(RawSample.of, open_clip_data.tarfile_to_samples_nothrow(shards))
        _, _, size, initial = shuffle_sizes()
        seeded = {} if self.order is None else {"rng": self.order.shuffling()}
        shuffled = wds.shuffle(bufsize=size, initial=initial, **seeded)(raw)
        return decoded(shuffled, self.sample, self.order)

    def sample(self, raw: RawSample) -> Sample | None:
        """Decodes one sample and finds its texts; None for one that open_clip passes over."""
        if raw.image is None or (raw.cls is None and raw.text is None):
            return None
        try:
            image = self.decode(raw.image)
        except Exception as error:  # PIL's decoders raise many kinds
            open_clip_data.log_and_continue(error)
            return None
        try:
            texts = self.texts(_identity(raw), raw.cls, raw.text)
        except UnicodeDecodeError as error:
            open_clip_data.log_and_continue(error)
            return None
        if texts is None or not (self.takes_empty_texts or "text" not in texts or texts["text"].strip()):
            return None
        return {"image": self.preprocess(image), **texts}


def _identity(raw: RawSample) -> str:
    if not (isinstance(raw.url, str) and isinstance(raw.key, str)):
        raise TaskDataError(
            f"A task sample has a member named like webdataset's own notes (url {raw.url!r}, key {raw.key!r}), so it "
            "has no id. Leave members such as KEY.__url__ out of the tars."
        )
    return sample_id(raw.url, raw.key)


def shuffle_sizes() -> tuple[int, int, int, int]:
    """open_clip's buffers: size and initial size of that of shards, then of that of samples."""
    if hasattr(open_clip_data, "wds_shuffle_sizes"):  # from release 4 on, where the environment has a say
        sizes: tuple[int, int, int, int] = open_clip_data.wds_shuffle_sizes()
        return sizes
    own = open_clip_data
    shards = own._SHARD_SHUFFLE_SIZE, own._SHARD_SHUFFLE_INITIAL
    return *shards, own._SAMPLE_SHUFFLE_SIZE, own._SAMPLE_SHUFFLE_INITIAL


def task_loader(
    args: TrainerArgs,
    texts: TaskTexts,
    *,
    preprocess: Preprocess,
    tokenize: Tokenize,
    workers: int,
    epoch: open_clip_data.SharedEpoch,
    order: SampleOrder | None = None,
) -> TaskLoader:
    """Builds the loader of the task data.

    Args:
        args: The trainer's arguments.
        texts: Finds the texts of a sample.
        preprocess: The trainer's image transform for training.
        tokenize: The trainer's tokenizer: n texts -> ``[n, L]``.
        workers: Loader workers; 0 loads in the main process.
        epoch: The current epoch, shared with loader workers.
        order: Makes order and augmentation of samples the same in every run; None for open_clip's own.

    Raises:
        FlagError: open_clip could not tell the length of an epoch.
        TaskDataError: Fewer shards than loader workers.
    """
    collate_batch = functools.partial(collate, tokenize=tokenize)
    if is_csv(args.train_data, args.dataset_type):
        return _csv_loader(args, texts, preprocess, collate_batch, workers, order)
    # From here on, open_clip's own get_wds_dataset, with other samples in its middle.
    shards: list[Any]
    if args.dataset_resampled:
        weights = args.train_data_upsampling_factors
        seed = order.shard_seed if order is not None else None
        shards = [
            open_clip_data.ResampledShards2(
                args.train_data, weights=weights, worker_seed=seed, deterministic=True, epoch=epoch
            )
        ]
    else:
        size, initial, _, _ = shuffle_sizes()
        shards = [
            wds.SimpleShardList(args.train_data),
            open_clip_data.detshuffle2(bufsize=size, initial=initial, seed=args.seed, epoch=epoch),
            wds.split_by_node,
            wds.split_by_worker,
        ]
    num_shards = len(open_clip_data.expand_urls(args.train_data)[0])
    num_samples = args.train_num_samples or open_clip_data.get_dataset_size(args.train_data)[0]
    if not num_samples:
        raise FlagError(
            f"The number of samples of --train-data {args.train_data} is not known, and remote shards are not counted. "
            "Give --train-num-samples, or write a sizes.json beside the shards."
        )
    if args.train_data_upsampling_factors is not None and not args.dataset_resampled:
        raise FlagError(
            "--train-data-upsampling-factors needs --dataset-resampled. Add it, or drop the factors."
        )
    if not args.dataset_resampled and num_shards < workers * args.world_size:
        raise TaskDataError(
            f"{num_shards} task shards for {workers * args.world_size} loader workers ({args.world_size} processes x "
            f"{workers}); expected at least one shard each. Lower --workers, or use --dataset-resampled."
        )
    # Every worker of every process gives as many batches; some samples are shown again for it.
    batches_of_worker = math.ceil(
        math.ceil(num_samples / (args.batch_size * args.world_size)) / max(1, workers)
    )
    num_batches = batches_of_worker * max(1, workers)
    pipeline = Pipeline(
        *shards,
        TaskSamples(texts, preprocess, order, getattr(args, "max_image_pixels", 0) or 0),
        wds.batched(args.batch_size, partial=False, collation_fn=collate_batch),
        order=order,
    ).with_epoch(batches_of_worker)
    loader = wds.WebLoader(
        pipeline, batch_size=None, shuffle=False, num_workers=workers, persistent_workers=workers > 0
    )
    return TaskLoader(loader, num_batches, num_batches * args.batch_size * args.world_size)


def _csv_loader(
    args: TrainerArgs,
    texts: TaskTexts,
    preprocess: Preprocess,
    collate_batch: Callable[[list[Sample]], Batch],
    workers: int,
    order: SampleOrder | None,
) -> TaskLoader:
    """open_clip's ``get_csv_dataset`` for training data, with `CsvSamples` as its data set."""
    frame = read_csv(args.train_data, args.csv_img_key, args.csv_separator)
    own = frame[args.csv_caption_key].tolist() if args.csv_caption_key in frame.columns else None
    classes = frame[CLASS_COLUMN].tolist() if texts.classes is not None else None
    dataset = CsvSamples(frame[args.csv_img_key].tolist(), classes, own, texts, preprocess, order)
    sampler: Any = DistributedSampler(dataset) if args.distributed else RandomSampler(dataset)
    batches = LaterBatches(BatchSampler(sampler, args.batch_size, drop_last=True))
    loader: DataLoader[Batch] = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=True, collate_fn=collate_batch
    )
    return TaskLoader(loader, len(batches), len(dataset), batches)


class CsvSamples(torch.utils.data.Dataset[Sample]):
    """The rows of a CSV as samples: image paths, classes if they are needed, own texts if there are any.

    With an order, augmentation depends on seed, epoch and row alone, not on what its worker did before.
    """

    def __init__(
        self,
        images: list[Any],
        classes: list[Any] | None,
        own: list[Any] | None,
        texts: TaskTexts,
        preprocess: Preprocess,
        order: SampleOrder | None,
    ) -> None:
        self.images, self.classes, self.own = images, classes, own
        self.texts, self.preprocess, self.order = texts, preprocess, order

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Sample:
        if self.order is not None:
            seed_loading("row", self.order.seed, self.order.epoch(), row)
        path = str(self.images[row])
        image = self.preprocess(Image.open(path))
        cls = None if self.classes is None else self.classes[row]
        texts = self.texts(path, cls, None if self.own is None else str(self.own[row]))
        assert texts is not None, "the start-up check lets no row without a text pass"
        return {"image": image, **texts}


class LaterBatches:
    """Batches of row numbers without the first ``skip`` ones."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches
        self.sampler = batches.sampler
        self.skip = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self.batches, self.skip, None)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, as open_clip does."""
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)
