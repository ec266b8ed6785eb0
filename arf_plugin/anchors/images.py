"""Tells whole images from damaged ones: by their end markers where that suffices, else by decoding them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, TypeVar

from arf_plugin.console import progress
from arf_plugin.files import digest, read_cache, write_cache
from arf_plugin.images import map_ordered

if TYPE_CHECKING:
    import PIL.Image

# Those that open_clip trains on, in its order of preference.
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")

LARGEST_IMAGE = 1 << 29  # bytes of an encoded image that are read; photos have millions

_PEEK = 16
_AT_ONCE = 5000  # images whose look is cached together
_Item = TypeVar("_Item")


def image_problem(file: IO[bytes], start: int, size: int, decode: bool = False) -> str | None:
    """Says why the image in ``size`` bytes from ``start`` of a file is unreadable, or returns None.

    With ``decode`` it is decoded in full; otherwise only if its first and last bytes leave a doubt.
    """
    problem = size_problem(size)
    if problem is not None:
        return problem
    file.seek(start)
    head = file.read(min(_PEEK, size))
    file.seek(start + max(0, size - _PEEK))
    tail = file.read(min(_PEEK, size))
    if not decode and has_end_marker(head, tail, size):
        return None
    file.seek(start)
    try:
        decode_image(file.read(size))
    except ValueError as cause:
        return str(cause)
    return None


def size_problem(size: int) -> str | None:
    """Says that an encoded image is empty, or larger than what is read into memory; None if it is neither."""
    if size == 0:
        return "is empty (0 bytes)"
    if size > LARGEST_IMAGE:
        return f"has {size:,} bytes, more than the {LARGEST_IMAGE:,} that are read"
    return None


def has_end_marker(head: bytes, tail: bytes, size: int) -> bool:
    """True if the first and last bytes are those of a whole JPEG, PNG or WebP image of ``size`` bytes."""
    if head[:2] == b"\xff\xd8":
        return tail.endswith(b"\xff\xd9")
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return tail.endswith(b"IEND\xaeB`\x82")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return False


def decode_image(data: bytes) -> PIL.Image.Image:
    """Decodes an image in full, to RGB.

    Raises:
        ValueError: with the reason as a clause: "is not an image that PIL can read", "cannot be decoded (...)".
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd EXIF data; errors still come
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
    except Image.UnidentifiedImageError:
        raise ValueError("is not an image that PIL can read") from None
    except Exception as cause:  # PIL's decoders raise many kinds, struct.error and SyntaxError among them
        raise ValueError(f"cannot be decoded ({cause})") from cause


def look_once(
    items: Sequence[_Item],
    stamp: Callable[[_Item], Any],
    look: Callable[[_Item], Any],
    kind: str,
    workers: int,
    trust_cache: bool = True,
) -> Iterator[tuple[_Item, Any]]:
    """Looks at images in threads, or finds in the cache what was seen of them before.

    Args:
        items: the images.
        stamp: JSON that changes when an image does.
        look: gives JSON.
        kind: of looks, which is their folder in the cache.
        workers: threads.
        trust_cache: False looks whatever the cache says.

    Yields:
        Each item and what was seen, in order.
    """
    with progress("images", "images", len(items)) as bar:
        for start in range(0, len(items), _AT_ONCE):
            some = items[start : start + _AT_ONCE]
            key = digest([f"{kind}-2", [stamp(item) for item in some]])
            known = read_cache(kind, key, list) if trust_cache else None
            if known is None or len(known) != len(some):
                known = []
                for _, seen in map_ordered(look, some, workers):
                    if isinstance(seen, Exception):
                        raise seen
                    known.append(seen)
                    bar.update()
                write_cache(kind, key, known)
            else:
                bar.update(len(some))
            yield from zip(some, known, strict=True)
