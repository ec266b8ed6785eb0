"""open_clip_train.main.create_loss: open_clip's own loss once per term, or a baseline's."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

from arf_plugin.hooks.session import Session
from arf_plugin.losses.anchored import AnchoredLoss
from arf_plugin.losses.head import HeadLoss
from arf_plugin.losses.l2sp import L2SPLoss
from arf_plugin.losses.teacher import TeacherLoss

WORSE_THAN_CHANCE = 1.25


def create_loss(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Returns the original loss where no anchors are in the batch, and the anchored one otherwise."""

    @functools.wraps(original)
    def wrapped(args: Any) -> Any:
        return build_loss(lambda: original(args), session, args)

    return wrapped


def build_loss(build_base: Callable[[], Any], session: Session, args: Any) -> Any:
    """The loss of a run.

    Args:
        build_base: Builds the loss that open_clip would have used.
        session: The run.
        args: The trainer's arguments.
    """
    loss = _loss(build_base, session)
    facts = session.model
    random = facts is not None and bool(facts.random_parts)
    if not (session.config.head or random or getattr(args, "siglip", False)):
        _warn_of_first_loss(getattr(loss, "task", loss), args)
    if facts is not None and facts.start is not None:
        session.model = dataclasses.replace(facts, start=None)  # the loss keeps what it needs of it
        loss = L2SPLoss(loss, facts.model, facts.start, session.config.l2sp, args.accum_freq)
    config = session.config
    if config.teacher and config.teacher_weight and session.data is not None:
        loss = TeacherLoss(loss, session.data.step, config.teacher_weight * config.teacher_every)
    return loss


def _loss(build_base: Callable[[], Any], session: Session) -> Any:
    config, plan = session.config, session.data
    if config.head:
        return HeadLoss()
    if plan is None or not (plan.layout.captions or plan.layout.pairs):
        return build_base()
    return AnchoredLoss(
        build_base,
        plan.step,
        caption_weight=config.caption_weight if plan.layout.captions else None,
        pair_weight=config.pair_weight if plan.layout.pairs else None,
        every=config.every,
    )


def _warn_of_first_loss(loss: Any, args: Any) -> None:
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
