"""Walks over the headers of a tar, quickly: a million samples are looked at before training starts.

Plain headers, which are nearly all, are parsed here in a few microseconds; every other kind (long names, pax records,
large sizes, sparse files) is left to :mod:`tarfile`, so that both agree on what a tar holds. Names are bytes: those
that are no UTF-8 are kept as ``os.fsdecode`` keeps them, under every locale.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

ENCODING = "utf-8"  # of names, whatever the locale says
LARGEST_EXTENSION = 1 << 24  # bytes of the long names, pax records and maps of holes of one member

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_OF_ALL_MEMBERS = {"path", "size", "GNU.sparse.name", "GNU.sparse.size", "GNU.sparse.realsize"}


class Header(NamedTuple):
    """One member.

    Attributes:
        name: its name.
        type: tar type.
        offset: first byte of its data; -1 if it cannot be read there (a file with holes, a tar that is a stream).
        size: number of data bytes.
    """

    name: str
    type: bytes
    offset: int
    size: int


class StrictInfo(tarfile.TarInfo):
    """A header that is damaged or cut off is an error; tarfile would take it for the end and say nothing.

    Nor may a header ask for more memory than its member's name and records can need.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:  # noqa: D102
        try:
            info = super().fromtarfile(tar)
        except tarfile.HeaderError as cause:
            if type(cause).__name__ in ("EOFHeaderError", "EmptyHeaderError"):
                raise  # the regular ends: a block of zeros, or no block at all
            raise tarfile.ReadError(f"damaged header at byte {tar.offset}: {cause}") from cause
        if info.size < 0:
            raise tarfile.ReadError(f"{info.name!r} has the negative size {info.size}")
        return info

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        parent: Any = super()
        file: Any = tar.fileobj
        if isinstance(file, _Bounded):  # the member that an extended header belongs to
            return parent._proc_member(tar)
        bounded: Any = _Bounded(file)
        tar.fileobj = bounded
        try:
            return parent._proc_member(tar)
        finally:
            tar.fileobj = file


