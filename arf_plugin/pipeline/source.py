"""Reads images and texts of task data and pools, shard by shard and in order.

Task data is what open_clip's ``--train-data`` takes: WebDataset URLs with braces and ``::``, or a CSV/TSV file whose
rows name image files. A pool is WebDataset URLs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from arf_plugin.anchors.ids import sample_id, shard_name
from arf_plugin.anchors.images import IMAGE_EXTENSIONS
from arf_plugin.anchors.scan import cached_scan
from arf_plugin.anchors.tars import Sample, is_remote, local_path, scan_samples
from arf_plugin.anchors.task import read_csv_ids
from arf_plugin.errors import ArfError, PoolError, TaskDataError
from arf_plugin.files import content_digest, digest, known_stat
from arf_plugin.pipeline.stage import Shard
from arf_plugin.untrusted import require_regular

CSV_ROWS_PER_SHARD = 10_000


@dataclass(frozen=True, slots=True)
class RawSample:
    """One image as it is stored, with its text.

    Attributes:
        id: sample id, as in the anchor set's contract.
        key: WebDataset key, or the image path of a CSV row.
        tar: URL of the shard; empty for a CSV.
        ext: extension of the image.
        offset: first byte of the image in the tar; -1 if the tar cannot be read there.
        size: bytes of the image.
        image: encoded image; None if there is none.
        text: caption; None if there is none.
        problem: what is wrong with the image or the text.
    """

    id: str
    key: str
    tar: str = ""
    ext: str = ""
    offset: int = -1
    size: int = 0
    image: bytes | None = None
    text: str | None = None
    problem: str | None = None


class Source(Protocol):
    """Samples in shards."""

    def shards(self) -> list[Shard]:
        """Returns the shards in order."""

    def read(self, shard: Shard) -> Iterator[RawSample]:
        """Yields a shard's samples in order."""

    def fingerprint(self) -> list[Any]:
        """Returns one JSON value per shard, at the price of a look at its files: it changes if one is written again.

        It may change although the contents do not, as when a file is touched or moved.
        """

    def content(self, shard: Shard) -> str:
        """Returns a digest of the contents of a shard's files, wherever they lie.

        Raises:
            ArfError: if they cannot be read.
        """

    def digest(self) -> str:
        """Returns a digest of the contents of all shards, which stays the same when they are copied."""


@dataclass(frozen=True)
class TarSource:
    """WebDataset shards.

    Attributes:
        urls: the shards.
        error: family of the errors: TaskDataError or PoolError.
        salvage: takes what comes before the damage in a damaged tar, and rejects the rest, rather than raise.
    """

    urls: list[str]
    error: type[ArfError] = PoolError
    salvage: bool = False

    def shards(self) -> list[Shard]:
        """One shard per tar, named ``00000`` and so on, weighted by its bytes; counted if it was scanned before."""
        shards = []
        for i, url in enumerate(self.urls):
            scan = cached_scan(url)
            there = not is_remote(url) and local_path(url).exists()
            weight = float(local_path(url).stat().st_size) if there else 1.0
            samples = len(scan.keys) + len(scan.without_image) if scan else None
            shards.append(Shard(i, f"{i:05d}", url, weight, samples))
        return shards

    def read(self, shard: Shard) -> Iterator[RawSample]:
        """Yields the samples of a tar; system files and READMEs, which open_clip passes over, are none."""
        url = shard.source
        try:
            for sample in scan_samples(url, self.error, read=(*IMAGE_EXTENSIONS, "txt")):
                if not sample.is_stray:
                    yield _raw(url, sample)
        except self.error as cause:
            if not self.salvage:
                raise
            rest = f"{shard_name(url)}/..."
            yield RawSample(rest, rest, url, problem=f"is lost: {cause}")

    def fingerprint(self) -> list[Any]:
        """Place, size, times and inode of every tar; of a remote one what its server says of it."""
        return [
            [url, _state(url, _asked_once) if is_remote(url) else known_stat(local_path(url))]
            for url in self.urls
        ]

    def content(self, shard: Shard) -> str:
        """SHA-256 of the tar; of a remote one, which is not read for this, what its server says of it."""
        url = shard.source
        if is_remote(url):
            return digest(["remote", _state(url, _remote_state) or url])
        try:
            return _content([local_path(url)], self.error)
        except self.error:
            if not self.salvage:
                raise
            return digest(["lost", shard_name(url)])

    def digest(self) -> str:
        """Shard names, which are a part of the samples' ids, and contents."""
        return digest([[shard_name(shard.source), self.content(shard)] for shard in self.shards()])


