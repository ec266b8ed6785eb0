"""Walks over the headers of a tar, quickly: a million samples are looked at before training starts.

Plain headers, which are nearly all, are parsed here in a few microseconds; every other kind (long names, pax records,
large sizes) is left to :mod:`tarfile`, so that both agree on what a tar holds.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_ADLER_BASE = 65521


class Header(NamedTuple):
    """One member: name, tar type, first byte of its data, and number of data bytes."""

    name: str
    type: bytes
    offset: int
    size: int


class StrictInfo(tarfile.TarInfo):
    """A header that is damaged or cut off is an error; tarfile would take it for the end and say nothing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:  # noqa: D102
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as cause:
            if type(cause).__name__ in ("EOFHeaderError", "EmptyHeaderError"):
                raise  # the regular ends: a block of zeros, or no block at all
            raise tarfile.ReadError(f"damaged header at byte {tar.offset}: {cause}") from cause


def walk_headers(file: IO[bytes]) -> Iterator[Header]:
    """Yields the headers of an uncompressed tar that can be read at any offset.

    Raises:
        tarfile.TarError: if it is empty, cut off, or has a damaged header.
    """
    end = file.seek(0, io.SEEK_END)
    if end == 0:
        raise tarfile.ReadError("empty file")
    offset = 0
    while offset < end:
        file.seek(offset)
        block = file.read(_BLOCK)
        if block == _ZEROS:
            return
        header = _plain(block, offset)
        if header is None:
            header, following = _by_tarfile(file, offset)
        else:
            following = header.offset + -(-header.size // _BLOCK) * _BLOCK
        if header.offset + header.size > end:
            raise tarfile.ReadError(f"unexpected end of data in {header.name!r}")
        yield header
        offset = following


def _plain(block: bytes, offset: int) -> Header | None:
    """Parses a header of a regular file with a short name; None for all others, and for damaged ones."""
    if len(block) != _BLOCK or block[156] not in b"0\0" or block[345] or not block[0]:
        return None
    try:
        checksum = int(block[148:155].strip(b" \0"), 8)
        size = int(block[124:136].rstrip(b" \0"), 8)
        name = block[:100].split(b"\0", 1)[0].decode("utf-8")
    except ValueError:  # base-256 numbers, other encodings
        return None
    # The sum of all bytes, the checksum's own field taken as spaces; adler32 is a fast way to a sum.
    total = zlib.adler32(b"%b        %b" % (block[:148], block[156:])) & 0xFFFF
    if total != (1 + checksum) % _ADLER_BASE or name.endswith("/"):
        return None
    return Header(name, tarfile.REGTYPE, offset + _BLOCK, size)


def _by_tarfile(file: IO[bytes], offset: int) -> tuple[Header, int]:
    """Lets tarfile read the member at an offset; returns it and the offset of the next one."""
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictInfo) as tar:
        info = tar.next()
        if info is None:
            raise tarfile.ReadError(f"damaged header at byte {offset}")
        return Header(info.name, info.type, info.offset_data, info.size), tar.offset
