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

import difflib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arf_plugin.errors import EvaluationError

FOLDER = Path(__file__).with_suffix("")
METRICS = ("top1", "mean_per_class", "macro_f1")
LAYOUTS = ("webdataset", "builder", "folders", "list")
KINDS = ("id", "shift", "zero-shot", "class-split")
HALVES = ("first-half", "second-half")


@dataclass(frozen=True)
class Source:
    """One place where a set may be.

    Attributes:
        layout: one of `LAYOUTS`.
        name: path below the data root, or the builder's name.
        at: the builder's folder below the data root.
        images: images that a whole copy has; None if not known.
    """

    layout: str
    name: str
    at: str
    images: int | None = None


@dataclass(frozen=True)
class SetEntry:
    """One set of a suite; see the module's docstring for the attributes."""

    name: str
    sources: tuple[Source, ...]
    metric: str = "top1"
    classes: int | None = None
    templates: tuple[str, ...] = ()
    classnames: tuple[str, ...] = ()
    subset: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Average:
    """A figure over several sets.

    Attributes:
        name: the column's heading.
        kind: one of `KINDS`.
        of: names of the sets, patterns expanded.
        harmonic: names of two averages, in place of `of`.
    """

    name: str
    kind: str
    of: tuple[str, ...] = ()
    harmonic: tuple[str, str] | None = None


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        name: the file's name without extension.
        description: one line.
        sets: entries by name, in the file's order.
        averages: averages by name, in the table's order.
    """

    name: str
    description: str
    sets: Mapping[str, SetEntry]
    averages: Mapping[str, Average]

    def metric(self, name: str) -> str:
        """The metric that heads the table for a set."""
        return self.sets[name].metric if name in self.sets else "top1"


def known_suites() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def average(suite: Suite, values: Mapping[str, float]) -> dict[str, float]:
    """Computes a suite's averages.

    Args:
        suite: the suite.
        values: a figure per set, such as top-1 in percent.

    Returns:
        Figure by average, in the suite's order; those with a set that `values` lacks are left out.
    """
    result: dict[str, float] = {}
    for name, entry in suite.averages.items():
        if entry.harmonic is None:
            if all(member in values for member in entry.of):
                result[name] = statistics.fmean(values[member] for member in entry.of)
        elif all(part in result for part in entry.harmonic):
            result[name] = statistics.harmonic_mean([result[part] for part in entry.harmonic])
    return result


def load_suite(name: str | Path) -> Suite:
    """Reads a suite by its name, or an own one by its path.

    Raises:
        EvaluationError: if there is none of that name, or the file is malformed; with file, line and key.
    """
    from arf_plugin.evaluation.suite_file import read_suite

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read_suite(path)
    if str(name) not in known_suites():
        close = difflib.get_close_matches(str(name), known_suites(), n=1)
        raise EvaluationError(
            f"There is no suite {str(name)!r}{f' (did you mean {close[0]}?)' if close else ''}. Expected one of "
            f"{', '.join(known_suites())}, or the path of an own file that ends in .yaml."
        )
    return read_suite(FOLDER / f"{name}.yaml")
