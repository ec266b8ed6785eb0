"""Thumbnails: others' images, decoded, made small and encoded anew, so that no byte of their files is passed on."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from arf_plugin.anchors.images import decode_image

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
        image = decode_image(data)
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