class _Bounded:
    """A tar's file while one member's headers are read."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = LARGEST_EXTENSION

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int) -> bytes:
        """Reads as the file does, up to the bound."""
        if not 0 <= size <= self._left:
            raise tarfile.ReadError(
                f"a header with {size} bytes of names and records, more than the {self._left} that are read"
            )
        self._left -= size
        data: bytes = self._file.read(size)
        return data


class SeekableTar:
    """The members of an uncompressed tar that can be read at any offset: iterates over their headers, in order.

    Raises:
        tarfile.TarError: while it is iterated over, if it is empty, cut off, or has a damaged header.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._tar: Any = None
        self._info: Any = None  # of a file with holes, which tarfile must put together
        self._plain_suffices = True  # until a global header changes the members that follow

    def __iter__(self) -> Iterator[Header]:
        file = self._file
        end = file.seek(0, io.SEEK_END)
        if end == 0:
            raise tarfile.ReadError("empty file")
        offset = 0
        while offset < end:
            file.seek(offset)
            block = file.read(_BLOCK)
            if block == _ZEROS:
                return
            header = _plain(block, offset) if self._plain_suffices else None
            if header is None:
                header, data_end, following = self._by_tarfile(offset)
            else:
                data_end = header.offset + header.size
                following = header.offset + -(-header.size // _BLOCK) * _BLOCK
            if data_end > end:
                raise tarfile.ReadError(f"unexpected end of data in {header.name!r}")
            yield header
            offset = following

    def load(self, header: Header) -> bytes:
        """Reads the data of the header that came last."""
        if header.offset < 0:
            return _extract(self._tar, self._info)
        self._file.seek(header.offset)
        data = self._file.read(header.size)
        if len(data) != header.size:
            raise tarfile.ReadError(f"unexpected end of data in {header.name!r}")
        return data

    def _by_tarfile(self, offset: int) -> tuple[Header, int, int]:
        """Lets tarfile read the header at an offset.

        Returns:
            The header, and the offsets of the end of its data and of the next header.
        """
        self._file.seek(offset)
        with _one_error(offset):
            if self._tar is None:
                self._tar = _open_tar(self._file, "r:")
            else:
                self._tar.offset = offset
            info = self._tar.next()
            self._tar.members.clear()  # tarfile would keep every header
            if info is None:
                raise tarfile.ReadError(f"damaged header at byte {offset}")
            following = self._tar.offset
            if following <= offset:
                raise tarfile.ReadError(f"the header at byte {offset} leads back to byte {following}")
            self._plain_suffices = _OF_ALL_MEMBERS.isdisjoint(self._tar.pax_headers)
            self._info, sparse = info, info.issparse()
            stored = info.size if following > info.offset_data else 0  # links have a size and no data
            data_end = info.offset_data + (_stored_size(info) if sparse else stored)
            return (
                Header(info.name, info.type, -1 if sparse else info.offset_data, info.size),
                data_end,
                following,
            )


class StreamedTar:
    """As :class:`SeekableTar`, for what can be read only once: compressed tars and pipes. All offsets are -1."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._tar: Any = None
        self._info: Any = None

    def __iter__(self) -> Iterator[Header]:
        with _one_error(0):
            self._tar = tar = _open_tar(self._file, "r|*")
        with tar:
            while True:
                with _one_error(tar.offset):
                    self._info = info = tar.next()
                    tar.members.clear()
                    if info is None:
                        return
                    if info.issparse():
                        _stored_size(info)
                yield Header(info.name, info.type, -1, info.size)
                with _one_error(tar.offset):
                    _skip(tar.fileobj, tar.offset)

    def load(self, header: Header) -> bytes:
        """Reads the data of the header that came last."""
        return _extract(self._tar, self._info)


def _open_tar(file: IO[bytes], mode: Any) -> Any:
    return tarfile.open(
        fileobj=file, mode=mode, tarinfo=StrictInfo, encoding=ENCODING, errors="surrogateescape"
    )


def _skip(stream: Any, offset: int) -> None:
    """Reads a stream up to an offset. Where a size is made up, tarfile would go on reading beyond the stream's end."""
    while stream.tell() < offset:
        if not stream.read(min(1 << 20, offset - stream.tell())):
            raise tarfile.ReadError("unexpected end of data")


def _plain(block: bytes, offset: int) -> Header | None:
    """Parses a header of a regular file with a short name; None for all others, and for damaged ones."""
    if len(block) != _BLOCK or block[156] not in b"0\0" or block[345] or not block[0]:
        return None
    try:
        checksum = int(block[148:156].rstrip(b" \0"), 8)
        size = int(block[124:136].rstrip(b" \0"), 8)
        int(block[136:148].rstrip(b" \0"), 8)  # the time
    except ValueError:  # base-256 numbers
        return None
    # The sum of all bytes, the checksum's own field taken as spaces; adler32 is a fast way to a sum.
    total = zlib.adler32(b"%b        %b" % (block[:148], block[156:])) & 0xFFFF
    if total != 1 + checksum or size < 0 or not _are_numbers(block[100:124], block[329:345]):
        return None
    name = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return None if name.endswith("/") else Header(name, tarfile.REGTYPE, offset + _BLOCK, size)


@functools.lru_cache(maxsize=1024)
def _are_numbers(owner: bytes, device: bytes) -> bool:
    """Whether tarfile can read the fields of mode, user and group, and of a device: else it ends the tar there."""
    try:
        for fields in (owner, device):
            for start in range(0, len(fields), 8):
                int(fields[start : start + 8].split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return False
    return True


def _stored_size(info: Any) -> int:
    """Bytes that a file with holes takes in the tar.

    Raises:
        tarfile.ReadError: its parts overlap or lie beyond its end, which would keep tarfile at it for ever.
    """
    stored = last = 0
    for start, size in info.sparse:
        # GNU's form fills its table up with parts of no bytes.
        if start < (last if size else 0) or size < 0 or start + size > info.size:
            raise tarfile.ReadError(f"{info.name!r} is a file with holes whose parts do not fit together")
        if size:
            stored, last = stored + size, start + size
    return stored


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    with _one_error(info.offset):
        member = tar.extractfile(info)
        data = member.read() if member is not None else b""
    if len(data) != info.size:
        raise tarfile.ReadError(f"unexpected end of data in {info.name!r}")
    return data


@contextlib.contextmanager
def _one_error(offset: int) -> Iterator[None]:
    """Turns what tarfile raises over hostile headers (IndexError, RecursionError, ...) into its own error."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError):
        raise
    except Exception as cause:
        reason = "too many headers of one member" if isinstance(cause, RecursionError) else cause
        raise tarfile.ReadError(f"damaged header at byte {offset}: {reason}") from cause
