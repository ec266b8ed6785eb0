"""open_clip_train.main.get_data: the trainer's own data pipelines, with anchors in them.

The training part is built by open_clip with a joint tokenizer and with one stage of its pipeline replaced; the
validation parts are built by open_clip exactly as without the plugin.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from arf_plugin.anchors.task import is_csv
from arf_plugin.checks.inputs import Inputs, Run
from arf_plugin.config import ArfConfig
from arf_plugin.data.anchor_steps import AnchorSteps
from arf_plugin.data.batch import BatchLayout
from arf_plugin.data.captions import CaptionStore, open_captions
from arf_plugin.data.epoch import SharedEpoch
from arf_plugin.data.identity import content_of_data, data_identity
from arf_plugin.data.loader import AnchoredData, AnchoredLoader, split_workers
from arf_plugin.data.order import NumberedTokenizer, SampleOrder
from arf_plugin.data.pairs import build_pair_loader, list_pair_shards
from arf_plugin.data.prompts import ClassIndices, ClassPrompts, load_classnames, load_prompts
from arf_plugin.data.startup import check_inputs, inputs_of_run
from arf_plugin.data.streams import Stream
from arf_plugin.data.texts import CsvTexts, JoinedSamples, JointTokenizer, LabelTokenizer, TaskTexts
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.errors import ArfError, FlagError
from arf_plugin.hooks.resumable import pair_stream, resumable_loader, sample_orders, task_stream
from arf_plugin.hooks.session import Session
from arf_plugin.hooks.table import hooks

if TYPE_CHECKING:
    from arf_plugin.hooks.watch import Watch

Found = TypeVar("Found")


def get_data(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Builds training data with anchors and validation data without."""

    @functools.wraps(original)
    def wrapped(args: Any, preprocess_fns: Any, epoch: int = 0, tokenizer: Any = None) -> dict[str, Any]:
        watch = _watch(session, args, preprocess_fns[1], tokenizer)
        validation = copy.copy(args)
        validation.train_data = None
        data = original(validation, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        train = _training_data(original, session, args, preprocess_fns, epoch, tokenizer)
        if watch is not None:
            watch.steps_per_epoch = train.dataloader.num_batches // args.accum_freq
        return {"train": train, **data}

    return wrapped


def tarfile_to_samples_nothrow(original: Callable[..., Any], texts: TaskTexts) -> JoinedSamples:
    """open_clip_train.data's reader of task tars, with joint texts in the samples."""
    return JoinedSamples(original, texts)


def _training_data(
    original: Callable[..., Any], session: Session, args: Any, preprocess_fns: Any, epoch: int, tokenizer: Any
) -> AnchoredData:
    config = session.config
    prompts = _load_prompts(config)
    _on_first_rank(args, lambda: _check_weights(session, args))
    inputs = inputs_of_run(args, config, _classes(prompts), lambda inputs: _shape(session, args, inputs))
    assert inputs.run is not None
    task_workers, pair_workers, pairs = (
        inputs.run.task_workers,
        inputs.run.pair_workers,
        inputs.run.pair_batch,
    )
    usable = _on_first_rank(args, lambda: check_inputs(inputs))
    if usable is not None and needs_count(args):
        if args.rank == 0:
            logging.info(f"ARF: --train-num-samples is not given: {usable} usable samples were counted.")
        args.train_num_samples = usable
    shards = list_pair_shards(config.anchors) if pairs and config.anchors else []
    captions = open_captions(config.anchors) if config.anchors and config.caption_weight else None
    layout = session.layout = BatchLayout(args.batch_size, captions is not None, pairs)
    if args.rank == 0:
        _log(config, layout, captions, shards)
    shared_epoch = SharedEpoch(epoch)
    texts = TaskTexts(
        prompts, captions, config.missing_caption, args.seed, shared_epoch.get, mix=not config.head
    )
    tokenize = (
        JointTokenizer(tokenizer) if layout.captions else LabelTokenizer() if config.head else tokenizer
    )
    orders = sample_orders(config, args, shared_epoch)
    task = _task_data(original, session, args, texts, preprocess_fns, epoch, tokenize, task_workers, orders)
    steps = AnchorSteps(config.every, args.accum_freq, task.dataloader.num_batches)
    pair_loader = None
    if layout.pairs:
        pair_loader = build_pair_loader(
            shards,
            preprocess=preprocess_fns[0],
            tokenize=tokenizer,
            batch_size=layout.pairs,
            num_batches=task.dataloader.num_batches,
            workers=pair_workers,
            seed=args.seed,
            epoch=shared_epoch,
            rank=args.rank,
            world_size=args.world_size,
            order=orders.get("pairs"),
        )
    streams: dict[str, Stream] = {}
    if config.deterministic:
        streams["task"] = task_stream(task.dataloader, args, config, layout, orders, task_workers)
        task.dataloader = streams["task"]
    if orders and pair_loader is not None:
        pair_loader = streams["pairs"] = pair_stream(pair_loader, pair_workers, orders["pairs"], steps)
    loader = task.dataloader
    trimmer = _trimmer(session, args)
    if layout.captions or layout.pairs or trimmer:
        loader = AnchoredLoader(loader, pair_loader, layout, trimmer, steps)
    if config.resumable or session.resumed is not None:
        contents = _on_first_rank(args, lambda: content_of_data(args, config)) if config.deterministic else {}
        identity = data_identity(
            args, config, contents, task_workers=task_workers, pair_workers=pair_workers, pairs=pairs
        )
        loader = resumable_loader(loader, streams, session, args, identity)
    return AnchoredData(task, loader, shared_epoch, steps)


def _check_weights(session: Session, args: Any) -> None:
    """Refuses anchors for a model that nobody has trained: there is nothing that they could keep."""
    found = session.random_parts
    if not found or args.resume:
        return
    named = (
        f"{len(found)} weights of --model {args.model} come from no file and are random (first: {found[0]})"
    )
    if session.config.anchors is None or session.config.random_weights:
        logging.warning(f"ARF: {named}.")
        return
    raise FlagError(
        f"{named}; --pretrained is {args.pretrained or 'not given'}.\n"
        "Anchors keep what a model has learned: name its weights with --pretrained TAG_OR_FILE, or a model that brings "
        "them along (local-dir:FOLDER with weights in it, hf-hub:NAME). To train from scratch all the same, add "
        "--arf-random-weights."
    )


def _shape(session: Session, args: Any, inputs: Inputs) -> Run:
    """What the trainer's flags say of which data a process gets."""
    config = session.config
    shards = len(inputs.pair_shards) if config.pair_weight else 0
    pairs = (config.pair_batch_size or args.batch_size) if shards else 0
    # Whether there are captions is known after the check has read them; it changes no worker's share.
    task_workers, pair_workers = split_workers(
        args.workers, BatchLayout(args.batch_size, pairs=pairs), config.workers, shards, args.world_size
    )
    return Run(
        batch_size=args.batch_size,
        accum_freq=args.accum_freq,
        world_size=args.world_size,
        workers=args.workers,
        task_workers=task_workers,
        pair_workers=pair_workers,
        pair_batch=pairs,
        epochs=args.epochs,
        samples=args.train_num_samples,
        resampled=bool(getattr(args, "dataset_resampled", False)),
        seed=args.seed,
        lr=args.lr,
        warmup=args.warmup,
        pretrained=bool(args.pretrained or ":" in args.model),
    )


def _classes(prompts: ClassPrompts | ClassIndices | None) -> list[str] | None:
    """Class names; for a head, which has numbers alone, as many."""
    if isinstance(prompts, ClassIndices):
        return [str(number) for number in range(prompts.classes)]
    return prompts.classnames if prompts is not None else None


def needs_count(args: Any) -> bool:
    """Whether open_clip would ask for ``--train-num-samples``."""
    from open_clip_train.data import get_dataset_size

    if is_csv(args.train_data, args.dataset_type) or args.train_num_samples is not None:
        return False
    return not get_dataset_size(args.train_data)[0]


def _trimmer(session: Session, args: Any) -> TextTrimmer | None:
    """What cuts the texts of a batch; None, with a line in the log, where that would change what is computed."""
    if session.config.trim_text == "off" or session.config.head:
        return None
    found = "it is traced with texts of full length" if getattr(args, "trace", False) else session.trimmer()
    if isinstance(found, TextTrimmer):
        return found
    if args.rank == 0:
        logging.info(f"ARF: texts keep all their positions, because of the model: {found}.")
    return None


def _load_prompts(config: ArfConfig) -> ClassPrompts | ClassIndices | None:
    if config.classnames is None:
        return None
    if config.head:
        return ClassIndices(len(load_classnames(config.classnames)))
    return load_prompts(config.classnames, config.templates or "imagenet")


def _task_data(
    original: Callable[..., Any],
    session: Session,
    args: Any,
    texts: TaskTexts,
    preprocess_fns: Any,
    epoch: int,
    tokenizer: Any,
    workers: int,
    orders: dict[str, SampleOrder],
) -> Any:
    """Lets open_clip build its pipeline of the training data alone."""
    training = copy.copy(args)
    training.val_data = training.imagenet_val = training.imagenet_v2 = None
    training.workers = workers
    own_text_column, csv = None, is_csv(args.train_data, args.dataset_type)
    if csv:
        columns = pd.read_csv(args.train_data, sep=args.csv_separator, nrows=0).columns
        own_text_column = args.csv_caption_key if args.csv_caption_key in columns else None
        # open_clip insists on a text column; with class prompts there need not be one.
        training.csv_caption_key = own_text_column or args.csv_img_key
    before = len(session.engine.applied)
    session.engine.apply(hooks("building task data", session.version), session.version, texts)
    if orders and not csv:
        session.engine.apply(hooks("ordering task data", session.version), session.version, orders["task"])
        tokenizer = NumberedTokenizer(tokenizer)
    try:
        task = original(training, preprocess_fns, epoch=epoch, tokenizer=tokenizer)["train"]
    finally:
        session.engine.undo(before)
    if csv:
        dataset = task.dataloader.dataset
        identities, classes = [str(path) for path in dataset.images], None
        if texts.prompts is not None:
            classes = pd.read_csv(args.train_data, sep=args.csv_separator)["cls"].tolist()
        dataset.captions = CsvTexts(identities, classes, dataset.captions if own_text_column else None, texts)
    return task


def _watch(session: Session, args: Any, preprocess: Any, tokenizer: Any) -> Watch | None:
    """Looks at the sets of ``--arf-watch`` and lets them be measured every epoch."""
    if not session.config.watch:
        return None
    # What evaluates is no part of training, and is imported by no other run.
    from arf_plugin.evaluation.watch import open_sets
    from arf_plugin.hooks.watch import Watch

    # The first process reads every label for all of them, which then open sets that are known to be sound.
    opened: list[Any] = []
    _on_first_rank(args, lambda: opened.extend(open_sets(session.config.watch)))
    watch = Watch(session.config, args, opened or open_sets(session.config.watch), preprocess, tokenizer)
    session.listeners.append(watch)
    return watch


def _on_first_rank(args: Any, check: Callable[[], Found]) -> Found:
    """Runs a check on the first process and hands what it found, or its verdict, to all.

    None trains on then, or waits for ever. What is found is sent between processes.
    """
    if not args.distributed:
        return check()
    from open_clip_train.distributed import broadcast_object

    result: tuple[bool, Any] = (True, None)
    verdict: ArfError | None = None
    if args.rank == 0:
        try:
            result = (True, check())
        except ArfError as error:
            verdict, result = error, (False, None)
    passed, found = broadcast_object(args, result)
    if passed:
        return found
    raise verdict if verdict is not None else SystemExit(1)


def _log(config: ArfConfig, layout: BatchLayout, captions: CaptionStore | None, shards: list[str]) -> None:
    if config.l2sp:
        logging.info(f"ARF: L2-SP holds the weights to where they start (weight {config.l2sp:g}).")
    if not config.anchors:
        trains_on = "class prompts (FLYP)" if config.classnames else "the samples' own texts"
        trains_on = "class labels, through the head (LP-FT)" if config.head else trains_on
        logging.info(f"ARF: no anchor set; training on {trains_on}.")
        return
    terms = [f"{layout.task} task pairs"]
    for name, there, size, weight in (
        ("caption anchors", captions is not None, layout.task, config.caption_weight),
        ("pair anchors", bool(shards), layout.pairs, config.pair_weight),
    ):
        if there:
            terms.append(f"{size} {name} (weight {weight:g})")
        else:
            reason = "its weight is 0" if weight == 0 else f"{config.anchors} has none"
            logging.info(f"ARF: the term of the {name} is off, because {reason}.")
    logging.info(
        f"ARF is on. Each micro-batch of a process: {' + '.join(terms)}; "
        f"{layout.images} images, {sum(layout.text_sizes)} texts. {_how_often(config)}Anchors: {config.anchors}, "
        f"{len(captions) if captions is not None else 0} captions, {len(shards)} pair shards."
    )


def _how_often(config: ArfConfig) -> str:
    every = config.every
    return "" if every == 1 else f"One step in {every} has anchors, at {every} times the weight. "
