"""Looks into WebDataset tars by their headers alone, and finds what would fail later.

Tars are untrusted input: names that leave the folder, links and devices are refused, and nothing is extracted
to disk. Names are split into key and extension as ``webdataset.tariterators.base_plus_ext`` does it, and what
webdataset skips is skipped here too, so that a scan lists exactly what training sees.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from arf_plugin.anchors.headers import Header, StrictInfo, walk_headers
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, image_problem
from arf_plugin.errors import ArfError, TaskDataError

_SPLIT = re.compile(r"^((?:.*/)?[^.]+)\.([^/]*)$")
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_REMOTE = re.compile(r"^(?!file:)[A-Za-z][A-Za-z0-9+.-]+:(//|:)")
_PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error)


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a tar.

    Attributes:
        name: full name in the tar.
        key: name without its extensions; members of a sample share it.
        ext: extensions in lower case, without the first dot (``jpg``, ``seg.png``).
        offset: first byte of the data in the tar; -1 if the tar cannot be read there (compressed, piped).
        size: data bytes.
        data: the bytes, if they were asked for.
        problem: why an image is unreadable; None if it looks whole or was not examined.
    """

    name: str
    key: str
    ext: str
    offset: int
    size: int
    data: bytes | None = None
    problem: str | None = None


@dataclass(slots=True)
class Sample:
    """Neighbouring members of one key, as open_clip's ``group_by_keys_nothrow`` forms them."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def image(self) -> Member | None:
        """The member that open_clip takes as the image."""
        return next((self.members[ext] for ext in IMAGE_EXTENSIONS if ext in self.members), None)


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a member's name into key and lower-case extension; None if it has no extension."""
    match = _SPLIT.match(name)
    return (match[1], match[2].lower()) if match else None


def is_remote(url: str) -> bool:
    """True for ``pipe:`` commands and for URLs of another scheme than ``file:``."""
    return url.startswith("pipe:") or bool(_REMOTE.match(url))


def local_path(url: str) -> Path:
    """Path of a local shard, given as a path or as a ``file:`` URL."""
    return Path(re.sub(r"^file:(//)?", "", url))


def open_shard(url: str, error: type[ArfError] = TaskDataError) -> IO[bytes]:
    """Opens a local path, an fsspec URL or a ``pipe:`` command for reading.

    Raises:
        error: if it is missing or cannot be opened.
    """
    try:
        if url.startswith("pipe:"):
            import webdataset

            return webdataset.gopen(url)
        if is_remote(url):
            import fsspec

            return fsspec.open(url, "rb").open()
        return local_path(url).open("rb")
    except FileNotFoundError:
        raise error(f"{url} does not exist. Expected a tar; check the path and its braces.") from None
    except (OSError, ImportError, ValueError) as cause:
        raise error(f"{url} cannot be opened: {cause}") from cause


def scan_tar(
    url: str,
    error: type[ArfError] = TaskDataError,
    *,
    read: Collection[str] = (),
    images: bool = False,
    decode: bool = False,
) -> Iterator[Member]:
    """Yields the regular members of a tar in order, reading little more than their headers.

    Args:
        url: local path, fsspec URL or ``pipe:`` command.
        error: what to raise, so that the message has the right family.
        read: extensions whose data is read as well.
        images: also tests images for truncation and sets ``problem``: by their first and last bytes, and by
            decoding those that leave a doubt.
        decode: decodes every image, with ``images``.

    Raises:
        error: if the tar is missing, empty, cut off or corrupt; for escaping names, links and devices.
    """
    last = "the start"
    try:
        with open_shard(url, error) as file:
            seekable = not url.startswith("pipe:") and file.seekable() and not _is_compressed(file)
            for header, load in _seekable(file) if seekable else _stream(file):
                last = f"member {header.name!r}"
                split = split_name(header.name)
                if not _accept(header, url, error) or split is None:
                    continue
                key, ext = split
                examine = images and ext in IMAGE_EXTENSIONS
                data = problem = None
                if ext in read or (examine and not seekable):
                    data = load()
                if examine and data is not None:
                    problem = image_problem(io.BytesIO(data), 0, header.size, decode)
                elif examine:
                    problem = image_problem(file, header.offset, header.size, decode)
                kept = data if ext in read else None
                yield Member(header.name, key, ext, header.offset, header.size, kept, problem)
    except _BROKEN as cause:
        raise error(
            f"{url} is cut off or corrupt after {last}: {cause}.\n"
            "Expected a whole tar; copy or download it again, or leave it out."
        ) from cause


def scan_samples(
    url: str,
    error: type[ArfError] = TaskDataError,
    *,
    read: Collection[str] = (),
    images: bool = False,
    decode: bool = False,
) -> Iterator[Sample]:
    """Yields the samples of a tar in order; see :func:`scan_tar` for arguments and errors.

    Neighbours of one key form a sample; a repeated extension starts the next one, as in open_clip.
    """
    sample: Sample | None = None
    for member in scan_tar(url, error, read=read, images=images, decode=decode):
        if sample is None or member.key != sample.key or member.ext in sample.members:
            if sample is not None:
                yield sample
            sample = Sample(member.key)
        sample.members[member.ext] = member
    if sample is not None:
        yield sample


def _seekable(file: IO[bytes]) -> Iterator[tuple[Header, Callable[[], bytes]]]:
    """Yields headers, each with a function that reads the data."""
    for header in walk_headers(file):

        def load(header: Header = header) -> bytes:
            file.seek(header.offset)
            return file.read(header.size)

        yield header, load


def _stream(file: IO[bytes]) -> Iterator[tuple[Header, Callable[[], bytes]]]:
    """As :func:`_seekable`, for what can be read only once; the offset is -1."""
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictInfo) as tar:
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header

            def load(info: tarfile.TarInfo = info) -> bytes:
                member = tar.extractfile(info)
                data = member.read() if member is not None else b""
                if len(data) != info.size:
                    raise tarfile.ReadError(f"unexpected end of data in {info.name!r}")
                return data

            yield Header(info.name, info.type, -1, info.size), load


def _accept(header: Header, url: str, error: type[ArfError]) -> bool:
    """True for members that webdataset reads; raises for those that no data set should have."""
    name = header.name
    if name.startswith(("/", "\\")) or (".." in name and ".." in name.replace("\\", "/").split("/")):
        raise error(
            f"{url} has a member whose name leaves the folder: {name!r}.\n"
            "Expected names below the tar's root; the tar is broken or hostile: leave it out or repack it."
        )
    if header.type == tarfile.DIRTYPE:
        return False
    if header.type not in _PLAIN_TYPES:
        raise error(
            f"{url} has a member that is not a regular file: {name!r} (tar type {header.type!r}).\n"
            "Expected files only, no links and no devices; pack it again (tar --dereference)."
        )
    return not _SKIPPED.match(name)


def _is_compressed(file: IO[bytes]) -> bool:
    magic = file.read(6)
    file.seek(0)
    return magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
