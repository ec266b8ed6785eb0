"""Evaluation sets: images, class names and prompts.

There are two layouts. CLIP_benchmark's WebDataset layout::

    SET/classnames.txt                              one class per line
    SET/zeroshot_classification_templates.txt       prompts, `{c}` for the class name
    SET/test/nshards.txt, SET/test/N.tar            KEY.(webp|png|jpg|jpeg) + KEY.cls

and folders of images by class, `SET/<class>/<image>`; there both texts are optional: classes are then called as the
folders are, with spaces, and prompts are CLIP_benchmark's 80 of ImageNet. Classes, their numbers and images are those
of torchvision's ``ImageFolder``; :mod:`arf_plugin.evaluation.folders` says what differs. classnames.txt names the
folders in the order of their names.
"""

from __future__ import annotations

import importlib.util
import os
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arf_plugin.data.prompts import repeated_names
from arf_plugin.errors import EvaluationError, MissingDependencyError
from arf_plugin.evaluation.folders import NSHARDS, ClassFolder, read_classes, shortened, survey, warn
from arf_plugin.evaluation.samples import Samples, StoredSamples, file_samples, tar_samples
from arf_plugin.files import digest, list_files
from arf_plugin.untrusted import decode_text, read_json, require_regular, split_lines, utf8

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
LAYOUT = f"Expected CLIP_benchmark's layout: {CLASSNAMES}, {TEMPLATES}, test/nshards.txt"


@dataclass(frozen=True)
class EvaluationSet:
    """One classification set."""

    name: str  # what results are listed under
    classnames: tuple[str, ...]  # one per class number
    templates: tuple[str, ...]  # prompts with ``{c}``
    samples: Samples
    split: str = "test"
    metric: str = "top1"  # heads the table
    expected_images: int | None = None  # what a whole copy has; None if not known
    place: str = ""  # where it was found

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
            f"{self.expected_images:,}: is it {kind}? Its scores are not comparable with others'."
        )

    def restricted(self, subset: str | Sequence[str]) -> EvaluationSet:
        """The part of the set with some of its classes, which are then the only answers.

        Args:
            subset: "first-half" or "second-half" of the classes (the first has the odd one), or class names.

        Raises:
            EvaluationError: for a name that is no class, or data that do not say their classes beforehand.
        """
        numbers, half = range(len(self.classnames)), (len(self.classnames) + 1) // 2
        kept: Sequence[int]
        if subset == "first-half":
            kept = numbers[:half]
        elif subset == "second-half":
            kept = numbers[half:]
        elif unknown := [name for name in subset if name not in self.classnames]:
            raise EvaluationError(f"'{unknown[0]}' is no class of '{self.name}' at {self.place}.")
        else:
            kept = [self.classnames.index(name) for name in subset]
        if not isinstance(self.samples, StoredSamples):
            raise EvaluationError(
                f"'subset' needs '{self.name}' as a WebDataset folder or as folders of images, not from a builder."
            )
        names = tuple(self.classnames[number] for number in kept)
        return replace(self, classnames=names, samples=self.samples.chosen(kept), expected_images=None)


def find_sets(folder: Path, split: str = "test") -> list[EvaluationSet]:
    """Finds the set in a folder, or all sets below it; see :func:`arf_plugin.evaluation.folders.survey`.

    Raises:
        EvaluationError: if there is none, or it cannot be told what is one.
    """
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}. Expected a set, or a folder of sets.")
    name = folder.name if folder.name not in ("", "..") else folder.resolve().name
    roots, left_out = survey(folder, split)
    if roots:
        for problem in left_out:
            warn(problem)
        names = [utf8(str(root.relative_to(folder)) if root != folder else name) for root in roots]
        return [open_webdataset(root, called, split) for root, called in zip(roots, names, strict=True)]
    if classes := _classes(folder):
        return [_of_classes(folder, classes, utf8(name), split)]
    hints = "".join(f" {problem[0].upper()}{problem[1:]}" for problem in left_out)
    raise EvaluationError(
        f"There is no evaluation set in or below {folder}. {LAYOUT.replace('test/', f'{split}/')}; or one folder "
        f"of images per class.{hints}"
    )


def open_webdataset(root: Path, name: str, split: str = "test") -> EvaluationSet:
    """Opens a set in CLIP_benchmark's WebDataset layout; an EvaluationError names what is missing or malformed."""
    shards = _shards(root / split)
    templates = read_lines(root / TEMPLATES)
    for template in templates:
        _check_template(template, str(root / TEMPLATES))
    names = read_lines(root / CLASSNAMES)
    warn_of_repeated(names, root / CLASSNAMES)
    samples = tar_samples(shards, len(names))
    return EvaluationSet(name, tuple(names), tuple(templates), samples, split, place=str(root))


