"""Finds chosen images in the pool's tars, and makes sure that they are those that were embedded.

What tells one image from another is the SHA-256 of its bytes, which ``arf embed`` writes beside its vector; names,
sizes and positions only say where to look first. Embeddings without it (clip-retrieval's, or those of older versions)
are compared by key, size and text, as far as they have them.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from arf_plugin.anchors.ids import shard_name
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, image_problem
from arf_plugin.anchors.tars import Sample, is_remote, local_path, open_shard, scan_samples
from arf_plugin.errors import ArfError, PoolError
from arf_plugin.pipeline.source import text_of
from arf_plugin.untrusted import utf8

_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f])")  # what utf8 makes of a byte that is no UTF-8


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen pair and what is known of it; ``number`` becomes its key in the anchor set.

    Attributes:
        recorded: the tar that it was embedded from.
        tars: where to look for it: URLs, the likeliest first, each with how much of its path is that of the recorded
            tar.
        key: as UTF-8.
        offset, size: of the image in the tar; -1 and 0 if they are not known.
        caption: None if it is to be read from the tar.
        sha256: of the image's bytes; None if it is not known.
        texts_are_the_tars: whether ``caption`` is what the tar's ``txt`` says (arf embed), or may be something else.
        provenance: to be written beside it.
    """

    number: int
    recorded: str
    tars: tuple[tuple[str, int], ...]
    key: str
    ext: str
    offset: int
    size: int
    caption: str | None
    sha256: str | None
    texts_are_the_tars: bool
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """A pair's image and text as they are in a tar, or what is wrong with them."""

    pair: Pair
    url: str
    ext: str = ""
    image: bytes | None = None
    text: str | None = None
    problem: str | None = None


class PoolTars:
    """The tars that may be opened: those that the user names, and local files.

    A location in data never leads to a command or over the network, only to a tar that is compared with what was
    embedded.

    Args:
        named: URLs of ``--pool``.
        listing: the file that has the recorded locations, for messages.
    """

    def __init__(self, named: Sequence[str], listing: Path) -> None:
        self._listing = listing
        self._exact: dict[str, str] = {}
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for url in named:
            self._exact.setdefault(utf8(url), url)
            self._by_name[name_of(utf8(url))].append(url)

    def candidates(self, recorded: str) -> tuple[tuple[str, int], ...]:
        """Where to look for the contents of a recorded tar; see :class:`Pair`.

        Raises:
            PoolError: if it is nowhere to be looked for.
        """
        if recorded in self._exact:
            return ((self._exact[recorded], 0),)
        named = self._by_name.get(name_of(recorded), [])
        alike = [(url, _common_end(recorded, utf8(url))) for url in named]
        alike.sort(key=lambda found: -found[1])
        if not is_remote(recorded) and (found := _local_file(recorded)) is not None:
            alike.append((found, 0))
        if alike:
            return tuple(alike)
        where = f"{self._listing} names the tar {recorded!r}"
        if is_remote(recorded):
            raise PoolError(
                f"{where}, a command or a remote place, which is not opened because data say so. If it is your pool, "
                "name it with --pool, exactly so."
            )
        raise PoolError(
            f"{where}, which is no file here{', and --pool names none like it' if self._exact else ''}. Name the "
            "pool's tars, wherever they are now, with --pool."
        )


def name_of(url: str) -> str:
    """File name of a tar without its endings; what was recorded may be a command that names none."""
    try:
        return shard_name(url)
    except ArfError:
        return url


def read_pairs(pairs: list[Pair]) -> Iterator[Reading]:
    """Yields readings of pairs that were embedded from one tar, in their order.

    Raises:
        PoolError: if no tar holds what was embedded, or several might.
    """
    tars = pairs[0].tars
    if len(tars) == 1:
        yield from _read(tars[0][0], pairs)
        return
    passed: list[tuple[int, list[Reading]]] = []
    failures = []
    for url, end in tars:
        try:
            readings = list(_read(url, pairs))
        except PoolError as cause:
            failures.append(str(cause))
            continue
        lost = next((reading for reading in readings if reading.image is None), None)
        if lost is not None:
            failures.append(f"{lost.pair.key!r} {lost.problem}")
        elif all(pair.sha256 for pair in pairs):
            yield from readings
            return
        else:
            passed.append((end, readings))
    if not passed:
        raise PoolError(
            f"None of {len(tars)} tars of one name holds the chosen pairs as they were embedded: {failures[0]}"
        )
    nearest = max(end for end, _ in passed)
    best = [readings for end, readings in passed if end == nearest]
    if len(best) > 1:
        names = " and ".join(readings[0].url for readings in best[:2])
        raise PoolError(
            f"{names} both hold the key {pairs[0].key!r}, and nothing tells which of them was embedded. Name with "
            "--pool those alone that were, or embed them with: arf embed"
        )
    yield from best[0]


