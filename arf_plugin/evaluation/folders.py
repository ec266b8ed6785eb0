"""Folders of images by class, read as torchvision's ``ImageFolder`` reads them, or refused; and folders of sets.

Class numbers are positions in the sorted list of folders, so a folder that drops out, or one too many, shifts all that
follow. Hence every folder is a class, as for ``ImageFolder``: links are followed, images may lie deeper, and a class
without images is an error. What ``ImageFolder`` passes over in silence and what may be an image or a class all the same
is an error here: a link to nothing, a folder that cannot be listed, an image by another suffix.

Two things differ from it: GIF images are read too, and hidden folders without images (``.git``, ``.cache``) are no
classes; a warning names them.
"""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from arf_plugin.errors import EvaluationError
from arf_plugin.untrusted import printable

# torchvision.datasets.folder.IMG_EXTENSIONS, and GIF.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".7z", ".rar", ".gz", ".bz2", ".xz")
SPLITS = {  # names of folders, and the split that each means
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}

NSHARDS = "nshards.txt"

_APPLE_DOUBLE = b"\x00\x05\x16\x07"
# Images by their first bytes, whatever their names are.
_MAGIC = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*", b"8BPS"),
    *(b"\x00\x00\x00\x0cjP  ", b"\x00\x00\x00\x0cJXL ", b"\xff\x4f\xff\x51"),
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_NO_PICTURES = (".pdf", ".ps", ".eps", ".h5", ".hdf", ".mpg", ".mpeg", ".grib", ".bufr")  # known to PIL, too
_NUMBERED = re.compile(r"[0-9]+\.tar")
_MOST_REPEATED = 10_000  # folders that links lead to once more
_CAMERAS = (".heic", ".heif", ".jxl", ".svg", ".dng", ".nef", ".cr2", ".arw")  # unknown to PIL alone


@dataclass
class ClassFolder:
    """What lies in the folder of a class; paths are relative to the set, images in ``ImageFolder``'s order.

    Attributes:
        direct: whether some images lie in the folder itself.
        parts: folders in it that hold images, at any depth.
        unread: images that are not read, by their suffixes.
    """

    name: str
    images: list[str] = field(default_factory=list)
    direct: bool = False
    parts: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)