def open_folders(root: Path, name: str, split: str = "test") -> EvaluationSet:
    """Opens a set of one folder of images per class, numbered in the order of their names.

    Raises:
        EvaluationError: if there are no such folders, something in them is not understood (see
            :mod:`arf_plugin.evaluation.folders`), or classnames.txt names other classes.
    """
    classes = _classes(root)
    if not classes:
        raise EvaluationError(f"{root} has no folders of images, expected one for each class.")
    return _of_classes(root, classes, name, split)


def open_list(path: Path, name: str, split: str = "test") -> EvaluationSet:
    """Opens a set by a list with lines of `path class-number`, paths being relative to the list's folder.

    Classes are called as the folders of their images are; every number from 0 on must occur.

    Raises:
        EvaluationError: for a malformed line, a missing image, or a path that leaves the folder.
    """
    files: list[tuple[str, int]] = []
    folders: dict[int, str] = {}
    named = os.path.lexists(path.parent / CLASSNAMES)
    for number, line in enumerate(read_lines(path, names=True), 1):
        where, _, cls = line.rpartition(" ")
        if not where or not (cls.isascii() and cls.isdecimal() and len(cls) < 10):
            raise EvaluationError(f"{path}, line {number}: {line[:80]!r}, expected `path class-number`.")
        if Path(where).is_absolute() or ".." in Path(where).parts:
            raise EvaluationError(f"{path}, line {number}: {where!r} leaves the folder {path.parent}.")
        files.append((where, int(cls)))
        called = folders.setdefault(int(cls), Path(where).parent.name)
        if called != Path(where).parent.name and not named:
            raise EvaluationError(
                f"{path}, line {number}: class {cls} is called {Path(where).parent.name!r} by its folder, and "
                f"{called!r} above. Expected one folder name per class, or a {CLASSNAMES} beside the list."
            )
    if sorted(folders) != list(range(len(folders))):
        missing = next(number for number in range(max(folders) + 1) if number not in folders)
        raise EvaluationError(
            f"{path} has no image of class {missing}, but some of class {max(folders)}: is it complete?"
        )
    ordered = [folders[number] for number in range(len(folders))]
    return _own_texts(path.parent, name, ordered, file_samples(path.parent, files), split, str(path))


def imagenet_templates() -> list[str]:
    """CLIP_benchmark's English templates of ImageNet; an ArfError if it is missing or damaged."""
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or found.origin is None:
        raise MissingDependencyError("clip-benchmark", "Evaluation", "evaluation")
    # The file and not the module: importing its data sets takes seconds.
    path = Path(found.origin).parent / "datasets" / "en_zeroshot_classification_templates.json"
    known = read_json(path, EvaluationError, advice="Install clip-benchmark again.")
    templates = known.get("imagenet1k")
    if not isinstance(templates, list) or not all(isinstance(each, str) for each in templates):
        raise EvaluationError(f"{path} has no list of templates of imagenet1k. Install clip-benchmark again.")
    return templates


