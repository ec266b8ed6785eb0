"""Labelled images that can be read one by one in any order: from tars, from files, from a builder of CLIP_benchmark.

Any order, because workers share the images of a set evenly, however few tars it has; CLIP_benchmark's own loader gives
whole tars to workers. Tars are indexed by their headers. They are read here and not by CLIP_benchmark's decoder, which
unpickles some members of a tar.

Sets are told apart by what is in their images, and every image that is read is compared with what was found when the
set was opened: a row's figures are of the data whose digest it has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arf_plugin.anchors.files import digest
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, decode_image
from arf_plugin.anchors.tars import Member, Sample, scan_samples
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.contents import cached_digests, digests_of_files, state_of
from arf_plugin.untrusted import require_regular

if TYPE_CHECKING:
    import PIL.Image

_IN_TARS = ("webp", "png", "jpg", "jpeg")  # in the order in which CLIP_benchmark takes one of several


class Samples(Protocol):
    """Images with class numbers.

    Attributes:
        digest: SHA-256 over what tells one state of the data from another: contents, names and classes of the images.
    """

    digest: str

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        """Reads an image and its class number.

        Raises:
            EvaluationError: naming the place, if it cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an image is: `data` holds it where a tar cannot be read there (compressed)."""

    shard: int
    key: str
    offset: int
    size: int
    cls: int
    data: bytes | None


class TarSamples:
    """Samples of WebDataset tars: an image and a ``cls`` each, in the tars' order.

    Args:
        shards: the tars.
        classes: number of classes.

    Raises:
        EvaluationError: for a tar that is missing, broken or hostile; a sample without image or class, or of a class
            that there is not.
    """

    def __init__(self, shards: Sequence[Path], classes: int) -> None:
        self.shards = tuple(shards)
        for shard in self.shards:
            require_regular(shard, EvaluationError)
        before = [state_of(shard) for shard in self.shards]
        self._places: list[_Place] = []
        for number, shard in enumerate(self.shards):
            self._places += _index(number, shard, classes)
        self._contents = cached_digests(
            "tars", self.shards, len(self._places), sum(p.size for p in self._places), self._digest
        )
        for shard, found in zip(self.shards, before, strict=True):
            if found != state_of(shard):
                raise EvaluationError(
                    f"{shard} is being written while it is read. Start again when it is whole."
                )
        self.digest = digest(
            ["contents"]
            + [
                [self.shards[place.shard].name, place.key, place.cls, content.hex()]
                for place, content in zip(self._places, self._contents, strict=True)
            ]
            + [shard.name for shard in self.shards]
        )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        place = self._places[index]
        where = f"{self.shards[place.shard]}, sample {place.key}"
        return _decode(_unchanged(self._data(index), self._contents[index], where), where), place.cls

    def _data(self, index: int) -> bytes:
        place = self._places[index]
        if place.data is not None:
            return place.data
        return _read(self.shards[place.shard], place.offset, place.size)

    def _digest(self, index: int) -> bytes:
        return hashlib.sha256(self._data(index)).digest()


class FileSamples:
    """Images in files of their own.

    Args:
        root: folder that all paths are below.
        files: paths relative to `root`, and class numbers.
    """

    def __init__(self, root: Path, files: Iterable[tuple[str, int]]) -> None:
        self.root, self.files = root, list(files)
        self._contents = digests_of_files([root / path for path, _ in self.files])
        self.digest = digest(
            ["contents"]
            + [[*file, content.hex()] for file, content in zip(self.files, self._contents, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        path, cls = self.files[index]
        where = str(self.root / path)
        return _decode(_unchanged(_read(self.root / path), self._contents[index], where), where), cls


class BuilderSamples:
    """Samples of a data set that a builder of CLIP_benchmark made without a transform.

    Args:
        dataset: has `__len__` and `__getitem__`, which gives an image and a class number.
        name: the builder's name.
        classes: number of classes.
        root: the folder that it reads.
        split: part of the data.
    """

    def __init__(self, dataset: Any, name: str, classes: int, root: Path, split: str) -> None:
        self.dataset, self.name, self.classes = dataset, name, classes
        lists = ("samples", "_samples", "_image_files", "_images", "fnames")  # of torchvision's data sets
        listed: list[Any] = next(
            (list(getattr(dataset, each)) for each in lists if hasattr(dataset, each)), []
        )
        names = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in listed]
        if names and all(isinstance(each, (str, Path)) and Path(each).is_file() for each in names):
            paths = [Path(each) for each in names]
        else:  # images within files of other kinds
            paths, listed = _files_below(root), []
        # The split, as some builders read the same files for each of them.
        kept = ["contents", name, split, len(dataset), _labels(dataset, listed)]
        contents = [content.hex() for content in digests_of_files(paths)]
        self.digest = digest([*kept, [[*path.parts[-2:]] for path in paths], contents])

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


class Chosen:
    """Some classes of a set, numbered anew.

    Args:
        samples: the whole set.
        classes: numbers of the classes to keep, in their new order.
    """

    def __init__(self, samples: TarSamples | FileSamples, classes: Sequence[int]) -> None:
        self._samples, self._new = samples, {old: new for new, old in enumerate(classes)}
        numbers = (
            [place.cls for place in samples._places]
            if isinstance(samples, TarSamples)
            else [cls for _, cls in samples.files]
        )
        self._kept = [index for index, cls in enumerate(numbers) if cls in self._new]
        self.digest = digest([samples.digest, list(classes)])

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        image, cls = self._samples[self._kept[index]]
        return image, self._new[cls]


def _index(number: int, shard: Path, classes: int) -> Iterable[_Place]:
    samples = list(_samples_of(shard, ("cls",)))
    if any(image.offset < 0 for _, image, _ in samples):
        samples = list(_samples_of(shard, (*IMAGE_EXTENSIONS, "cls")))
    for key, image, label in samples:
        cls = _class_number(label, f"{shard}, sample {key}", classes)
        yield _Place(number, key, image.offset, image.size, cls, image.data if image.offset < 0 else None)


def _samples_of(shard: Path, read: Sequence[str]) -> Iterator[tuple[str, Member, Member]]:
    """Key, image and class of every sample; neighbours that have neither, such as a README, are none."""
    for sample in scan_samples(str(shard), EvaluationError, read=read):
        image, cls = _image_of(sample), sample.members.get("cls")
        if image is not None and cls is not None:
            yield sample.key, image, cls
        elif image is not None or cls is not None or _has_other_image(sample):
            raise EvaluationError(
                f"{shard}, sample {sample.key}: found {sorted(sample.members)}, expected an image and a cls."
            )


def _image_of(sample: Sample) -> Member | None:
    return next((sample.members[ext] for ext in _IN_TARS if ext in sample.members), None)


def _has_other_image(sample: Sample) -> bool:
    """Whether a member is an image by a suffix that is not read in tars."""
    return not sample.members.keys().isdisjoint(("ppm", "bmp", "pgm", "tif", "tiff", "gif", "avif", "heic"))


def _class_number(cls: Member, where: str, classes: int) -> int:
    text = (cls.data or b"").decode("ascii", "replace").strip()
    if not (text.isdecimal() and text.isascii() and len(text) < 20 and int(text) < classes):
        raise EvaluationError(
            f"{where}: cls is {text[:20]!r}, expected a number from 0 to {classes - 1} "
            f"(classnames.txt counts {classes} classes)."
        )
    return int(text)


def _read(path: Path, offset: int = 0, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as cause:
        raise EvaluationError(
            f"{path} was there and cannot be read any more: {cause.strerror or cause}. Copy the data set again."
        ) from cause


def _unchanged(data: bytes, content: bytes, where: str) -> bytes:
    if hashlib.sha256(data).digest() != content:
        raise EvaluationError(
            f"{where}: the image is not the one that was there when the set was opened. Do not write to a set that "
            "is being evaluated; start again."
        )
    return data


def _decode(data: bytes, where: str) -> PIL.Image.Image:
    try:
        return decode_image(data)
    except ValueError as cause:
        raise EvaluationError(f"{where}: the image {cause}. Replace it, or leave the sample out.") from None


def _labels(dataset: Any, listed: Sequence[Any]) -> list[int]:
    """Class numbers that a data set of torchvision's keeps apart from its images, or with them."""
    if listed and isinstance(listed[0], (tuple, list)):
        return [int(entry[1]) for entry in listed]
    lists = ("_labels", "targets", "labels", "y")
    found: Any = next((getattr(dataset, each) for each in lists if hasattr(dataset, each)), [])
    return [int(each) for each in found]


def _files_below(root: Path) -> list[Path]:
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if not name.startswith(".") and Path(folder, name).is_file()
    )
