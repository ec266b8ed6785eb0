"""Suites: which sets belong together, where they are found, and which averages are reported.

A suite is a small YAML file, shipped in the folder ``suites/`` beside this module or the user's own::

    description: what the table is headed by
    sets:
      pets:                              what results are listed under
        metric: mean_per_class           heads the table: top1 (default), mean_per_class, macro_f1
        classes: 37                      expected number of classes
        templates: ["a photo of a {c}."] in place of the set's own prompts
        classnames: [...]                in place of the set's own names
        subset: first-half               keep these classes alone: first-half, second-half or a list of names
        sources:                         tried in this order below --data-root; `{split}` and `{set}` are filled in
          - {webdataset: vtab/pets, images: 3669}     CLIP_benchmark's WebDataset layout
          - {builder: pets, at: pets}                 a builder of CLIP_benchmark over torchvision's layout
          - {folders: "pets/{split}"}                 one folder of images per class
          - {list: pets/test.txt}                     lines of `path class-number`, as DomainNet's official lists
    averages:
      shift: {kind: shift, of: ["shift/*"]}           mean over sets; a pattern stands for all sets that match
      H: {kind: class-split, harmonic: [seen, unseen]}   harmonic mean of two averages above

Kinds (id, shift, zero-shot, class-split) tell plots what an average is.
"""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from arf_plugin.errors import EvaluationError, did_you_mean
from arf_plugin.plain_yaml import read
from arf_plugin.validation import Listed, Location, Strict, shown, validated

FOLDER = Path(__file__).with_suffix("")
LAYOUTS = ("webdataset", "builder", "folders", "list")
_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1)]


class Source(Strict):
    """One place where a set may be: one of the layouts, which names a path below the data root, or the builder.

    Attributes:
        at: the builder's folder below the data root, if it is not called as the builder.
        images: images that a whole copy has; None if not known.
    """

    webdataset: str | None = None
    builder: str | None = None
    folders: str | None = None
    list: str | None = None
    at: str | None = None
    images: _Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Source:
        found = [layout for layout in LAYOUTS if getattr(self, layout) is not None]
        if len(found) != 1:
            raise ValueError(
                f"a source needs exactly one of {', '.join(LAYOUTS)} (found: {', '.join(found) or 'none'})."
            )
        if self.at is not None and self.builder is None:
            raise ValueError("'at' goes with 'builder' alone; a layout's own value is its path.")
        if Path(self.place).is_absolute() or ".." in Path(self.place).parts:
            raise ValueError(f"{shown(self.place)} leaves the data root, expected a path below it.")
        return self

    @property
    def place(self) -> str:
        """Path below the data root; ``{split}`` is to be filled in."""
        return self.at or self.webdataset or self.builder or self.folders or self.list or ""


class SetEntry(Strict):
    """One set of a suite; see the module's docstring for the attributes."""

    sources: Annotated[Listed[Source], Field(min_length=1)]
    metric: Literal["top1", "mean_per_class", "macro_f1"] = "top1"
    classes: _Count | None = None
    templates: Listed[_Text] = ()
    classnames: Listed[_Text] = ()
    subset: Literal["first-half", "second-half"] | Listed[_Text] | None = None

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{c}" not in template:
                raise ValueError(f"{shown(template)} has no {{c}} for the class name.")
        return templates


class Average(Strict):
    """A score over several sets.

    Attributes:
        kind: tells plots what it is.
        of: names of the sets, patterns expanded.
        harmonic: names of two averages, in place of `of`.
    """

    kind: Literal["id", "shift", "zero-shot", "class-split"]
    of: Listed[_Text] = ()
    harmonic: Listed[_Text] | None = None

    @model_validator(mode="after")
    def _check(self) -> Average:
        if bool(self.of) == (self.harmonic is not None):
            raise ValueError(
                "an average needs either 'of', names of sets, or 'harmonic', two averages above it."
            )
        return self


class SuiteFile(Strict):
    """What a suite's file holds; see the module's docstring."""

    description: str | None = None
    sets: Annotated[dict[str, SetEntry], Field(min_length=1)]
    averages: dict[str, Average] = Field(default_factory=dict)


class Suite(SuiteFile):
    """A suite: entries by name in the file's order, averages by name in the table's order, patterns expanded.

    Attributes:
        name: the file's name without extension.
    """

    name: str


def average(suite: Suite, values: Mapping[str, float]) -> dict[str, float]:
    """A suite's averages by name, in its order, of a score per set; those with a set that lacks one are left out."""
    result: dict[str, float] = {}
    for name, entry in suite.averages.items():
        if entry.harmonic is None:
            if all(member in values for member in entry.of):
                result[name] = statistics.fmean(values[member] for member in entry.of)
        elif all(part in result for part in entry.harmonic):
            result[name] = statistics.harmonic_mean([result[part] for part in entry.harmonic])
    return result


def known_suites() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str | Path) -> Suite:
    """Reads a suite by its name, or an own one by its path.

    Raises:
        EvaluationError: if there is none of that name, or the file is malformed; with file, line and key.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read_suite(path)
    if str(name) not in known_suites():
        raise EvaluationError(
            f"There is no suite {str(name)!r}.{did_you_mean(str(name), known_suites())} Expected one of "
            f"{', '.join(known_suites())}, or the path of an own file that ends in .yaml."
        )
    return read_suite(FOLDER / f"{name}.yaml")


def read_suite(path: Path) -> Suite:
    """Reads a suite file; an EvaluationError names file, line and key of the first mistake."""
    if not path.exists():
        raise EvaluationError(f"There is no suite file at {path}.")
    content, place = read(path, str(path), "a suite", EvaluationError, _scalar)
    if not isinstance(content, dict):
        raise EvaluationError(
            f"{path}, line 1: the file is {shown(content)}, expected a mapping (key: value)."
        )
    suite = validated(SuiteFile, content, str(path), EvaluationError, locate=place)
    averages: dict[str, Average] = {}
    for name, entry in suite.averages.items():
        parts = entry.harmonic
        if parts is not None and (len(parts) != 2 or not averages.keys() >= set(parts)):
            raise EvaluationError(
                f"{place(('averages', name, 'harmonic'))}: 'harmonic' is {str(list(parts))[:200]}, expected two of the "
                f"averages above ({', '.join(averages)[:200]})."
            )
        members: dict[str, None] = {}
        for pattern in entry.of:
            found = fnmatch.filter(suite.sets, pattern)
            if not found:
                meant = did_you_mean(pattern, suite.sets)
                where = place(("averages", name, "of"))
                raise EvaluationError(f"{where}: {shown(pattern)} matches no set of the suite.{meant}")
            members |= dict.fromkeys(found)
        averages[name] = entry.model_copy(update={"of": tuple(members)})
    described = suite.description or path.stem
    return Suite(name=path.stem, description=described, sets=suite.sets, averages=averages)


def _scalar(node: Any, location: Location) -> int | str:
    """Whole numbers; else the text as it is, in places with ``{set}`` filled in."""
    if node.tag.endswith(":int") and len(node.value) < 20 and node.value.lstrip("+-").isdecimal():
        return int(node.value)
    text: str = node.value
    return text.replace("{set}", str(location[1])) if location[2:3] == ("sources",) else text
