"""What the hooks of one training run hand on: each finds its part when the trainer calls it, and others read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from arf_plugin.checks.inputs import StartingModel
from arf_plugin.config import ArfConfig
from arf_plugin.data.batch import BatchLayout, OptimizerStep
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.errors import ArfError
from arf_plugin.hooks.training import EpochListener
from arf_plugin.losses.average import WeightAverage


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What is known of the run's models once they have been built.

    Attributes:
        model: The model that trains.
        random_parts: Names of weights, of it or of a teacher, that have come from no file.
        trimmer: How the texts of a batch can be cut for all models that read them, or why they cannot.
        start: Its parameters as training starts from them, by name, if the loss refers to them.
        starting: How its features compare with those in the anchor set, or the error that this has met; in the first
            process, if anchors are held by them.
        copy: A copy of it as training starts from it, frozen, if ``--arf-teacher`` needs one.
    """

    model: nn.Module
    random_parts: tuple[str, ...]
    trimmer: TextTrimmer | str
    start: dict[str, torch.Tensor] | None = None
    starting: StartingModel | ArfError | None = None
    copy: nn.Module | None = None

    def with_teacher(self, random_parts: tuple[str, ...], trimmer: TextTrimmer | str) -> ModelFacts:
        """The same with a teacher, which reads the same texts."""
        reasons = [found for found in (self.trimmer, trimmer) if isinstance(found, str)]
        if not reasons and self.trimmer != trimmer:
            reasons = ["student and teacher end their texts differently"]
        both = reasons[0] if reasons else trimmer
        return dataclasses.replace(self, random_parts=self.random_parts + random_parts, trimmer=both)


@dataclasses.dataclass(frozen=True)
class DataPlan:
    """What the loss needs of the data.

    Attributes:
        layout: What a batch with anchors is made of.
        step: What the batches of the current optimizer step are made of.
    """

    layout: BatchLayout
    step: OptimizerStep


@dataclasses.dataclass
class Session:
    """One training run.

    Attributes:
        config: The ARF flags.
        version: Upstream's version.
        model: Set by the hook of the models.
        resumed: What the step checkpoint that the run goes on from says beside its weights; set by the hook that
            loads checkpoints.
        task: The task that trains the model; set by its hook, in releases that build one.
        data: Set by the hook of the data.
        average: The average of the weights so far, for step checkpoints; set with the data if the run has one.
        listeners: Who is told of every epoch.
    """

    config: ArfConfig
    version: str
    model: ModelFacts | None = None
    resumed: Mapping[str, Any] | None = None
    task: Any = None
    data: DataPlan | None = None
    average: WeightAverage | None = None
    listeners: list[EpochListener] = dataclasses.field(default_factory=list)
