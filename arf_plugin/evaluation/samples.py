"""Labelled images that can be read one by one in any order: from tars, from files, from a builder of CLIP_benchmark.

Any order, because workers share the images of a set evenly, however few tars it has; CLIP_benchmark's own loader gives
whole tars to workers. Tars are indexed by their headers. They are read here and not by CLIP_benchmark's decoder, which
unpickles some members of a tar.

Sets are told apart by what is in their images, and every image that is read is compared with what was found when the
set was opened: a record's scores are of the data whose digest it has.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from arf_plugin.anchors.images import IMAGE_EXTENSIONS, decode_image
from arf_plugin.anchors.tars import Member, scan_samples
from arf_plugin.console import progress
from arf_plugin.errors import EvaluationError
from arf_plugin.files import digest, file_digest, known_stat, read_cache, write_cache
from arf_plugin.untrusted import require_regular

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")
_IN_TARS = ("webp", "png", "jpg", "jpeg")  # in the order in which CLIP_benchmark takes one of several
_NOT_READ = ("ppm", "bmp", "pgm", "tif", "tiff", "gif", "avif", "heic")  # images, but not in tars
_WORTH_CACHING = 1 << 24  # bytes of images; less is read again in no time
_WORTH_SHOWING = 1 << 28
# Nanoseconds: a file may change once more within the tick of the clock that it was read in.
_SETTLED = 2 * 10**9
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READERS, _READ_AHEAD = 8, 1024  # threads, and what is handed to them at a time


@dataclass(frozen=True, slots=True)
class Place:
    """An image: a whole file, or a part of a tar (`data` holds it if that is compressed); and its class."""

    file: str
    key: str
    cls: int
    offset: int = 0
    size: int = -1
    data: bytes | None = None

    def read(self) -> bytes:
        """The encoded image; an EvaluationError if it is gone."""
        if self.data is not None:
            return self.data
        try:
            with open(self.file, "rb") as file:  # noqa: PTH123 - a million Paths are slow
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as cause:
            raise EvaluationError(
                f"{self.file} was there and cannot be read any more: {cause.strerror or cause}. Copy the data set "
                "again."
            ) from cause


@dataclass(frozen=True)
class StoredSamples:
    """Samples of tars or of files: images with class numbers.

    Attributes:
        digest: SHA-256 over what tells one state of the data from another: contents, names and classes of the images.
        places: where the images are.
        contents: SHA-256 of each.
    """

    digest: str
    places: Sequence[Place]
    contents: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        place, data = self.places[index], self.places[index].read()
        where = f"{place.file}, sample {place.key}" if place.key else place.file
        if hashlib.sha256(data).digest() != self.contents[index]:
            raise EvaluationError(
                f"{where}: the image is not the one that was there when the set was opened. Do not write to a set that "
                "is being evaluated; start again."
            )
        try:
            return decode_image(data), place.cls
        except ValueError as cause:
            raise EvaluationError(
                f"{where}: the image {cause}. Replace it, or leave the sample out."
            ) from None

    def chosen(self, classes: Sequence[int]) -> StoredSamples:
        """The samples of some classes, which are numbered anew in the given order."""
        new = {old: number for number, old in enumerate(classes)}
        kept = [index for index, place in enumerate(self.places) if place.cls in new]
        places = [replace(self.places[index], cls=new[self.places[index].cls]) for index in kept]
        identity = digest([self.digest, list(classes)])
        return StoredSamples(identity, places, [self.contents[index] for index in kept])


def tar_samples(shards: Sequence[Path], classes: int) -> StoredSamples:
    """Samples of WebDataset tars: an image and a ``cls`` below `classes` each, in the tars' order.

    Raises:
        EvaluationError: for a tar that is missing, broken or hostile; a sample without image or class, or of a class
            that there is not.
    """
    for shard in shards:
        require_regular(shard, EvaluationError)
    before = [known_stat(shard) for shard in shards]
    places = [place for shard in shards for place in _index(shard, classes)]
    size = sum(place.size for place in places)
    contents = _digests(
        "tars", shards, len(places), size, lambda i: hashlib.sha256(places[i].read()).digest()
    )
    for shard, state in zip(shards, before, strict=True):
        if state != known_stat(shard):
            raise EvaluationError(f"{shard} is being written while it is read. Start again when it is whole.")
    told = [
        [Path(place.file).name, place.key, place.cls, content.hex()]
        for place, content in zip(places, contents, strict=True)
    ]
    return StoredSamples(digest(["contents", *told, *(shard.name for shard in shards)]), places, contents)


def file_samples(root: Path, files: Sequence[tuple[str, int]]) -> StoredSamples:
    """Images in files below a folder: their paths relative to `root`, and class numbers.

    Raises:
        EvaluationError: one is missing, unreadable or no file.
    """
    contents = _digests_of_files([root / path for path, _ in files])
    told = [[*file, content.hex()] for file, content in zip(files, contents, strict=True)]
    places = [Place(str(root / path), "", cls) for path, cls in files]
    return StoredSamples(digest(["contents", *told]), places, contents)


class BuilderSamples:
    """Samples of a data set that a builder of CLIP_benchmark made without a transform, from a folder `root`."""

    def __init__(self, dataset: Any, name: str, classes: int, root: Path, split: str) -> None:
        self.dataset, self.name, self.classes = dataset, name, classes
        listed = list(_first_of(dataset, ("samples", "_samples", "_image_files", "_images", "fnames")))
        names = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in listed]
        if names and all(isinstance(each, (str, Path)) and Path(each).is_file() for each in names):
            paths = [Path(each) for each in names]
        else:  # images within files of other kinds
            paths, listed = _files_below(root), []
        if listed and isinstance(listed[0], (tuple, list)):
            labels = [int(entry[1]) for entry in listed]
        else:
            labels = [int(each) for each in _first_of(dataset, ("_labels", "targets", "labels", "y"))]
        contents = [content.hex() for content in _digests_of_files(paths)]
        # With the split, as some builders read the same files for each of them.
        told = ["contents", name, split, len(dataset), labels]
        self.digest = digest([*told, [[*path.parts[-2:]] for path in paths], contents])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        try:
            image, cls = self.dataset[index]
        except Exception as cause:  # PIL and the data sets raise many kinds
            raise EvaluationError(
                f"Image {index} of {self.name} cannot be read: {cause}. Copy the data set again."
            ) from cause
        if not 0 <= int(cls) < self.classes:
            raise EvaluationError(
                f"Image {index} of {self.name} is of class {cls}, expected 0 to {self.classes - 1}."
            )
        return image, int(cls)


Samples: TypeAlias = StoredSamples | BuilderSamples


def _first_of(dataset: Any, names: Iterable[str]) -> Iterable[Any]:
    """The first attribute that a data set of torchvision's has of some."""
    return next((getattr(dataset, name) for name in names if hasattr(dataset, name)), ())


