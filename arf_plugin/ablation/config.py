"""What a grid is, and how its file is written; :mod:`arf_plugin.ablation.reader` reads it.

::

    name: my-grid
    extends: emojinet               another grid, by name or path: its entries hold unless given here
    variables: {data: data/my}      ${data} in the texts below; `arf ablate --set data=...` changes it
    model: ViT-B-16                 as open_clip's --model; local-dir:FOLDER works, too
    pretrained: openai              as --pretrained
    task: {data: '${data}/{000..099}.tar', samples: 50000, classnames: FILE, templates: FILE}
    trainer: {epochs: 10, batch-size: 64, lr: 1e-5}     flags of open_clip's trainer for all arms
    processes: 8                    torchrun's --nproc_per_node
    seeds: [0, 1, 2]
    evaluation: {suite: imagenet-shifts, test: FOLDER, validation: FOLDER}     data roots, as of `arf evaluate`
    wise: {alphas: [0.25, 0.5, 0.75], by: ID}       WiSE-FT: every arm is mixed at these, one is chosen by validation
    reference: flyp                 the arm that cost is compared with
    anchors:                        anchor sets by name: a folder, or how to build one under GRID/anchors/NAME
      retrieved: ANCHORS
      random:
        captions: retrieved         take the captions of that set
        build: ['retrieve --random ... --out ${out}/hits', 'pack --retrieved ${out}/hits --out ${out}']
    choose: {over: [{lr: 1e-5}, {lr: 3e-5}], by: ID}    for every arm that has no `choose` of its own
    arms:
      - {name: before, kind: before}                    not trained
      - {name: flyp, label: FLYP, kind: baseline, what: one sentence, flags: {...}}
      - {name: arf, label: ARF, kind: arf, anchors: retrieved, flags: {arf-caption-weight: 0.5}}
      - {name: mixed, kind: baseline, anchors: retrieved, mix: 0.5}      pairs are half of the task data
      - {name: probe, kind: baseline, probe: {l2: 1e-3}}                 `arf probe` in the trainer's place
      - {name: lp-ft, kind: baseline, head: probe}                       --arf-head of that arm's checkpoint
      - flyp                        in a grid that extends another: that grid's arm

Paths are relative to the folder the command runs in, as with the trainer's flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from arf_plugin.ablation.flags import Flags


@dataclass(frozen=True)
class Task:
    """Task data: shards, how many samples (None: counted), and files of class names and templates."""

    data: str
    samples: int | None = None
    classnames: str | None = None
    templates: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Suite (name or path), and the data roots of its test and validation sets; no validation is fine."""

    suite: str
    test: str
    validation: str | None = None
    validation_split: str = "validation"
    batch_size: int = 256


@dataclass(frozen=True)
class AnchorSet:
    """An anchor set.

    Attributes:
        name: what arms call it.
        path: its folder.
        captions: name of the set whose captions it takes.
        build: `arf` commands that make it, in order; empty if it is there already.
    """

    name: str
    path: Path
    captions: str | None = None
    build: tuple[tuple[str, ...], ...] = ()

    @property
    def is_built(self) -> bool:
        """Whether the grid makes it."""
        return bool(self.build or self.captions)


@dataclass(frozen=True)
class Choice:
    """Hyper-parameters chosen on validation: candidates, and the average that decides."""

    over: tuple[Flags, ...]
    by: str


@dataclass(frozen=True)
class Arm:
    """One arm of the grid.

    Attributes:
        name: of its runs' folders.
        label: in tables.
        what: one sentence on what it does.
        kind: ``before``, ``baseline``, ``control`` or ``arf``.
        flags: of the trainer, the common ones included; of `arf probe` for a probe.
        anchors: name of its anchor set.
        choice: how its open hyper-parameters are chosen.
        mix: share of anchor pairs in the task data (plain mixing); None for anchors as anchors.
        probe: whether `arf probe` makes it.
        head: name of the probe arm whose head it starts from.
        where: its place in the file.
    """

    name: str
    label: str
    what: str
    kind: str
    flags: Flags = field(default_factory=dict)
    anchors: str | None = None
    choice: Choice | None = None
    mix: float | None = None
    probe: bool = False
    head: str | None = None
    where: str = ""

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to run for it."""
        return self.kind != "before"

    def with_candidate(self, index: int) -> Arm:
        """The arm with a candidate's flags."""
        assert self.choice is not None
        return replace(self, flags=merge(self.flags, self.choice.over[index]), choice=None)


@dataclass(frozen=True)
class Grid:
    """A whole grid; see the module's docstring for the entries."""

    name: str
    model: str
    pretrained: str | None
    task: Task
    processes: int
    seeds: tuple[int, ...]
    evaluation: Evaluation
    wise: tuple[float, ...]
    wise_by: str | None
    reference: str | None
    anchors: Mapping[str, AnchorSet]
    arms: tuple[Arm, ...]

    def arm(self, name: str) -> Arm:
        """An arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def before(self) -> Arm:
        """The arm that stands for the model before fine-tuning."""
        return next(arm for arm in self.arms if not arm.is_trained)


def merge(common: Flags, own: Flags) -> Flags:
    """Flags of all arms with those of one over them; what is switched off (None) is left out."""
    return {name: words for name, words in {**common, **own}.items() if words is not None}
