"""Thumbnails: others' images, decoded, made small and encoded anew, so that no byte of their files is passed on."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass

from arf_plugin.anchors.images import decode_image

MOST_PIXELS = 1 << 26  # of an image that is decoded for the page: 200 MB of memory
LARGEST = 96  # pixels of the longer side


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
