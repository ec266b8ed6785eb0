"""Reads images and texts of task data and pools, shard by shard and in order.

Task data is what open_clip's ``--train-data`` takes: WebDataset URLs with braces and ``::``, or a CSV/TSV file whose
rows name image files. A pool is WebDataset URLs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

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
# What changes with the contents of a remote file, as the file systems of fsspec call it.
_STATE = {"size", "mtime", "created", "generation", "version_id", "md5", "md5Hash", "crc32c"}
_STATE |= {"ETag", "etag", "LastModified", "last_modified"}


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
        """One shard per tar, named ``00000`` and so on; counted if it was scanned before."""
        shards = []
        for i, url in enumerate(self.urls):
            scan = cached_scan(url)
            samples = len(scan.keys) + len(scan.without_image) if scan else None
            shards.append(Shard(i, f"{i:05d}", url, samples))
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
        """A JSON value per shard, which changes if it is written again, touched or moved; its contents are not read.

        Place, size, times and inode of every tar; of a remote one what its server says of it.
        """
        return [
            [url, _remote_state(url) if is_remote(url) else known_stat(local_path(url))] for url in self.urls
        ]

    def content(self, shard: Shard) -> str:
        """SHA-256 of a tar, wherever it lies; of a remote one, which is not read for this, of what its server says.

        Raises:
            ArfError: if it cannot be read.
        """
        url = shard.source
        if is_remote(url):
            return digest(["remote", _remote_state(url) or url])
        try:
            return _content([local_path(url)], self.error)
        except self.error:
            if not self.salvage:
                raise
            return digest(["lost", shard_name(url)])

    def digest(self) -> str:
        """Of shard names, which are a part of the samples' ids, and contents."""
        return digest([[shard_name(shard.source), self.content(shard)] for shard in self.shards()])


@dataclass(frozen=True)
class CsvSource:
    """Rows of a CSV or TSV file with image paths, read as open_clip reads them; methods as those of `TarSource`.

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
            raw = RawSample(path, path, ext=Path(path).suffix.lstrip("."))
            try:
                require_regular(Path(path), TaskDataError)
                image = Path(path).read_bytes()
            except TaskDataError:
                yield replace(raw, problem="is no file")
            except (OSError, ValueError) as cause:  # ValueError: a null byte
                yield replace(raw, problem=f"cannot be read ({getattr(cause, 'strerror', None) or cause})")
            else:
                yield replace(raw, size=len(image), image=image)

    def fingerprint(self) -> list[Any]:
        """Per chunk of rows a digest of the image paths, and of each image's size, times and inode."""
        return [digest([[path, known_stat(Path(path))] for path in shard.source]) for shard in self.shards()]

    def content(self, shard: Shard) -> str:
        """Digest of the image paths, which are the samples' ids, and of the contents of the images."""
        there = [path for path in shard.source if os.path.isfile(path)]  # noqa: PTH113 - names may be impossible
        missing = sorted(set(shard.source) - set(there))
        return digest([shard.source, missing, _content([Path(path) for path in there], TaskDataError)])

    def digest(self) -> str:
        """Of the image paths and contents."""
        return digest([self.content(shard) for shard in self.shards()])


Source: TypeAlias = "TarSource | CsvSource"


def text_of(sample: Sample) -> tuple[str | None, str | None]:
    """A WebDataset sample's text, and what is wrong with it."""
    if "txt" not in sample.members:
        return None, None
    try:
        return (sample.members["txt"].data or b"").decode("utf-8"), None
    except UnicodeDecodeError as cause:
        return None, f"its txt is not UTF-8 ({cause})"


def _raw(url: str, sample: Sample) -> RawSample:
    text, problem = text_of(sample)
    raw = RawSample(sample_id(url, sample.key), sample.key, url, text=text, problem=problem)
    if (image := sample.image) is None:
        return replace(raw, problem=f"has no image (members: {', '.join(sorted(sample.members))})")
    return replace(raw, ext=image.ext, offset=image.offset, size=image.size, image=image.data)


def _content(paths: list[Path], error: type[ArfError]) -> str:
    for path in paths:
        require_regular(path, error)
    try:
        return content_digest(paths)
    except OSError as cause:
        raise error(f"{cause.filename or paths[0]} cannot be read: {cause.strerror or cause}.") from cause


def _remote_state(url: str) -> dict[str, str] | None:
    """What a server says of a file that changes with its contents."""
    import fsspec

    if url.startswith("pipe:"):
        return None
    try:
        fs, path = fsspec.core.url_to_fs(url)
        found = fs.info(path)
    except (
        Exception
    ):  # fsspec's file systems raise kinds of their own; reading the tar will say what is wrong
        return None
    return {name: str(found[name]) for name in found if name in _STATE and found[name] is not None} or None