@dataclass(frozen=True)
class CsvSource:
    """Rows of a CSV or TSV file with image paths, read as open_clip reads them.

    Attributes:
        path: the file.
        image_column, separator: open_clip's ``--csv-img-key`` and ``--csv-separator``.
    """

    path: str
    image_column: str = "filepath"
    separator: str = "\t"

    def shards(self) -> list[Shard]:
        """One shard per 10,000 rows."""
        paths = read_csv_ids(self.path, self.image_column, self.separator)
        starts = range(0, len(paths), CSV_ROWS_PER_SHARD)
        chunks = [paths[start : start + CSV_ROWS_PER_SHARD] for start in starts]
        return [Shard.counted(i, rows, len(rows)) for i, rows in enumerate(chunks)]

    def read(self, shard: Shard) -> Iterator[RawSample]:
        """Yields the rows of a chunk."""
        for path in shard.source:
            image, problem = b"", None
            try:
                require_regular(Path(path), TaskDataError)
                image = Path(path).read_bytes()
            except TaskDataError:
                problem = "is no file"
            except (OSError, ValueError) as cause:  # ValueError: a null byte
                problem = f"cannot be read ({getattr(cause, 'strerror', None) or cause})"
            yield RawSample(
                path,
                path,
                ext=Path(path).suffix.lstrip("."),
                size=len(image),
                image=None if problem else image,
                problem=problem,
            )

    def fingerprint(self) -> list[Any]:
        """Per chunk of rows a digest of the image paths, and of each image's size, times and inode."""
        return [digest([[path, known_stat(Path(path))] for path in shard.source]) for shard in self.shards()]

    def content(self, shard: Shard) -> str:
        """Digest of the image paths, which are the samples' ids, and of the contents of the images."""
        there = [path for path in shard.source if os.path.isfile(path)]  # noqa: PTH113 - names may be impossible
        missing = sorted(set(shard.source) - set(there))
        return digest([shard.source, missing, _content([Path(path) for path in there], TaskDataError)])

    def digest(self) -> str:
        """The image paths and contents."""
        return digest([self.content(shard) for shard in self.shards()])


def text_of(sample: Sample) -> tuple[str | None, str | None]:
    """A WebDataset sample's text, and what is wrong with it."""
    if "txt" not in sample.members:
        return None, None
    try:
        return (sample.members["txt"].data or b"").decode("utf-8"), None
    except UnicodeDecodeError as cause:
        return None, f"its txt is not UTF-8 ({cause})"


def _raw(url: str, sample: Sample) -> RawSample:
    image = sample.image
    text, problem = text_of(sample)
    if image is None:
        problem = f"has no image (members: {', '.join(sorted(sample.members))})"
        return RawSample(sample_id(url, sample.key), sample.key, url, text=text, problem=problem)
    return RawSample(
        sample_id(url, sample.key),
        sample.key,
        url,
        image.ext,
        image.offset,
        image.size,
        image.data,
        text,
        problem,
    )


def _content(paths: list[Path], error: type[ArfError]) -> str:
    for path in paths:
        require_regular(path, error)
    try:
        return content_digest(paths)
    except OSError as cause:
        raise error(f"{cause.filename or paths[0]} cannot be read: {cause.strerror or cause}.") from cause


_STATE = {"size", "mtime", "created", "generation", "version_id", "md5", "md5Hash", "crc32c"}
_STATE |= {"ETag", "etag", "LastModified", "last_modified"}


def _remote_state(url: str) -> dict[str, str]:
    """What a server says of a file that changes with its contents."""
    import fsspec

    if url.startswith("pipe:"):
        return {}
    fs, path = fsspec.core.url_to_fs(url)
    return {name: str(value) for name, value in fs.info(path).items() if name in _STATE and value is not None}


_asked_once = functools.lru_cache(maxsize=None)(_remote_state)  # within one process; a failure is asked again


def _state(url: str, ask: Callable[[str], dict[str, str]]) -> dict[str, str] | None:
    try:
        return ask(url) or None
    except (
        Exception
    ):  # fsspec's file systems raise kinds of their own; reading the tar will say what is wrong
        return None
