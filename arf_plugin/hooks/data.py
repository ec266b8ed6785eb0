"""open_clip_train.main.get_data: training data with anchors in them, from `arf_plugin.data.loader`.

Validation data are built by open_clip, exactly as without the plugin.
"""

from __future__ import annotations

import copy
import functools
import logging
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

from arf_plugin.config import ArfConfig
from arf_plugin.data.batch import as_tuple
from arf_plugin.data.loader import Adapt, TrainingLoader, training_loader
from arf_plugin.data.prompts import ClassIndices, ClassPrompts, load_classnames, load_prompts
from arf_plugin.data.startup import check_inputs, inputs_of_run, needs_count
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.errors import ArfError, CheckpointError, FlagError
from arf_plugin.hooks.resume import make_resumable
from arf_plugin.hooks.session import Session
from arf_plugin.hooks.teacher import add_teacher
from arf_plugin.trainer_args import TrainerArgs

Found = TypeVar("Found")


def get_data(original: Callable[..., Any], session: Session) -> Callable[..., dict[str, Any]]:
    """Builds training data with anchors and validation data without."""
    return data_in_form(original, session, as_tuple)


def data_in_form(
    original: Callable[..., Any], session: Session, adapt: Adapt
) -> Callable[..., dict[str, Any]]:
    """What `get_data` returns, with batches of one of the trainer's forms."""

    @functools.wraps(original)
    def wrapped(
        args: TrainerArgs, preprocess_fns: Any, epoch: int = 0, tokenizer: Any = None
    ) -> dict[str, Any]:
        if session.config.watch:
            _watch(session, args, preprocess_fns[1], tokenizer)
        validation: Any = copy.copy(args)
        validation.train_data = None
        data = original(validation, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        return {"train": _training_data(session, args, preprocess_fns, epoch, tokenizer, adapt), **data}

    return wrapped


def _training_data(
    session: Session, args: TrainerArgs, preprocess_fns: Any, epoch: int, tokenizer: Any, adapt: Adapt
) -> TrainingLoader:
    config = session.config
    classes = _classes(config)
    _on_first_rank(args, lambda: _check_weights(session, args))
    _on_first_rank(args, lambda: _check_room(session, args))
    inputs = inputs_of_run(args, config, classes.classnames if classes is not None else None)
    inputs.starting = session.model.starting if session.model is not None else None
    usable = _on_first_rank(args, lambda: check_inputs(inputs))
    if usable is not None and needs_count(args):
        if args.rank == 0:
            logging.info(f"ARF: --train-num-samples is not given: {usable} usable samples were counted.")
        args.train_num_samples = usable
    shape, trimmer = inputs.need_run(), _trimmer(session, args)
    loader = training_loader(args, config, shape, preprocess_fns, tokenizer, epoch, classes, trimmer, adapt)
    session.loader = loader
    if config.resumable or session.resumed is not None or session.stops_on_ctrl_c:
        make_resumable(loader, session, args, shape, functools.partial(_on_first_rank, args))
    if config.teacher:
        add_teacher(loader, session, args, epoch)
    return loader


def _check_weights(session: Session, args: TrainerArgs) -> None:
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


def _check_room(session: Session, args: TrainerArgs) -> None:
    """Refuses a disk that has no room for the first checkpoint: weights, and the optimizer's two moments of each."""
    if session.model is None or (args.logs or "none").lower() == "none":
        return
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in session.model.model.parameters()]
    needed = sum(size * (3 if trained else 1) for size, trained in sizes)
    if (free := shutil.disk_usage(args.checkpoint_path).free) < needed:
        raise CheckpointError(
            f"A checkpoint of this run takes about {needed / 1e6:,.1f} MB, and {args.checkpoint_path} has room for "
            f"{free / 1e6:,.1f} MB. Make room, or give another --logs."
        )


def _classes(config: ArfConfig) -> ClassPrompts | ClassIndices | None:
    if config.classnames is None:
        return None
    if config.head:
        return ClassIndices(len(load_classnames(config.classnames)))
    return load_prompts(config.classnames, config.templates or "imagenet")


def _trimmer(session: Session, args: TrainerArgs) -> TextTrimmer | None:
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


def _watch(session: Session, args: TrainerArgs, preprocess: Any, tokenizer: Any) -> None:
    """Looks at the sets of ``--arf-watch`` and lets them be measured every epoch."""
    # What evaluates is no part of training, and is imported by no other run.
    from arf_plugin.evaluation.watch import open_sets
    from arf_plugin.hooks.watch import Watch

    # The first process reads every label for all of them, which then open sets that are known to be sound.
    opened: list[Any] = []
    _on_first_rank(args, lambda: opened.extend(open_sets(session.config.watch)))
    sets = opened or open_sets(session.config.watch)
    session.listeners.append(Watch(session, args, sets, preprocess, tokenizer))


def _on_first_rank(args: TrainerArgs, check: Callable[[], Found]) -> Found:
    """Runs a check on the first process and hands what it found, or its verdict, to all.

    None trains on then, or waits for ever. What is found is sent between processes.
    """
    if not args.distributed:
        return check()
    from open_clip_train.distributed import broadcast_object

    found, verdict = None, None
    if args.rank == 0:
        try:
            found = check()
        except ArfError as error:
            verdict = error
    shared: tuple[bool, Found] = broadcast_object(args, (verdict is None, found))
    if not shared[0]:
        raise verdict if verdict is not None else SystemExit(1)
    return shared[1]