def read_lines(path: Path, *, names: bool = False) -> list[str]:
    """Lines of a text file, stripped, without blank ones at the end.

    Args:
        path: the file.
        names: keeps bytes that are no UTF-8, as names of files may have them.

    Raises:
        EvaluationError: if it is missing, empty or no UTF-8, or a line between others is blank.
    """
    require_regular(path, EvaluationError)
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise EvaluationError(f"{path} cannot be read: {cause.strerror or cause}. {LAYOUT}.") from cause
    text = decode_text(data, str(path), EvaluationError, names=names)
    # A mark within the text is that of a file that was appended to another.
    lines = [line.strip().strip("\ufeff").strip() for line in split_lines(text)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise EvaluationError(f"{path} is empty. {LAYOUT}.")
    if "" in lines:
        raise EvaluationError(f"{path}, line {lines.index('') + 1} is blank. Remove it: lines are counted.")
    return lines


def warn_of_repeated(names: Sequence[str], where: object) -> None:
    """Says so if two classes have one name."""
    if problem := repeated_names(names):
        warn(f"{where}: {problem}")


def _classes(root: Path) -> list[ClassFolder]:
    return read_classes(root, named=os.path.lexists(root / CLASSNAMES))


def _of_classes(root: Path, classes: Sequence[ClassFolder], name: str, split: str) -> EvaluationSet:
    files = [(path, number) for number, one in enumerate(classes) for path in one.images]
    return _own_texts(root, name, [one.name for one in classes], file_samples(root, files), split)


def _shards(folder: Path) -> list[Path]:
    """The tars that nshards.txt counts, which are all that there are."""
    listed = folder / NSHARDS
    count = " ".join(read_lines(listed))
    if not (count.isascii() and count.isdecimal() and len(count) < 20 and int(count)):
        raise EvaluationError(f"{listed} says {count[:40]!r}, expected the number of tars.")
    there = {path.name for path in list_files(folder, ".tar")}
    missing = next((name for n in range(int(count)) if (name := f"{n}.tar") not in there), None)
    if missing:
        raise EvaluationError(
            f"{listed} says {int(count)}, but {missing} does not exist (found: "
            f"{shortened(sorted(there)) or 'no tar'}). Copy the set again."
        )
    wanted = [f"{n}.tar" for n in range(int(count))]
    if extra := sorted(there.difference(wanted)):
        raise EvaluationError(
            f"{listed} says {int(count)}, which leaves out {shortened(extra)}. Expected as many as there are tars, "
            "named 0.tar, 1.tar and so on; correct the number, or remove the others."
        )
    return [folder / name for name in wanted]


def _own_texts(
    root: Path, name: str, folders: list[str], samples: StoredSamples, split: str, place: str = ""
) -> EvaluationSet:
    """A set of files with the texts beside them, where there are any."""
    if os.path.lexists(root / CLASSNAMES):
        names = read_lines(root / CLASSNAMES)
        if len(names) != len(folders):
            raise EvaluationError(
                f"{root / CLASSNAMES} names {len(names)} classes, but there are images of {len(folders)}: "
                f"{', '.join(folders[:3])} ... Correct the list, or remove it to use these names."
            )
        _compare_names(root / CLASSNAMES, names, folders)
    else:
        names = [folder.replace("_", " ") for folder in folders]
        for called, folder in zip(names, folders, strict=True):
            if utf8(folder) != folder or not called.strip():
                raise EvaluationError(
                    f"{place or root} has the class folder '{utf8(folder)}', whose name is no text of UTF-8. Rename "
                    f"it, or list the names of all classes in {root / CLASSNAMES}."
                )
    warn_of_repeated(names, root / CLASSNAMES if os.path.lexists(root / CLASSNAMES) else place or root)
    own = os.path.lexists(root / TEMPLATES)
    templates = read_lines(root / TEMPLATES) if own else imagenet_templates()
    return EvaluationSet(name, tuple(names), tuple(templates), samples, split, place=utf8(place or str(root)))


def _compare_names(path: Path, names: list[str], folders: list[str]) -> None:
    """Refuses names that are those of folders, in another order; other names cannot be compared."""
    places = {_plain(folder): number for number, folder in enumerate(folders)}
    wrong = [
        (number, places[_plain(name)])
        for number, name in enumerate(names)
        if len(places) == len(folders) and places.get(_plain(name), number) != number
    ]
    if len(wrong) > 1:
        number, there = wrong[0]
        raise EvaluationError(
            f"{path}, line {number + 1} is {names[number]!r}, but class {number} is the folder {folders[number]!r}; "
            f"{folders[there]!r} is class {there}. Put the lines in the order of the sorted folder names."
        )
    if wrong:
        number, there = wrong[0]
        warn(
            f"{path}, line {number + 1} calls the folder {folders[number]!r} {names[number]!r}, as the folder "
            f"{folders[there]!r} is called. Are the lines in the order of the folders' names?"
        )
    if all(folder.isdecimal() for folder in folders) and folders != sorted(folders, key=int):
        number = next(n for n, folder in enumerate(sorted(folders, key=int)) if folder != folders[n])
        warn(
            f"the folders of {path.parent} are numbers, which count in the order of text as in torchvision's "
            f"ImageFolder: line {number + 1} of {path.name}, {names[number]!r}, is the folder {folders[number]!r}."
        )


def _plain(name: str) -> str:
    return " ".join(
        unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ").split()
    )


def _check_template(template: str, where: str) -> None:
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as cause:
        raise EvaluationError(f"{where}: {template!r} is no template: {cause}.") from None
    if not fields:
        raise EvaluationError(f"{where}: {template!r} has no {{c}} for the class name.")
    if any(field != ("c", "", None) for field in fields):
        raise EvaluationError(f"{where}: {template!r} has another field than {{c}}, the class name.")
