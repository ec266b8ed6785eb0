"""Finds the sets of a suite below a data root."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from arf_plugin.errors import EvaluationError, MissingDependencyError
from arf_plugin.evaluation.folders import read_classes, shortened
from arf_plugin.evaluation.samples import BuilderSamples
from arf_plugin.evaluation.sets import (
    EvaluationSet,
    open_folders,
    open_list,
    open_webdataset,
    warn_of_repeated,
)
from arf_plugin.evaluation.suites import SetEntry, Source, Suite

# CLIP_benchmark's builders over torchvision's layout, and whether they know splits.
BUILDERS = {
    **dict.fromkeys(("imagenet1k-unverified", "imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r"), True),
    **dict.fromkeys(("imagenet-o", "objectnet", "pets", "cars", "flowers", "food101", "fgvc_aircraft"), True),
    **dict.fromkeys(("dtd", "cifar10", "cifar100", "mnist", "stl10", "gtsrb", "country211", "fer2013"), True),
    **dict.fromkeys(("pcam", "renderedsst2"), True),
    **dict.fromkeys(("caltech101", "eurosat", "sun397"), False),
}  # fmt: skip
_V2_IMAGES = 10_000


class Found(NamedTuple):
    """What there is of a suite: opened sets, in its order; and for each other set where it was looked for."""

    sets: list[EvaluationSet]
    missing: dict[str, list[str]]


def find_suite(suite: Suite, root: Path, split: str = "test", only: Sequence[str] = ()) -> Found:
    """Opens the sets of a suite below a folder: those that names or patterns in `only` name, or all.

    Raises:
        EvaluationError: for a root that is missing, a name in `only` that is no set, or a set that is malformed.
    """
    if not root.is_dir():
        raise EvaluationError(
            f"There is no folder {root}. Expected the data root of the suite '{suite.name}'."
        )
    for pattern in only:
        if not fnmatch.filter(suite.sets, pattern):
            raise EvaluationError(
                f"{pattern!r} is no set of the suite '{suite.name}'. Expected some of {', '.join(suite.sets)}."
            )
    sets: list[EvaluationSet] = []
    missing: dict[str, list[str]] = {}
    for name, entry in suite.sets.items():
        if only and not any(fnmatch.fnmatch(name, pattern) for pattern in only):
            continue
        places: list[str] = []
        for source in entry.sources:
            opened = _open(name, source, root, split, places)
            if opened is not None:
                sets.append(_with_entry(entry, source, opened))
                break
        else:
            missing[name] = places
    return Found(sets, missing)


def missing_text(suite: Suite, found: Found) -> str:
    """Says which sets were not found, and where they were looked for."""
    lines = [f"  {name}: no {' and no '.join(places)}" for name, places in found.missing.items()]
    return f"{len(lines)} of the sets of '{suite.name}' are not there:\n" + "\n".join(lines)


def _open(name: str, source: Source, root: Path, split: str, places: list[str]) -> EvaluationSet | None:
    """Opens a set from a source, or adds to `places` where it was looked for."""
    at = source.place.replace("{split}", split)
    if source.webdataset is not None:
        inner = "test" if "{split}" in source.place else split
        cleaned = at.replace("/", "-")
        for place in dict.fromkeys((at, cleaned, f"wds_{cleaned}", f"wds/{at}")):
            if (root / place / inner / "nshards.txt").is_file():
                return replace(open_webdataset(root / place, name, inner), split=split)
        places.append(str(root / at / inner / "nshards.txt"))
        return None
    path = root / at
    if not (path.is_dir() if source.list is None else path.is_file()):
        places.append(f"{path}/" if source.list is None else str(path))
        return None
    if source.list is not None:
        return open_list(path, name, split)
    return _build(name, source.builder, path, split) if source.builder else open_folders(path, name, split)


def _with_entry(entry: SetEntry, source: Source, opened: EvaluationSet) -> EvaluationSet:
    """The set with the suite's own texts, metric and counts."""
    names = entry.classnames or opened.classnames
    expected = entry.classes if entry.classes is not None else len(opened.classnames)
    for count, what in ((len(opened.classnames), f"{opened.place} has"), (len(names), "'classnames' has")):
        if count != expected:
            raise EvaluationError(
                f"The set '{opened.name}': {what} {count} classes, expected {expected}. Is it another data set, or a "
                "part of it? Make a suite of your own for it (a YAML file), or evaluate it with --data."
            )
    changed = replace(
        opened,
        classnames=names,
        templates=entry.templates or opened.templates,
        metric=entry.metric,
        expected_images=source.images,
    )
    return changed.restricted(entry.subset) if entry.subset else changed


def _build(name: str, builder: str, root: Path, split: str) -> EvaluationSet:
    """Opens a data set by CLIP_benchmark's builder; nothing is downloaded."""
    if builder not in BUILDERS:
        raise EvaluationError(
            f"The set '{name}': CLIP_benchmark's builder {builder!r} cannot be used here, expected one of "
            f"{', '.join(BUILDERS)}. Export other sets with clip_benchmark_export_wds."
        )
    try:
        from clip_benchmark.datasets.builder import build_dataset
    except ImportError:
        raise MissingDependencyError("clip-benchmark", "Evaluation", "evaluation") from None
    if builder == "imagenetv2":
        _whole_v2(root)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # that splits are ignored: records say it
            dataset: Any = build_dataset(builder, root=str(root), transform=None, split=split, download=False)
    except Exception as cause:  # torchvision raises many kinds
        raise EvaluationError(
            f"The set '{name}': CLIP_benchmark's builder {builder!r} cannot read {root}: {cause}"
        ) from cause
    folders = getattr(dataset, "class_to_idx", None)
    if builder != "objectnet" and folders is not None and len(folders) != len(dataset.classes):
        raise EvaluationError(
            f"The set '{name}': {root} has {len(folders)} folders, expected one for each of "
            f"{len(dataset.classes)} classes. Class numbers would be wrong; copy the data set again."
        )
    if builder != "objectnet" and type(dataset).__name__ == "ImageFolder":
        _all_is_read(name, Path(dataset.root), dataset)
    part = split if BUILDERS[builder] else "all"
    samples = BuilderSamples(dataset, builder, len(dataset.classes), root, part)
    warn_of_repeated(dataset.classes, f"the set '{name}'")
    return EvaluationSet(
        name, tuple(dataset.classes), tuple(dataset.templates), samples, part, place=str(root)
    )


def _all_is_read(name: str, root: Path, dataset: Any) -> None:
    """Refuses what torchvision's ImageFolder, which the builder uses, passes over in silence."""
    files = {str(root / path) for one in read_classes(root, named=True) for path in one.images}
    left = sorted(files.difference(str(Path(path)) for path, _ in dataset.samples))
    if left:
        raise EvaluationError(
            f"The set '{name}': the builder passes over {shortened(left)}. Convert them to PNG, or remove them."
        )


def _whole_v2(root: Path) -> None:
    """Refuses what CLIP_benchmark would answer with a download and an unsafe extraction."""
    folder = root / "ImageNetV2-matched-frequency"
    count = sum(1 for _ in folder.glob("**/*.jpeg")) if folder.is_dir() else 0
    if count != _V2_IMAGES:
        raise EvaluationError(
            f"{folder} has {count:,} images, expected {_V2_IMAGES:,}. Extract "
            "imagenetv2-matched-frequency.tar.gz and give its folder this name."
        )
