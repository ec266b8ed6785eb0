"""open_clip_train.main.create_loss: open_clip's own loss, once per term."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from arf_plugin.hooks.session import Session
from arf_plugin.losses.anchored import AnchoredLoss


def create_loss(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Returns the original loss where no anchors are in the batch, and the anchored one otherwise."""

    @functools.wraps(original)
    def wrapped(args: Any) -> Any:
        layout = session.need_layout(args)
        if not (layout.captions or layout.pairs):
            return original(args)
        config = session.config
        return AnchoredLoss(lambda: original(args), layout, config.caption_weight, config.pair_weight)

    return wrapped