def _files_below(root: Path) -> list[Path]:
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if not name.startswith(".") and Path(folder, name).is_file()
    )


def _index(shard: Path, classes: int) -> Iterator[Place]:
    samples = list(_samples_of(shard, ("cls",)))
    if any(image.offset < 0 for _, image, _ in samples):
        samples = list(_samples_of(shard, (*IMAGE_EXTENSIONS, "cls")))
    for key, image, label in samples:
        text = (label.data or b"").decode("ascii", "replace").strip()
        if not (text.isdecimal() and text.isascii() and len(text) < 20 and int(text) < classes):
            raise EvaluationError(
                f"{shard}, sample {key}: cls is {text[:20]!r}, expected a number from 0 to {classes - 1} "
                f"(classnames.txt counts {classes} classes)."
            )
        data = image.data if image.offset < 0 else None
        yield Place(str(shard), key, int(text), image.offset, image.size, data)


def _samples_of(shard: Path, read: Sequence[str]) -> Iterator[tuple[str, Member, Member]]:
    """Key, image and class of every sample; neighbours that have neither, such as a README, are none."""
    for sample in scan_samples(str(shard), EvaluationError, read=read):
        image = next((sample.members[ext] for ext in _IN_TARS if ext in sample.members), None)
        cls = sample.members.get("cls")
        if image is not None and cls is not None:
            yield sample.key, image, cls
        elif image is not None or cls is not None or not sample.members.keys().isdisjoint(_NOT_READ):
            raise EvaluationError(
                f"{shard}, sample {sample.key}: found {sorted(sample.members)}, expected an image and a cls."
            )


def _digests_of_files(paths: Sequence[Path]) -> list[bytes]:
    """SHA-256 of each; an EvaluationError for one that is missing, unreadable or no file."""

    def size(path: Path) -> int:
        require_regular(path, EvaluationError)
        return path.stat().st_size

    def of(path: Path, read: Callable[[Path], T]) -> T:
        try:
            return read(path)
        except (OSError, ValueError) as cause:  # ValueError: a name that no file can have
            reason = getattr(cause, "strerror", None) or cause
            raise EvaluationError(f"{path} cannot be read: {reason}. Is the copy complete?") from cause

    total = sum(of(path, size) for path in paths)
    return _digests("files", paths, len(paths), total, lambda i: bytes.fromhex(of(paths[i], file_digest)))


def _digests(
    kind: str, files: Sequence[Path], count: int, size: int, one: Callable[[int], bytes]
) -> list[bytes]:
    """Digests of `count` images in files, by `one`, found in the cache while no file is touched; `size` is in bytes."""
    states = [known_stat(path) for path in files]
    key = digest(["evaluation-1", kind, count, [str(path.absolute()) for path in files], states])
    if size >= _WORTH_CACHING:
        known = read_cache("evaluation", key, list)
        if known is not None and len(known) == count and all(map(_SHA256.fullmatch, map(str, known))):
            return [bytes.fromhex(each) for each in known]
    started = time.time_ns()
    found: list[bytes] = []
    with (
        progress("images' digests", "images", count, quiet=size < _WORTH_SHOWING) as bar,
        ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers,
    ):
        for start in range(0, count, _READ_AHEAD):
            found += readers.map(one, range(start, min(start + _READ_AHEAD, count)))
            bar.update(len(found) - start)
    # Times of change are the second and third of a state.
    settled = all(state is not None and started - max(state[1:3]) > _SETTLED for state in states)
    if size >= _WORTH_CACHING and settled:
        write_cache("evaluation", key, [each.hex() for each in found])
    return found
