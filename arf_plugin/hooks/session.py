"""What the hooks of one training run share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arf_plugin.config import ArfConfig
from arf_plugin.data.batch import BatchLayout
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.hooks.engine import Engine

if TYPE_CHECKING:
    from arf_plugin.hooks.epoch import EpochListener, Training


@dataclasses.dataclass
class Session:
    """State of one training run.

    Attributes:
        config: The ARF flags.
        engine: Applies the rows of later phases.
        version: Upstream's version.
        layout: Sizes of a batch, known once the data has been built.
        model: The model that trains, known once it has been built.
        random_parts: Names of weights, of it or of a teacher, that have come from no file.
        start: Its parameters as training starts from them, by name, if the loss refers to them.
        task: The task that trains it, in releases that build one.
        trimmers: For each model, the teacher's included, how its texts can be cut, or why they cannot.
        training: What the trainer holds in the current epoch, known once the first one begins.
        listeners: Who is told of every epoch.
        resumed: What the step checkpoint that the run goes on from says beside its weights; None without one.
    """

    config: ArfConfig
    engine: Engine
    version: str
    layout: BatchLayout | None = None
    model: nn.Module | None = None
    random_parts: list[str] = dataclasses.field(default_factory=list)
    start: dict[str, torch.Tensor] | None = None
    task: nn.Module | None = None
    trimmers: list[TextTrimmer | str] = dataclasses.field(default_factory=list)
    training: Training | None = None
    listeners: list[EpochListener] = dataclasses.field(default_factory=list)
    resumed: dict[str, Any] | None = None

    def trimmer(self) -> TextTrimmer | str:
        """How the texts of a batch can be cut for all models that read them, or why they cannot."""
        reasons = [found for found in self.trimmers if isinstance(found, str)]
        if reasons:
            return reasons[0]
        if not self.trimmers:
            return "it is not known"
        if len(set(self.trimmers)) != 1:
            return "student and teacher end their texts differently"
        return self.trimmers[0]

    def need_layout(self, args: Any) -> BatchLayout:
        """The layout, or a plain one of task samples alone."""
        return self.layout or BatchLayout(task=args.batch_size)