def is_image(name: str) -> bool:
    """Whether a file of this name is read."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def warn(text: str) -> None:
    """Says what does not end the command; the text may hold names of others."""
    warnings.warn(printable(text), stacklevel=3)


def shortened(names: Iterable[str], shown: int = 3) -> str:
    """The first of some names, and how many there are if they are more."""
    listed = list(names)
    more = f" ... ({len(listed)} in all)" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def read_classes(root: Path, named: bool = False) -> list[ClassFolder]:
    """Lists the class folders of a set, in the order of their numbers; empty if no folder has an image.

    Args:
        root: the set.
        named: whether something else says what the classes are, so that it need not be guessed whether the folders
            are classes, or sets or splits.

    Raises:
        EvaluationError: naming what is not understood.
    """
    names, files = listing(str(root))
    _refuse_dangling(str(root), files)
    found = [_read_class(root, name) for name in names]
    if unread := [path for one in found for path in one.unread]:
        raise EvaluationError(
            f"{root} has images that torchvision's ImageFolder passes over because of their names: "
            f"{shortened(unread)}. Convert or rename them to {', '.join(IMAGE_SUFFIXES)}, or remove them."
        )
    if not any(one.images for one in found):
        return []
    hidden = [one for one in found if one.name.startswith(".")]
    found = [one for one in found if one.images or one not in hidden]
    if empty := [one.name for one in found if not one.images]:
        raise EvaluationError(
            f"{root} has folders without images: {shortened(empty)}. Every folder is a class here, as in "
            "torchvision's ImageFolder; copy their images again, or remove the folders if they are none."
        )
    if filled := [one.name for one in hidden if one.images]:
        raise EvaluationError(
            f"{root} has hidden folders with images: {shortened(filled)}. torchvision's ImageFolder takes them for "
            "classes; remove them, or rename them if they are some."
        )
    if not named:
        _refuse_doubt(root, found)
    if hidden:
        names = [one.name for one in hidden]
        warn(f"hidden folders in {root} are no classes here, as they hold no images: {shortened(names)}.")
    if loose := [name for name in files if is_image(name)]:
        warn(f"{root} has images beside the folders of its classes, which are left out: {shortened(loose)}.")
    packed = [name for name in files if name.lower().endswith(ARCHIVES)]
    packed += [path for one in found for path in one.archives]
    if packed:
        warn(f"{root} has archives, which are not looked into: {shortened(packed)}. Are all unpacked?")
    first: dict[str, str] = {}
    for one in found:
        other = first.setdefault(unicodedata.normalize("NFKC", one.name).casefold(), one.name)
        if other != one.name:
            warn(
                f"{root} has the folders {other!a} and {one.name!a}, which differ by case or by how characters are "
                "encoded: they count as two classes."
            )
    return found


def listing(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders (and links to such) and of the other entries of a folder, sorted, or an EvaluationError."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    is_folder = False
                (folders if is_folder else files).append(entry.name)
    except OSError as cause:
        raise EvaluationError(
            f"{folder} cannot be listed: {cause.strerror}. Its images would be missing; make it readable or "
            "remove it."
        ) from cause
    return sorted(folders), sorted(files)


def place_of(folder: str) -> tuple[int, int]:
    """What is equal for two paths of one folder; an EvaluationError if it is gone."""
    try:
        found = Path(folder).stat()
    except OSError as cause:
        raise EvaluationError(f"{folder} cannot be read: {cause.strerror}.") from cause
    return found.st_dev, found.st_ino


def _read_class(root: Path, name: str) -> ClassFolder:
    found = ClassFolder(name)
    top = f"{str(root).rstrip(os.sep)}/{name}"
    for folder, files in sorted(_walk(top, place_of(str(root)))):
        relative = name + folder[len(top) :]
        part = relative.split("/", 2)[1:2]
        for file in files:
            path = f"{relative}/{file}"
            if is_image(file):
                if file.startswith("._") and _head(root / path).startswith(_APPLE_DOUBLE):
                    raise EvaluationError(
                        f"{root / path} is no image but what macOS copies beside one (AppleDouble). Remove such files: "
                        f"find {root} -name '._*' -delete"
                    )
                found.images.append(path)
                found.direct |= not part
                found.parts.update(part)
            elif not file.startswith("."):
                if file.lower().endswith(ARCHIVES):
                    found.archives.append(path)
                elif _is_other_image(Path(folder, file)):
                    found.unread.append(path)
    return found


def _walk(top: str, root: tuple[int, int]) -> Iterator[tuple[str, list[str]]]:
    """Yields folders, links followed, and the names of their files.

    A folder that is reached twice has images twice, and one above itself has them without end.
    """
    seen = {root: "the set itself"}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        place = place_of(folder)
        if place in seen:
            raise EvaluationError(
                f"{folder} leads to {seen[place]}, so images would be there twice or without end. Remove the link."
            )
        seen[place] = folder
        folders, files = listing(folder)
        _refuse_dangling(folder, files)
        yield folder, files
        waiting += [f"{folder}/{name}" for name in folders]


def _refuse_dangling(folder: str, files: Iterable[str]) -> None:
    for name in files:
        path = Path(folder, name)
        if not name.startswith(".") and path.is_symlink() and not path.exists():
            raise EvaluationError(
                f"{path} is a link to {printable(str(path.readlink()))}, which is not there: is it an image or a "
                "class? Repair the link, or remove it."
            )


def _refuse_doubt(root: Path, found: list[ClassFolder]) -> None:
    """Refuses folders that are sets or splits, by the looks of it, and would be read as classes."""
    names = {one.name for one in found}
    nested = [one for one in found if not one.direct]
    doubtful = [one for one in nested if one.name.lower() in SPLITS or one.parts & (names - {one.name})]
    if len(nested) == len(found):
        doubtful += [one for one in nested if len(one.parts) > 1]
    if all(one.name.lower() in SPLITS for one in found):
        doubtful = found
    if doubtful:
        inner = f"{doubtful[0].name}/{min(doubtful[0].parts)}" if doubtful[0].parts else doubtful[0].name
        raise EvaluationError(
            f"{root} has {inner}: is {doubtful[0].name} a class, or a split or a set with classes of its own? Name "
            "the folder whose folders are the classes; if these are, list their names in a classnames.txt beside them."
        )


def _is_other_image(path: Path) -> bool:
    """Whether a file is an image although its name is not one that is read."""
    suffix = path.suffix.lower()
    if suffix in _CAMERAS:
        return True
    head = _head(path)
    if not head:
        return False
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    if head.startswith(_MAGIC) or webp or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS):
        return True
    return suffix not in _NO_PICTURES and _opens(path, suffix)


def _opens(path: Path, suffix: str) -> bool:
    """Whether PIL knows the suffix, and the file by its header."""
    from PIL import Image

    if suffix not in Image.registered_extensions():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path):
                return True
    except Exception:  # of many kinds; then it is no image
        return False


def _head(path: Path) -> bytes:
    """The first bytes; none of a pipe."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError as cause:
        raise EvaluationError(f"{path} cannot be read: {cause.strerror}.") from cause


