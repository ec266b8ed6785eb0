"""What the hooks of one training run share."""

from __future__ import annotations

import dataclasses
from typing import Any

from arf_plugin.config import ArfConfig
from arf_plugin.data.batch import BatchLayout
from arf_plugin.hooks.engine import Engine


@dataclasses.dataclass
class Session:
    """State of one training run.

    Attributes:
        config: The ARF flags.
        engine: Applies the rows of later phases.
        version: Upstream's version.
        layout: Sizes of a batch, known once the data has been built.
    """

    config: ArfConfig
    engine: Engine
    version: str
    layout: BatchLayout | None = None

    def need_layout(self, args: Any) -> BatchLayout:
        """The layout, or a plain one of task samples alone."""
        return self.layout or BatchLayout(task=args.batch_size)
