"""What a grid is, and how its file is written; reader.py reads it.

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
    merge: [stock, soup]            also the seeds of every arm merged: Model Stock, the uniform soup
    reference: flyp                 the arm that cost is compared with
    anchors:                        anchor sets by name: a folder, or how to build one under GRID/anchors/NAME
      retrieved: ANCHORS
      random:
        captions: retrieved         take the captions of that set
        build: ['retrieve --random ... --out ${out}/hits', 'pack --retrieved ${out}/hits --out ${out}']
    choose: {over: [{lr: 1e-5}, {lr: 3e-5}], by: ID}    for every arm that has no `choose` of its own
                                    `by: ID + shift` is the mean of both
    arms:
      - {name: before, kind: before}                    not trained
      - {name: flyp, label: FLYP, kind: baseline, what: one sentence, flags: {...}}
      - {name: arf, label: ARF, kind: arf, anchors: retrieved, flags: {arf-caption-weight: 0.5}}
      - {name: mixed, kind: baseline, anchors: retrieved, mix: 0.5}      half of the task data are pairs
      - {name: probe, kind: baseline, probe: {l2: 1e-3}}                 `arf probe` in the trainer's place
      - {name: lp-ft, kind: baseline, head: probe}                       --arf-head of that arm's checkpoint
      - flyp                        in a grid that extends another: that grid's arm

Paths are relative to the folder the command runs in, as with the trainer's flags.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr

from arf_plugin.validation import Strict

BUILDERS = ("caption", "embed", "index", "retrieve", "pack", "anchors", "features")
COUNTS = {"epochs": 32, "batch-size": 64, "workers": 4, "accum-freq": 1}  # open_clip's defaults
RESERVED = {  # flags that the grid sets itself, and where it takes them from
    **{name: f"the entry '{name}'" for name in ("model", "pretrained")},
    **dict.fromkeys(("train-data", "dataset-type"), "'task'"),
    **{f"arf-{name}": f"'task', as '{name}'" for name in ("classnames", "templates")},
    "train-num-samples": "'task', as 'samples'",
    "train-data-upsampling-factors": "the arm's entry 'mix'",
    **{f"arf-{name}": f"the arm's entry '{name}'" for name in ("anchors", "head")},
    "logs": "--out",
    "name": "the arm's name and seed",
    "seed": "'seeds'",
    "resume": "the grid, which resumes by itself",
    **dict.fromkeys(
        ("save-frequency", "delete-previous-checkpoint"), "the grid, which keeps the last checkpoint"
    ),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+]*(?:-[A-Za-z0-9._+]+)*")
T = TypeVar("T")


def deciding(by: str) -> list[str]:
    """The averages whose mean decides a choice: one, or several as `ID + shift`."""
    return [name.strip() for name in by.split(" + ")]


# What follows reads a file's scalars, which are texts as they were written, but for true, false and nothing.


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("found an empty text, expected one with something in it.")
    return text


def _folder_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"found '{text[:80]}', expected a name for folders: letters, digits and . _ - +.")
    return text


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 19 else value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _several(value: Any) -> Any:
    """A single value stands for a list of one, and nothing for an empty one."""
    return value if isinstance(value, (list, tuple, dict)) else [] if value is None else [value]


def _flag_name(name: str) -> str:
    if name.startswith("-") or "_" in name or name != name.lower():
        spelled = name.lstrip("-").replace("_", "-").lower()
        raise ValueError(f"found the flag '{name}', expected it without dashes in front: '{spelled}'.")
    if name in RESERVED:
        raise ValueError(f"--{name} is set by the grid: it comes from {RESERVED[name]}.")
    return name


def _flag_words(value: Any) -> Any:
    """``true`` is a bare switch, ``false`` or nothing switches a flag off, a list gives several words."""
    if value is None or isinstance(value, bool):
        return () if value else None
    return value if isinstance(value, dict) else tuple(_several(value))


def _arf_command(value: Any) -> Any:
    words = shlex.split(value) if isinstance(value, str) else value
    return tuple(words[1:] if words[:1] == ["arf"] else words) if isinstance(words, list) else words


def _builds_anchors(words: tuple[str, ...]) -> tuple[str, ...]:
    if not words or words[0] not in BUILDERS:
        expected = f"expected a command of arf that builds anchors: {', '.join(BUILDERS)}"
        raise ValueError(f"found '{' '.join(words[:1])[:80]}', {expected}.")
    return words


def _candidates(over: tuple[Flags, ...]) -> tuple[Flags, ...]:
    if len(over) < 2:
        raise ValueError("a choice needs at least two candidates; put a single one into 'flags'.")
    return over


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"found {list(seeds)}, expected one seed or more, each once.")
    return seeds


Text = Annotated[str, AfterValidator(_text)]
Name = Annotated[str, AfterValidator(_folder_name)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Several = Annotated[tuple[T, ...], BeforeValidator(_several), Field(strict=False)]
Alpha = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
# name without dashes -> its words; () for a switch, None for one that is switched off
Flags = dict[
    Annotated[str, AfterValidator(_flag_name)],
    Annotated[tuple[Text, ...] | None, BeforeValidator(_flag_words)],
]
Command = Annotated[tuple[Text, ...], BeforeValidator(_arf_command), AfterValidator(_builds_anchors)]


class Task(Strict):
    """Task data: shards, how many samples (None: counted), and files of class names and templates."""

    data: Text
    samples: Positive | None = None
    classnames: Text | None = None
    templates: Text | None = None


class Evaluation(Strict):
    """Suite (name or path), and the data roots of its test and validation sets; no validation is fine."""

    suite: Text
    test: Text
    validation: Text | None = None
    validation_split: Text = Field(default="validation", alias="validation-split")
    batch_size: Positive = Field(default=256, alias="batch-size")


class Wise(Strict):
    """WiSE-FT: alphas, and the average of the validation sets that chooses among them."""

    alphas: Annotated[Several[Alpha], AfterValidator(lambda alphas: tuple(sorted(set(alphas))))] = ()
    by: Text | None = None


class AnchorSet(Strict):
    """An anchor set: what arms call it, its folder, the set whose captions it takes, `arf` commands that make it."""

    name: Name
    path: Path = Field(strict=False)
    captions: Text | None = None
    build: Several[Command] = ()

    @property
    def is_built(self) -> bool:
        """Whether the grid makes it."""
        return bool(self.build or self.captions)


class Choice(Strict):
    """Hyper-parameters chosen on validation: candidates, and the average (or a mean of some: `A + B`) that decides."""

    over: Annotated[Several[Flags], AfterValidator(_candidates)]
    by: Text


class Arm(Strict):
    """One arm of the grid; see the module's docstring for the entries.

    Once read, it has a label, and its flags are complete: those of the trainer, or of `arf probe` for a probe.
    """

    name: Name
    label: str = ""
    what: str = ""
    kind: Literal["before", "baseline", "control", "arf"]
    anchors: Text | None = None
    flags: Flags = Field(default_factory=dict)
    choice: Choice | None = Field(default=None, alias="choose")
    mix: Annotated[float, BeforeValidator(_number), Field(ge=0.001, le=0.999)] | None = None
    probe: Annotated[Flags, BeforeValidator(lambda value: {} if value in (None, True) else value)] | None = (
        None
    )
    head: Text | None = None
    _where: str = PrivateAttr("")

    @property
    def where(self) -> str:
        """Its place in the file."""
        return self._where

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to run for it."""
        return self.kind != "before"

    @property
    def is_probe(self) -> bool:
        """Whether `arf probe` makes it."""
        return self.probe is not None

    @property
    def is_mixable(self) -> bool:
        """Whether its weights may be averaged: a probe differs from the model before by its head alone."""
        return self.is_trained and not self.is_probe

    def with_candidate(self, index: int | None) -> Arm:
        """The arm with a candidate's flags, or as it is if it has no choice."""
        if self.choice is None or index is None:
            return self
        return self.model_copy(update={"flags": merge(self.flags, self.choice.over[index]), "choice": None})


class Grid(Strict):
    """A whole grid; see the module's docstring for the entries."""

    name: Text
    extends: Text | None = None
    variables: dict[str, Any] = Field(default_factory=dict)
    model: Text
    pretrained: Text | None = None
    task: Task
    trainer: Flags
    processes: Positive = 1
    seeds: Annotated[Several[Whole], AfterValidator(_each_once)]
    evaluation: Evaluation
    wise: Annotated[
        Wise, BeforeValidator(lambda value: value if isinstance(value, dict) else {"alphas": value})
    ] = Wise()
    merge: Several[Literal["stock", "soup"]] = ()
    reference: Text | None = None
    choose: Choice | None = None
    anchors: dict[str, AnchorSet] = Field(default_factory=dict)
    arms: Several[Arm]

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


def command_words(flags: Flags) -> list[str]:
    """The flags as a command line."""
    return [word for name, values in flags.items() if values is not None for word in (f"--{name}", *values)]