def survey(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """Looks through a folder and all below it for sets in CLIP_benchmark's WebDataset layout; links are followed.

    Returns:
        Those that have the split, sorted; and texts that say what looks like a set, or a part of one, and is not read.

    Raises:
        EvaluationError: a folder cannot be listed, links lead round and round, or there are class folders beside tars,
            in the folder itself or in one of the sets.
    """
    images: list[Path] = []
    counted: list[Path] = []
    uncounted: list[Path] = []
    for path, files in _folders(folder):
        if any(is_image(name) and not name.startswith("._") for name in files):
            images.append(path)
        if NSHARDS in files:
            counted.append(path)
        elif any(_NUMBERED.fullmatch(name) for name in files):
            uncounted.append(path)
    parts = Path(split).parts
    found = [path for path in counted if parts and path.relative_to(folder).parts[-len(parts) :] == parts]
    roots = sorted(path.parents[len(parts) - 1] for path in found)
    for place in dict.fromkeys((folder, *roots, *found)) if roots else ():
        classes = [path.name for path in images if path.parent == place and not path.name.startswith(".")]
        if len(classes) > 1:
            raise EvaluationError(
                f"{place} has folders of images ({shortened(classes)}), and a set in WebDataset layout is at "
                f"{roots[0] / split}. Expected one layout: move one of them elsewhere, or name the one that is meant."
            )
    problems = []
    if folder in counted and not roots:
        problems.append(f"{folder} has {NSHARDS} itself: name the folder above it.")
    if others := [p for p in counted if p not in found and p.parent not in roots and p != folder]:
        has = "has" if len(others) == 1 else "have"
        problems.append(
            f"{shortened(map(str, others))} {has} {NSHARDS}, but the split is '{split}': left out."
        )
    if uncounted:
        problems.append(f"{shortened(map(str, uncounted))}: tars without {NSHARDS} are left out.")
    if images and roots:
        problems.append(
            f"images in {shortened(map(str, images))} belong to no set in WebDataset layout and are left out; name a "
            "set of class folders by itself."
        )
    return roots, problems


def _folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields folders and the names of their files.

    A link to a folder above itself adds nothing; one to another place is another name for what is there.
    """
    start = place_of(str(folder))
    # Folders, and the places of each and those above it.
    waiting: deque[tuple[str, tuple[tuple[int, int], ...]]] = deque([(str(folder), (start,))])
    known, repeated = {start}, 0
    while waiting:
        path, above = waiting.popleft()
        folders, files = listing(path)
        yield Path(path), files
        for inner in (f"{path}/{name}" for name in folders):
            place = place_of(inner)
            if place in above:
                continue
            repeated += place in known
            if repeated > _MOST_REPEATED:
                raise EvaluationError(
                    f"{folder}: links lead to the same folders over and over, such as {inner}. Remove them."
                )
            known.add(place)
            waiting.append((inner, (*above, place)))
