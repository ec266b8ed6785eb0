"""open_clip_train.main.create_loss: open_clip's own loss once per term, or a baseline's."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from arf_plugin.errors import CheckpointError
from arf_plugin.hooks.session import EpochListener, Session, Training
from arf_plugin.losses.anchored import AnchoredLoss
from arf_plugin.losses.features import MEAN, DifferenceTerm
from arf_plugin.losses.head import HeadLoss
from arf_plugin.losses.l2sp import L2SPLoss
from arf_plugin.losses.teacher import TeacherLoss
from arf_plugin.trainer_args import TrainerArgs

WORSE_THAN_CHANCE = 1.25


def create_loss(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Returns the original loss where no anchors are in the batch, and the anchored one otherwise."""

    @functools.wraps(original)
    def wrapped(args: TrainerArgs) -> Any:
        return build_loss(lambda: original(args), session, args)

    return wrapped


def build_loss(build_base: Callable[[], Any], session: Session, args: TrainerArgs) -> Any:
    """The loss of a run; ``build_base`` builds the one that open_clip would have used."""
    config, facts, loader = session.config, session.model, session.loader
    loss = _loss(build_base, session)
    random = facts is not None and bool(facts.random_parts)
    if not (config.head or random or getattr(args, "siglip", False)):
        _warn_of_first_loss(getattr(loss, "task", loss), args)
    if config.by_feature:
        _warn_of_gathering(args)
    if facts is not None and facts.start is not None:
        loss = L2SPLoss(loss, facts.model, facts.start, config.l2sp, args.accum_freq)
        facts.start = None  # the loss keeps what it needs of it
    if config.teacher and config.teacher_weight and loader is not None:
        loss = TeacherLoss(loss, loader.step, config.teacher_weight * config.teacher_every)
    return loss


def _loss(build_base: Callable[[], Any], session: Session) -> Any:
    config, loader = session.config, session.loader
    if config.head:
        return HeadLoss()
    if loader is None or not (loader.layout.captions or loader.layout.pairs):
        return build_base()
    loss = AnchoredLoss(
        build_base,
        loader.step,
        caption_weight=config.caption_weight if loader.layout.captions else None,
        pair_weight=config.pair_weight if loader.layout.pairs else None,
        every=config.every,
        caption_loss=config.caption_loss,
        pair_loss=config.pair_loss,
    )
    if isinstance(loss.pair_anchor, DifferenceTerm):
        session.listeners.append(KeptMean(loss.pair_anchor))
    return loss


class KeptMean(EpochListener):
    """Keeps the mean of a `DifferenceTerm` in the optimizer's state, and so in every checkpoint."""

    def __init__(self, term: DifferenceTerm) -> None:
        self.term = term

    def before_epoch(self, training: Training) -> None:
        """Shares the optimizer's state with the term."""
        self.term.state = training.optimizer.param_groups[0]

    def begin(self, training: Training) -> None:
        """Checks what a checkpoint has brought, if one was loaded."""
        mean = training.optimizer.param_groups[0].get(MEAN)
        if not training.args.resume:
            return
        if mean is None:
            logging.warning(
                "ARF: the checkpoint has no mean of --arf-pair-loss difference; it begins at 0 again."
            )
        elif not (isinstance(mean, torch.Tensor) and mean.dim() == 1 and bool(mean.isfinite().all())):
            raise CheckpointError(
                f"--resume {training.args.resume}: '{MEAN}' of its optimizer is no vector of finite numbers. Resume "
                "from another checkpoint."
            )


def _warn_of_gathering(args: TrainerArgs) -> None:
    """Terms of features pass on all of their gradient; open_clip's contrastive loss may not, beside them."""
    partial = args.world_size > 1 and not (getattr(args, "siglip", False) or args.gather_with_grad)
    if partial and args.rank == 0:
        logging.warning(
            "ARF: in several processes open_clip's contrastive loss passes on a part of its gradient only (1 in "
            f"{args.world_size}, about half with --local-loss), the terms of features all of theirs, so these weigh "
            "more than in one process. With --local-loss --gather-with-grad they weigh the same."
        )


def _warn_of_first_loss(loss: Any, args: TrainerArgs) -> None:
    """Looks at the loss of the first step, once: worse than chance is what mixed up class names look like."""
    if args.rank != 0 or getattr(args, "torchcompile", False):
        return

    def look(module: Any, inputs: Any, named: dict[str, Any], losses: Any) -> None:
        handle.remove()
        if not isinstance(losses, dict) or "contrastive_loss" not in losses:
            return
        found = float(losses["contrastive_loss"])
        texts = len(named["image_features"]) * args.world_size
        chance = math.log(max(2, texts))
        if found > WORSE_THAN_CHANCE * chance:
            logging.warning(
                f"ARF: the first loss is {found:.2f}, worse than chance: picking one of {texts} texts blindly gives "
                f"{chance:.2f}. Are the class names in the order of the labels, the texts those of the images, and "
                "--model and --pretrained of one kind?"
            )

    handle = loss.register_forward_hook(look, with_kwargs=True)
