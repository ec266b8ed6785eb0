"""Labelled images that can be read one by one in any order: from tars, from files, from a builder of CLIP_benchmark.

Any order, because workers share the images of a set evenly, however few tars it has; CLIP_benchmark's own loader gives
whole tars to workers. Tars are indexed by their headers. They are read here and not by CLIP_benchmark's decoder, which
unpickles some members of a tar.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arf_plugin.anchors.files import digest
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, decode_image
from arf_plugin.anchors.tars import Sample, scan_samples
from arf_plugin.errors import EvaluationError

if TYPE_CHECKING:
    import PIL.Image

FILE_EXTENSIONS = (*IMAGE_EXTENSIONS, "bmp", "gif", "ppm", "tif", "tiff")


class Samples(Protocol):
    """Images with class numbers.

    Attributes:
        digest: SHA-256 over what tells one state of the data from another: places, sizes and classes of the images.
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
        self._places: list[_Place] = []
        for number, shard in enumerate(self.shards):
            self._places += _index(number, shard, classes)
        self.digest = digest(
            [[self.shards[p.shard].name, p.key, p.size, p.cls] for p in self._places]
            + [shard.name for shard in self.shards]
        )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        place = self._places[index]
        shard = self.shards[place.shard]
        data = place.data
        if data is None:
            data = _read(shard, place.offset, place.size)
        return _decode(data, f"{shard}, sample {place.key}"), place.cls


class FileSamples:
    """Images in files of their own.

    Args:
        root: folder that all paths are below.
        files: paths relative to `root`, and class numbers.
    """

    def __init__(self, root: Path, files: Iterable[tuple[str, int]]) -> None:
        self.root, self.files = root, list(files)
        try:
            sizes = [(root / path).stat().st_size for path, _ in self.files]
        except OSError as cause:
            raise EvaluationError(
                f"{cause.filename} cannot be read: {cause.strerror}. Is the copy complete?"
            ) from cause
        self.digest = digest([[path, size, cls] for (path, cls), size in zip(self.files, sizes, strict=True)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        path, cls = self.files[index]
        return _decode(_read(self.root / path), str(self.root / path)), cls


class BuilderSamples:
    """Samples of a data set that a builder of CLIP_benchmark made without a transform.

    Args:
        dataset: has `__len__` and `__getitem__`, which gives an image and a class number.
        name: the builder's name.
        classes: number of classes.
    """

    def __init__(self, dataset: Any, name: str, classes: int) -> None:
        self.dataset, self.name, self.classes = dataset, name, classes
        lists = ("samples", "_samples", "_image_files", "_images", "fnames")  # of torchvision's data sets
        listed: list[Any] = next((getattr(dataset, each) for each in lists if hasattr(dataset, each)), [])
        self.digest = digest([name, len(dataset), *(_last_names(entry) for entry in listed)])

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
    samples = list(scan_samples(str(shard), EvaluationError, read=("cls",)))
    if any(sample.image is not None and sample.image.offset < 0 for sample in samples):
        samples = list(scan_samples(str(shard), EvaluationError, read=(*IMAGE_EXTENSIONS, "cls")))
    for sample in samples:
        image = sample.image
        cls = _class_number(sample, f"{shard}, sample {sample.key}", classes)
        assert image is not None  # tested by _class_number
        yield _Place(
            number, sample.key, image.offset, image.size, cls, image.data if image.offset < 0 else None
        )


def _class_number(sample: Sample, where: str, classes: int) -> int:
    cls = sample.members.get("cls")
    if sample.image is None or cls is None:
        raise EvaluationError(f"{where}: found {sorted(sample.members)}, expected an image and a cls.")
    text = (cls.data or b"").decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) >= classes:
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


def _decode(data: bytes, where: str) -> PIL.Image.Image:
    try:
        return decode_image(data)
    except ValueError as cause:
        raise EvaluationError(f"{where}: the image {cause}. Replace it, or leave the sample out.") from None


def _last_names(entry: Any) -> str:
    """A file's name and its folder's, without the machine's own part of the path."""
    path = Path(str(entry[0] if isinstance(entry, (tuple, list)) else entry))
    return "/".join(path.parts[-2:])
