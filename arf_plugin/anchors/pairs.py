"""Pair anchors as they are stored: tars of an anchor set, and the image and text of each pair in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from arf_plugin.anchors.images import IMAGE_EXTENSIONS
from arf_plugin.anchors.tars import scan_samples
from arf_plugin.errors import AnchorSetError
from arf_plugin.files import list_files_of


class RawPair(NamedTuple):
    """A pair as it is stored; nothing else in the tar is read."""

    url: str
    key: str
    image: bytes
    text: bytes


def list_pair_shards(anchors: str) -> list[str]:
    """URLs of the pair shards of an anchor set, sorted; empty if it has none."""
    fs, names = list_files_of(anchors, "pairs", ".tar")
    return [fs.unstrip_protocol(name) for name in names]


def read_pairs(url: str) -> Iterator[RawPair]:
    """Pairs of a tar, in its order; samples without an image or a text are passed over.

    Raises:
        AnchorSetError: The tar cannot be read.
    """
    for sample in scan_samples(url, AnchorSetError, read=(*IMAGE_EXTENSIONS, "txt")):
        image, text = sample.image, sample.members.get("txt")
        if image is not None and text is not None:
            yield RawPair(url, sample.key, image.data or b"", text.data or b"")
