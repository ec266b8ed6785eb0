"""Looks into WebDataset tars by their headers alone, and finds what would fail later.

Tars are untrusted input: names that leave the folder, links and devices are refused, and nothing is extracted
to disk. Names are split into key and extension as ``webdataset.tariterators.base_plus_ext`` does it, and what
webdataset skips is skipped here too, so that a scan lists exactly what training sees. Names are bytes: samples are
grouped by them, and handed on as text that can be written anywhere (:func:`arf_plugin.untrusted.utf8`).
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from arf_plugin.anchors.headers import Header, SeekableTar, StreamedTar
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, LARGEST_IMAGE, image_problem, size_problem
from arf_plugin.errors import ArfError, TaskDataError
from arf_plugin.untrusted import require_regular, utf8

_SPLIT = re.compile(r"^((?:.*/)?[^.]+)\.([^/]*)$")
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_TEXT_OF_A_SET = re.compile(r"(^|/)(README|LICEN[SC]E|NOTICE|CHANGELOG|COPYING)$", re.IGNORECASE)
_REMOTE = re.compile(r"^(?!file:)[A-Za-z][A-Za-z0-9+.-]+:(//|:)")
# TarInfo.isreg, by which webdataset goes.
_PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)
_LINKS_AND_DEVICES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_PARTS = frozenset((*IMAGE_EXTENSIONS, "txt", "cls"))  # extensions by which a member is part of a sample
_RESERVED = ("__key__", "__url__", "__bad__")  # extensions that would overwrite webdataset's own notes
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error)

LARGEST_TEXT = 1 << 26  # bytes of a txt, cls or json; longer ones are no captions


@dataclass(slots=True)
class Member:
    """One regular file of a tar."""

    name: str  # full name in the tar
    key: str  # name without its extensions; members of a sample share it
    ext: str  # extensions in lower case, without the first dot (jpg, seg.png)
    offset: int  # first byte of the data in the tar; -1 if it cannot be read there (compressed, piped, with holes)
    size: int  # bytes of data
    data: bytes | None = None  # the bytes, if they were asked for
    problem: str | None = None  # why an image is unreadable; None if it looks whole or was not examined


@dataclass(slots=True)
class Sample:
    """Neighbouring members of one key, as open_clip's ``group_by_keys_nothrow`` forms them."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def image(self) -> Member | None:
        """The member that open_clip takes as the image."""
        for ext in IMAGE_EXTENSIONS:
            if ext in self.members:
                return self.members[ext]
        return None

    @property
    def is_stray(self) -> bool:
        """Whether these are no parts of a sample: system files, a README, AppleDouble files (``d/._0.jpg``)."""
        if _TEXT_OF_A_SET.search(self.key):
            return self.image is None and "cls" not in self.members
        return _PARTS.isdisjoint(self.members)


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


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to a tar that is being written; equal content is equal bytes."""
    info = tarfile.TarInfo(name)  # TarInfo's own defaults: owner 0, mode 0644, time 0
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def open_shard(url: str, error: type[ArfError] = TaskDataError) -> IO[bytes]:
    """Opens a local path, an fsspec URL or a ``pipe:`` command for reading.

    Raises:
        error: if it is missing or cannot be opened.
    """
    try:
        if url.startswith("pipe:"):
            import webdataset

            stream: IO[bytes] = webdataset.gopen(url)
            return stream
        if is_remote(url):
            import fsspec

            remote: IO[bytes] = fsspec.open(url, "rb").open()
            return remote
        path = local_path(url)
        require_regular(path, error)
        return path.open("rb")
    except FileNotFoundError:
        raise error(f"{url} does not exist. Expected a tar; check the path and its braces.") from None
    except ArfError as cause:
        raise error(f"{url} cannot be opened as a tar: {cause}") from None
    except Exception as cause:  # each of fsspec's file systems has errors of its own
        raise error(f"{url} cannot be opened: {cause}") from cause


def scan_samples(
    url: str,
    error: type[ArfError] = TaskDataError,
    *,
    read: Collection[str] = (),
    images: bool = False,
    decode: bool = False,
) -> Iterator[Sample]:
    """Yields the samples of a tar in order, reading little more than the headers of their members.

    Neighbours of one key form a sample; a repeated extension starts the next one, as in open_clip. That makes samples
    of system files too: see :attr:`Sample.is_stray`. A file without an extension is part of no sample.

    Args:
        url: local path, fsspec URL or ``pipe:`` command.
        error: family of the errors.
        read: extensions whose data is read as well.
        images: also tests images for truncation and sets ``problem``, by their first and last bytes where these leave
            no doubt.
        decode: decodes every image, with ``images``.

    Raises:
        error: if the tar is missing, empty, cut off or corrupt; for escaping names, links and devices.
    """
    sample: Sample | None = None
    current: str | None = None
    for key, member in _members(url, error, read, images, decode):
        if sample is None or key != current or member.ext in sample.members:
            if sample is not None:
                yield sample
            sample, current = Sample(member.key), key
        sample.members[member.ext] = member
    if sample is not None:
        yield sample


def _members(
    url: str, error: type[ArfError], read: Collection[str], images: bool, decode: bool
) -> Iterator[tuple[str, Member]]:
    """Yields members with their keys as bytes (``os.fsdecode``); see :func:`scan_samples`."""
    last: str | None = None
    try:
        with open_shard(url, error) as file:
            seekable = not url.startswith("pipe:") and file.seekable() and not _is_compressed(file)
            tar = SeekableTar(file) if seekable else StreamedTar(file)
            for header in tar:
                last = header.name
                split = split_name(header.name)
                if not _accept(header, split, url, error) or split is None:
                    continue
                key, ext = split
                examine = images and ext in IMAGE_EXTENSIONS
                data = problem = None
                if ext in read or (examine and header.offset < 0):
                    problem = size_problem(header.size) if examine else None
                    if problem is None or not header.size:
                        _require_size(header, ext, url, error)
                        data = tar.load(header)
                if examine and problem is None:
                    where, start = (file, header.offset) if data is None else (io.BytesIO(data), 0)
                    problem = image_problem(where, start, header.size, decode)
                name, shown = (header.name, key) if last.isascii() else (utf8(last), utf8(key))
                if ext not in read:
                    data = None
                yield key, Member(name, shown, ext, header.offset, header.size, data, problem)
    except _BROKEN as cause:
        after = "the start" if last is None else f"member {last!r}"
        raise error(
            f"{url} is cut off or corrupt after {after}: {cause}.\n"
            "Expected a whole tar; copy or download it again, or leave it out."
        ) from cause


def _accept(header: Header, split: tuple[str, str] | None, url: str, error: type[ArfError]) -> bool:
    """True for members that webdataset reads; raises for those that no data set should have."""
    name = header.name
    if name.startswith(("/", "\\")) or (".." in name and ".." in name.replace("\\", "/").split("/")):
        raise error(
            f"{url} has a member whose name leaves the folder: {name!r}.\n"
            "Expected names below the tar's root; the tar is broken or hostile: leave it out or repack it."
        )
    if header.type not in _PLAIN_TYPES:
        # webdataset passes over all of them; a link that stands for a part of a sample would be missed in silence.
        if header.type in _LINKS_AND_DEVICES and split is not None and split[1] in _PARTS:
            raise error(
                f"{url} has a member that is not a regular file: {name!r} (tar type {header.type!r}).\n"
                "Expected files only, no links and no devices; pack it again (tar --dereference)."
            )
        return False
    if _SKIPPED.match(name):
        return False
    if split is not None and split[1] in _RESERVED:
        raise error(
            f"{url} has the member {name!r}, whose extension is a word that webdataset keeps for itself.\n"
            "Expected extensions such as jpg, txt and cls; leave the member out."
        )
    return True


def _require_size(header: Header, ext: str, url: str, error: type[ArfError]) -> None:
    largest = LARGEST_IMAGE if ext in IMAGE_EXTENSIONS else LARGEST_TEXT
    if header.size > largest:
        raise error(
            f"{url}: {header.name!r} has {header.size:,} bytes, more than the {largest:,} that are read of a member.\n"
            "The tar is damaged or no data set: leave it out, or pack it again without this member."
        )


def _is_compressed(file: IO[bytes]) -> bool:
    magic = file.read(6)
    file.seek(0)
    return magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00\x00\x80"))
