"""Evaluation sets: images, class names and prompts.

Folders are read in two layouts. CLIP_benchmark's WebDataset layout::

    SET/classnames.txt                              one class per line
    SET/zeroshot_classification_templates.txt       prompts, `{c}` for the class name
    SET/test/nshards.txt, SET/test/N.tar            KEY.(jpg|png|jpeg|webp) + KEY.cls

and folders of images by class, `SET/<class>/<image>`; there both texts are optional: classes are then called as the
folders are, with spaces, and prompts are CLIP_benchmark's 80 of ImageNet.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arf_plugin.anchors.files import digest
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.prompts import IMAGENET, default_templates
from arf_plugin.evaluation.samples import FILE_EXTENSIONS, Chosen, FileSamples, Samples, TarSamples

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
LAYOUT = f"Expected CLIP_benchmark's layout: {CLASSNAMES}, {TEMPLATES}, test/nshards.txt"


@dataclass(frozen=True)
class EvaluationSet:
    """One classification set.

    Attributes:
        name: what results are listed under.
        classnames: one name per class number.
        templates: prompts with ``{c}``.
        samples: its images.
        split: which part of the data it is.
        metric: the metric that heads the table.
        expected_images: images that a whole copy has; None if not known.
        place: where it was found.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    samples: Samples
    split: str = "test"
    metric: str = "top1"
    expected_images: int | None = None
    place: str = ""

    def __post_init__(self) -> None:
        for template in self.templates:
            _check_template(template, self.place or self.name)
        if not len(self.samples):
            raise EvaluationError(
                f"The set '{self.name}' at {self.place} has no images. Is the copy complete?"
            )

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.samples)

    @property
    def prompts(self) -> str:
        """SHA-256 of class names and templates."""
        return digest([list(self.classnames), list(self.templates)])

    def truncated(self) -> str | None:
        """Says so if the set has not as many images as a whole copy has."""
        if self.expected_images is None or self.images == self.expected_images:
            return None
        kind = "incomplete" if self.images < self.expected_images else "another edition"
        return (
            f"the set '{self.name}' at {self.place} has {self.images:,} images, a whole copy has "
            f"{self.expected_images:,}: is it {kind}? Its figures are not comparable with others'."
        )

    def restricted(self, subset: str | Sequence[str]) -> EvaluationSet:
        """The part of the set with some of its classes, which are then the only answers.

        Args:
            subset: "first-half" or "second-half" of the classes (the first has the odd one), or class names.

        Raises:
            EvaluationError: for a name that is no class, or data that do not say their classes beforehand.
        """
        half = (len(self.classnames) + 1) // 2
        if isinstance(subset, str):
            kept = list(range(len(self.classnames)))[: half if subset == "first-half" else None]
            kept = kept[half if subset == "second-half" else 0 :]
        else:
            unknown = [name for name in subset if name not in self.classnames]
            if unknown:
                raise EvaluationError(f"'{unknown[0]}' is no class of '{self.name}' at {self.place}.")
            kept = [self.classnames.index(name) for name in subset]
        if not isinstance(self.samples, (TarSamples, FileSamples)):
            raise EvaluationError(
                f"'subset' needs '{self.name}' as a WebDataset folder or as folders of images, not from a builder."
            )
        names = tuple(self.classnames[number] for number in kept)
        chosen = Chosen(self.samples, kept)
        return replace(self, classnames=names, samples=chosen, expected_images=None)


def find_sets(folder: Path, split: str = "test") -> list[EvaluationSet]:
    """Finds the set in a folder, or all sets below it.

    Raises:
        EvaluationError: if there is none.
    """
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}. Expected a set, or a folder of sets.")
    roots = sorted(path.parent.parent for path in folder.rglob(f"{split}/nshards.txt"))
    if roots:
        return [
            open_webdataset(root, str(root.relative_to(folder)) if root != folder else folder.name, split)
            for root in roots
        ]
    if _classes_of(folder):
        return [open_folders(folder, folder.name, split=split)]
    raise EvaluationError(
        f"There is no evaluation set in or below {folder}. {LAYOUT.replace('test/', f'{split}/')}; or one folder "
        "of images per class."
    )


