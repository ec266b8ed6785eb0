"""open_clip_train.main.get_data: training data with anchors in them, from `arf_plugin.data.loader`.

Validation data are built by open_clip, exactly as without the plugin.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from arf_plugin.anchors.features import caption_features
from arf_plugin.anchors.pairs import list_pair_shards
from arf_plugin.config import ArfConfig
from arf_plugin.data.batch import as_tuple
from arf_plugin.data.captions import CaptionStore, open_captions
from arf_plugin.data.loader import Adapt, TrainingLoader, training_loader
from arf_plugin.data.prompts import ClassIndices, ClassPrompts, load_classnames, load_prompts
from arf_plugin.data.startup import check_inputs, inputs_of_run, needs_count
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.errors import ArfError, FlagError
from arf_plugin.hooks.checkpoint import make_resumable
from arf_plugin.hooks.session import DataPlan, Session
from arf_plugin.hooks.teacher import add_teacher

if TYPE_CHECKING:
    from arf_plugin.hooks.watch import Watch

Found = TypeVar("Found")


def get_data(original: Callable[..., Any], session: Session) -> Callable[..., dict[str, Any]]:
    """Builds training data with anchors and validation data without."""
    return data_in_form(original, session, as_tuple)


def data_in_form(
    original: Callable[..., Any], session: Session, adapt: Adapt
) -> Callable[..., dict[str, Any]]:
    """What `get_data` returns, with batches of one of the trainer's forms."""

    @functools.wraps(original)
    def wrapped(args: Any, preprocess_fns: Any, epoch: int = 0, tokenizer: Any = None) -> dict[str, Any]:
        watch = _watch(session, args, preprocess_fns[1], tokenizer)
        validation = copy.copy(args)
        validation.train_data = None
        data = original(validation, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        train = _training_data(session, args, preprocess_fns, epoch, tokenizer, adapt)
        if watch is not None:
            watch.steps_per_epoch = train.num_batches // args.accum_freq
        return {"train": train, **data}

    return wrapped


def _training_data(
    session: Session, args: Any, preprocess_fns: Any, epoch: int, tokenizer: Any, adapt: Adapt
) -> TrainingLoader:
    config = session.config
    classes = _classes(config)
    _on_first_rank(args, lambda: _check_weights(session, args))
    names = getattr(classes, "classnames", None)
    if isinstance(classes, ClassIndices):  # which has numbers alone
        names = list(map(str, range(classes.classes)))
    inputs = inputs_of_run(args, config, names)
    inputs.starting = session.model.starting if session.model is not None else None
    usable = _on_first_rank(args, lambda: check_inputs(inputs))
    if usable is not None and needs_count(args):
        if args.rank == 0:
            logging.info(f"ARF: --train-num-samples is not given: {usable} usable samples were counted.")
        args.train_num_samples = usable
    shape = inputs.run
    assert shape is not None
    shards = list_pair_shards(config.anchors) if shape.pair_batch and config.anchors else []
    captions = open_captions(config.anchors) if config.anchors and config.caption_weight else None
    features = caption_features(config.anchors) if captions is not None and config.caption_features else None
    loader = training_loader(
        args,
        config,
        shape,
        preprocess=preprocess_fns[0],
        preprocess_pairs=preprocess_fns[1] if config.pair_features else None,
        tokenizer=tokenizer,
        epoch=epoch,
        classes=classes,
        captions=captions,
        features=features,
        pair_shards=shards,
        trimmer=_trimmer(session, args),
        adapt=adapt,
    )
    session.data = DataPlan(loader.layout, loader.step)
    if args.rank == 0:
        _log(config, loader, captions, shards)
    if config.resumable or session.resumed is not None:
        make_resumable(loader, session, args, shape, functools.partial(_on_first_rank, args))
    if config.teacher:
        add_teacher(loader, session, args, epoch)
    return loader


def _check_weights(session: Session, args: Any) -> None:
    """Refuses anchors for a model that nobody has trained: there is nothing that they could keep."""
    found = session.model.random_parts if session.model is not None else ()
    if not found or args.resume:
        return
    named = (
        f"{len(found)} weights of --model {args.model} come from no file and are random (first: {found[0]})"
    )
    if not (session.config.anchors or session.config.teacher) or session.config.random_weights:
        logging.warning(f"ARF: {named}.")
        return
    raise FlagError(
        f"{named}; --pretrained is {args.pretrained or 'not given'}.\n"
        "Anchors and a teacher keep what a model has learned: name its weights with --pretrained TAG_OR_FILE, or a "
        "model that brings them along (local-dir:FOLDER with weights in it, hf-hub:NAME). To train from scratch all "
        "the same, add --arf-random-weights."
    )


def _classes(config: ArfConfig) -> ClassPrompts | ClassIndices | None:
    if config.classnames is None:
        return None
    if config.head:
        return ClassIndices(len(load_classnames(config.classnames)))
    return load_prompts(config.classnames, config.templates or "imagenet")


def _trimmer(session: Session, args: Any) -> TextTrimmer | None:
    """What cuts the texts of a batch; None, with a line in the log, where that would change what is computed."""
    if session.config.trim_text == "off" or session.config.head:
        return None
    found: TextTrimmer | str = session.model.trimmer if session.model is not None else "it is not known"
    if getattr(args, "trace", False):
        found = "it is traced with texts of full length"
    if isinstance(found, TextTrimmer):
        return found
    if args.rank == 0:
        logging.info(f"ARF: texts keep all their positions, because of the model: {found}.")
    return None


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
    if not passed:
        raise verdict if verdict is not None else SystemExit(1)
    return found


def _log(config: ArfConfig, loader: TrainingLoader, captions: CaptionStore | None, shards: list[str]) -> None:
    layout = loader.layout
    if config.l2sp:
        logging.info(f"ARF: L2-SP holds the weights to where they start (weight {config.l2sp:g}).")
    if not config.anchors:
        trains_on = "class prompts (FLYP)" if config.classnames else "the samples' own texts"
        trains_on = "class labels, through the head (LP-FT)" if config.head else trains_on
        logging.info(f"ARF: no anchor set; training on {trains_on}.")
        return
    terms = [f"{layout.task} task pairs"]
    for name, there, size, weight, loss in (
        ("caption anchors", captions is not None, layout.task, config.caption_weight, config.caption_loss),
        ("pair anchors", bool(shards), layout.pairs, config.pair_weight, config.pair_loss),
    ):
        if there:
            terms.append(f"{size} {name} ({loss} loss, weight {weight:g})")
        else:
            reason = "its weight is 0" if weight == 0 else f"{config.anchors} has none"
            logging.info(f"ARF: the term of the {name} is off, because {reason}.")
    every = config.every
    rarely = "" if every == 1 else f"One step in {every} has anchors, at {every} times the weight. "
    logging.info(
        f"ARF is on. Each micro-batch of a process: {' + '.join(terms)}; "
        f"{layout.images} images, {sum(layout.text_sizes)} texts. {rarely}Anchors: {config.anchors}, "
        f"{len(captions) if captions is not None else 0} captions, {len(shards)} pair shards."
    )