def _read(url: str, pairs: list[Pair]) -> Iterator[Reading]:
    """Reads pairs at their offsets as long as what stands there is what was embedded, and scans for the others."""
    place = 0
    if not url.startswith("pipe:"):
        with open_shard(url, PoolError) as file:
            while place < len(pairs) and (image := _at_offset(file, pairs[place])) is not None:
                pair = pairs[place]
                place += 1
                problem = image_problem(io.BytesIO(image), 0, len(image))
                yield Reading(pair, url, pair.ext, image, pair.caption, problem)
    if place < len(pairs):
        yield from _by_scan(url, pairs[place:])


def _at_offset(file: IO[bytes], pair: Pair) -> bytes | None:
    """The image at its offset; None unless it is the one that was embedded."""
    if pair.sha256 is None or pair.caption is None or pair.ext not in IMAGE_EXTENSIONS:
        return None
    try:
        if pair.offset < 0 or pair.offset + pair.size > file.seek(0, io.SEEK_END):
            return None
        file.seek(pair.offset)
        image = file.read(pair.size)
    except (OSError, ValueError):  # it can only be read from front to back
        return None
    return image if hashlib.sha256(image).hexdigest() == pair.sha256 else None


def _by_scan(url: str, pairs: list[Pair]) -> Iterator[Reading]:
    """Finds pairs by their keys, and by what they hold."""
    wanted: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        wanted[pair.key].append(pair)
    found: dict[int, list[tuple[bool, Reading]]] = defaultdict(list)
    damaged: dict[int, Reading] = {}
    differ: set[int] = set()
    for sample in scan_samples(url, PoolError, read=(*IMAGE_EXTENSIONS, "txt"), images=True):
        if sample.image is None:
            continue
        for pair in wanted.get(utf8(sample.key), ()):
            reading = _reading(pair, url, sample)
            if _is_same(pair, sample):
                found[pair.number].append((sample.image.offset == pair.offset, reading))
            elif pair.sha256 and sample.image.problem:
                damaged[pair.number] = reading
            else:
                differ.add(pair.number)
    for pair in pairs:
        places = found[pair.number]
        if len(places) > 1 and pair.sha256 is None:
            places = [place for place in places if place[0]]
            if len(places) != 1:
                raise PoolError(
                    f"{url} has the key {pair.key!r} more than once, and nothing tells which of its images was "
                    "embedded. Embed the pool again, with: arf embed"
                )
        if places:
            yield places[0][1]
        elif pair.number in damaged:
            yield damaged[pair.number]
        elif pair.sha256 or pair.number in differ:
            raise PoolError(
                f"{url} does not hold the image of {pair.key!r} as it was embedded: the tar has changed since it was "
                "embedded, or is another one. Name the right tar with --pool, or embed the pool and retrieve again."
            )
        else:
            yield Reading(pair, url, problem=f"is not in {url}")


def _is_same(pair: Pair, sample: Sample) -> bool:
    """Whether a sample of a pair's key is what was embedded, as far as is known."""
    assert sample.image is not None
    if pair.sha256:
        return hashlib.sha256(sample.image.data or b"").hexdigest() == pair.sha256
    if pair.size > 0 and pair.size != sample.image.size:
        return False
    said = sample.members.get("txt")
    if not pair.texts_are_the_tars or pair.caption is None or said is None:
        return True
    return said.data == pair.caption.encode("utf-8")


def _reading(pair: Pair, url: str, sample: Sample) -> Reading:
    assert sample.image is not None
    text, problem = pair.caption, sample.image.problem
    if text is None:
        text, text_problem = text_of(sample)
        problem = problem or text_problem
    return Reading(pair, url, sample.image.ext, sample.image.data, text, problem)


def _local_file(recorded: str) -> str | None:
    """A recorded location as the path of a file that is there, with the bytes that are no UTF-8 put back."""
    original = _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), recorded)
    for url in (recorded, original):
        if os.path.isfile(local_path(url)):  # noqa: PTH113 - Path.is_file raises for names that are too long
            return url
    return None


def _common_end(one: str, other: str) -> int:
    """Number of folders, from the last on, that two locations of tars of one name have in common, and the name."""
    folders = zip(*(re.split(r"[/\\]+", url)[-2::-1] for url in (one, other)), strict=False)
    return 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], folders))