def open_webdataset(root: Path, name: str, split: str = "test") -> EvaluationSet:
    """Opens a set in CLIP_benchmark's WebDataset layout.

    Raises:
        EvaluationError: if a file is missing or malformed.
    """
    listed = root / split / "nshards.txt"
    count = " ".join(read_lines(listed))
    if not count.isdecimal() or int(count) == 0:
        raise EvaluationError(f"{listed} says {count[:40]!r}, expected the number of tars.")
    templates = read_lines(root / TEMPLATES)
    for template in templates:
        _check_template(template, str(root / TEMPLATES))
    names = read_lines(root / CLASSNAMES)
    shards = [root / split / f"{number}.tar" for number in range(int(count))]
    samples = TarSamples(shards, len(names))
    return EvaluationSet(name, tuple(names), tuple(templates), samples, split, place=str(root))


def open_folders(root: Path, name: str, split: str = "test") -> EvaluationSet:
    """Opens a set of one folder of images per class, numbered in the order of their names.

    Raises:
        EvaluationError: if there are no such folders, or classnames.txt counts other classes.
    """
    classes = _classes_of(root)
    files = [
        (str(path.relative_to(root)), number)
        for number, folder in enumerate(classes)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower()[1:] in FILE_EXTENSIONS and path.is_file()
    ]
    names = [folder.name.replace("_", " ") for folder in classes]
    return _own_texts(root, name, names, FileSamples(root, files), split)


def open_list(path: Path, name: str, split: str = "test") -> EvaluationSet:
    """Opens a set by a list with lines of `path class-number`, paths being relative to the list's folder.

    Classes are called as the folders of their images are; every number from 0 on must occur.

    Raises:
        EvaluationError: for a malformed line, a missing image, or a path that leaves the folder.
    """
    files: list[tuple[str, int]] = []
    names: dict[int, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        where, _, cls = line.rpartition(" ")
        if not where or not cls.isdecimal():
            raise EvaluationError(f"{path}, line {number}: {line[:80]!r}, expected `path class-number`.")
        if Path(where).is_absolute() or ".." in Path(where).parts:
            raise EvaluationError(f"{path}, line {number}: {where!r} leaves the folder {path.parent}.")
        files.append((where, int(cls)))
        names.setdefault(int(cls), Path(where).parent.name.replace("_", " "))
    if sorted(names) != list(range(len(names))):
        missing = next(number for number in range(max(names) + 1) if number not in names)
        raise EvaluationError(
            f"{path} has no image of class {missing}, but some of class {max(names)}: is it complete?"
        )
    ordered = [names[number] for number in range(len(names))]
    return _own_texts(path.parent, name, ordered, FileSamples(path.parent, files), split, str(path))


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, stripped, without blank ones at the end.

    Raises:
        EvaluationError: if it is missing or empty, or a line between others is blank.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as cause:
        raise EvaluationError(f"{path} cannot be read: {cause}. {LAYOUT}.") from cause
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise EvaluationError(f"{path} is empty. {LAYOUT}.")
    if "" in lines:
        raise EvaluationError(f"{path}, line {lines.index('') + 1} is blank. Remove it: lines are counted.")
    return lines


def _own_texts(
    root: Path, name: str, names: list[str], samples: FileSamples, split: str, place: str = ""
) -> EvaluationSet:
    """A set of files with the texts beside them, where there are any."""
    if (root / CLASSNAMES).is_file():
        written = read_lines(root / CLASSNAMES)
        if len(written) != len(names):
            raise EvaluationError(
                f"{root / CLASSNAMES} names {len(written)} classes, but there are images of {len(names)}: "
                f"{', '.join(names[:3])} ... Mend the list, or remove it to use these names."
            )
        names = written
    templates = read_lines(root / TEMPLATES) if (root / TEMPLATES).is_file() else default_templates(IMAGENET)
    return EvaluationSet(name, tuple(names), tuple(templates), samples, split, place=place or str(root))


def _classes_of(root: Path) -> list[Path]:
    """Folders directly below that hold images."""
    if not root.is_dir():
        return []
    return sorted(
        folder
        for folder in root.iterdir()
        if folder.is_dir()
        and not folder.name.startswith(".")
        and any(path.suffix.lower()[1:] in FILE_EXTENSIONS for path in folder.iterdir())
    )


def _check_template(template: str, where: str) -> None:
    try:
        fields = [
            (field, spec, conversion) for _, field, spec, conversion in string.Formatter().parse(template)
        ]
    except ValueError as cause:
        raise EvaluationError(f"{where}: {template!r} is no template: {cause}.") from None
    named = [field for field in fields if field[0] is not None]
    if not named:
        raise EvaluationError(f"{where}: {template!r} has no {{c}} for the class name.")
    if any(field != ("c", "", None) for field in named):
        raise EvaluationError(f"{where}: {template!r} has another field than {{c}}, the class name.")
