"""Reads a few images among many, out of tars and CSV task data, and makes thumbnails of them.

Others' images are decoded, made small and encoded anew, so that no byte of their files is passed on.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from arf_plugin.anchors.ids import sample_id, shard_name
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, decode_image
from arf_plugin.anchors.tars import Member, local_path, scan_samples
from arf_plugin.anchors.task import expand_urls, is_csv
from arf_plugin.errors import ArfError, TaskDataError

LARGEST_IMAGE = 1 << 30  # bytes of a file
MOST_PIXELS = 1 << 26  # of an image that is decoded for the page: 200 MB of memory
LARGEST = 96  # pixels of the longer side


@dataclass(frozen=True)
class Place:
    """Where an image is: a tar and one of its members."""

    url: str
    member: Member


def read_task(
    data: str, ids: Collection[str], csv: tuple[str, str], dataset_type: str
) -> tuple[dict[str, bytes], dict[str, int]]:
    """Reads images and class numbers of a few samples of task data, by id; those that are not found are left out.

    `csv` is the column of the image paths, and the separator.

    Raises:
        TaskDataError: the data are damaged.
    """
    return _read_csv(data, ids, *csv) if is_csv(data, dataset_type) else _read_tars(data, ids)


def _read_tars(data: str, ids: Collection[str]) -> tuple[dict[str, bytes], dict[str, int]]:
    images: dict[str, bytes] = {}
    classes: dict[str, int] = {}
    wanted, shards = set(ids), {identity.split("/", 1)[0] for identity in ids}
    for url in (url for url in expand_urls(data) if shard_name(url) in shards):
        for sample in scan_samples(url, TaskDataError, read=("cls",)):
            identity = sample_id(url, sample.key)
            if identity not in wanted or sample.image is None:
                continue
            if (image := read_image(Place(url, sample.image), TaskDataError)) is not None:
                images[identity] = image
            number = (sample.members["cls"].data or b"").strip() if "cls" in sample.members else b""
            if number.isdigit() and len(number) < 10:
                classes[identity] = int(number)
    return images, classes


def _read_csv(
    data: str, ids: Collection[str], column: str, separator: str
) -> tuple[dict[str, bytes], dict[str, int]]:
    import pandas as pd

    from arf_plugin.anchors.task import read_csv_ids

    known = set(read_csv_ids(data, column, separator))
    images = {i: image for i in ids if i in known and (image := _read(Path(i))) is not None}
    try:
        frame = pd.read_csv(data, sep=separator)
    except (ValueError, OSError) as cause:  # pandas' own errors are ValueErrors
        raise TaskDataError(f"{data} is no readable CSV: {cause}.") from cause
    classes = {}
    if "cls" in frame.columns:
        rows = frame[frame[column].isin(list(ids))]
        numbers = zip(rows[column], rows["cls"].astype(str), strict=True)
        classes = {str(i): int(cls) for i, cls in numbers if cls.isdecimal() and len(cls) < 10}
    return images, classes


def _read(path: Path) -> bytes | None:
    """Bytes of an image file that a CSV names; None if it is missing, no file, or too large for an image."""
    try:
        small = path.is_file() and path.stat().st_size <= LARGEST_IMAGE
        return path.read_bytes() if small else None
    except (OSError, ValueError):
        return None


def read_image(place: Place, error: type[ArfError]) -> bytes | None:
    """Reads an image where the scan saw it; where a tar cannot be read in the middle, the tar is scanned again."""
    member = place.member
    if member.offset >= 0 and (path := local_path(place.url)).is_file():
        with path.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)
    for sample in scan_samples(place.url, error, read=IMAGE_EXTENSIONS):
        if sample.key == member.key and sample.image is not None:
            return sample.image.data
    return None


@dataclass(frozen=True)
class Thumbnail:
    """A small image as a data URI, or the reason why there is none."""

    uri: str | None
    width: int = 0
    height: int = 0
    problem: str | None = None


def thumbnail(data: bytes | None) -> Thumbnail:
    """Makes a thumbnail of an image file's bytes: PNG or JPEG, whichever is smaller."""
    if data is None:
        return Thumbnail(None, problem="not found")
    try:
        image = decode_image(_bounded(data))
    except ValueError as cause:
        return Thumbnail(None, problem=str(cause))
    image.thumbnail((LARGEST, LARGEST))
    files = []
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 84})):
        buffer = io.BytesIO()
        # A fresh image: without the pixels of the original come no comments, profiles or EXIF data.
        clean = image.copy()
        clean.info = {}
        clean.save(buffer, kind, **options)
        files.append((kind.lower(), buffer.getvalue()))
    kind, content = min(files, key=lambda file: len(file[1]))
    return Thumbnail(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *image.size)


def _bounded(data: bytes) -> bytes:
    """The image's bytes, unless they would come to more pixels than a page of thumbnails is worth.

    Raises:
        ValueError: with the reason as a clause.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:  # its head alone
                width, height = image.size
    except Exception:  # decoding says what is wrong with it
        return data
    if width * height > MOST_PIXELS:
        raise ValueError(f"has {width} x {height} pixels, too many to be shown")
    return data
