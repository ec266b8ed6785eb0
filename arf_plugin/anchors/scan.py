"""What a WebDataset shard holds, by its headers, with a cache: a million samples are looked at once.

The cache is below ``ARF_CACHE_DIR`` (default ``~/.cache/arf-plugin``), one file per shard; a shard that has changed
in size or time is scanned again. Only local shards are cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from arf_plugin.anchors.files import cache_folder, digest, write_json
from arf_plugin.anchors.images import IMAGE_EXTENSIONS
from arf_plugin.anchors.tars import is_remote, local_path, scan_samples
from arf_plugin.errors import ArfError, TaskDataError

_FORMAT = 4


@dataclass
class ShardScan:
    """The samples of one shard.

    Attributes:
        url: the shard.
        keys: keys of the samples that have an image, in order.
        without_image: keys of the others.
        without_text: number of samples that have an image but no ``txt``.
        without_class: number of samples that have an image but no ``cls``.
        without_both: keys of the samples that have an image but neither.
        unreadable: reason per key of a damaged image.
        bad_texts: reason per key of an unusable ``txt``, if texts were read.
        image_bytes: size of all images.
        digests: digest of each image's bytes, in the order of ``keys``, if images were decoded.
    """

    url: str
    keys: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    without_text: int = 0
    without_class: int = 0
    without_both: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    bad_texts: dict[str, str] = field(default_factory=dict)
    image_bytes: int = 0
    digests: list[str] = field(default_factory=list)
    labels: dict[str, list] = field(default_factory=dict)
    strays: int = 0
    repeated: dict[str, int] = field(default_factory=dict)


def scan_shard(
    url: str, error: type[ArfError] = TaskDataError, *, texts: bool = False, decode: bool = False
) -> ShardScan:
    """Scans a shard, or finds its scan in the cache.

    Args:
        url: local path, fsspec URL or ``pipe:`` command.
        error: family of the errors.
        texts: also reads each ``txt`` and notes those that are missing, empty or not UTF-8.
        decode: decodes every image in full rather than look at its end markers.

    Raises:
        error: see :func:`arf_plugin.anchors.tars.scan_tar`; also for a key that occurs twice.
    """
    known = cached_scan(url, texts=texts, decode=decode)
    if known is not None:
        return known
    scan = _scan(url, error, texts, decode)
    cached = _cache_path(url, texts, decode)
    if cached is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            write_json(cached, {"scan": asdict(scan)})
    return scan


def cached_scan(url: str, *, texts: bool = False, decode: bool = False) -> ShardScan | None:
    """Finds the scan of a shard in the cache; None if it is not there, or the shard has changed."""
    cached = _cache_path(url, texts, decode)
    if cached is None or not cached.exists():
        return None
    try:
        return ShardScan(**json.loads(cached.read_text(encoding="utf-8"))["scan"] | {"url": url})
    except (ValueError, KeyError, TypeError, OSError):
        return None  # a damaged cache file is as good as none


def _scan(url: str, error: type[ArfError], texts: bool, decode: bool) -> ShardScan:
    scan = ShardScan(url)
    seen: set[str] = set()
    read = ["cls", *(["txt"] if texts else []), *(IMAGE_EXTENSIONS if decode else [])]
    for sample in scan_samples(url, error, read=read, images=True, decode=decode):
        if sample.key in seen:
            scan.repeated[sample.key] = scan.repeated.get(sample.key, 1) + 1
        seen.add(sample.key)
        if sample.image is None:
            scan.without_image.append(sample.key)
            continue
        scan.keys.append(sample.key)
        scan.image_bytes += sample.image.size
        if sample.image.data is not None:
            scan.digests.append(hashlib.blake2b(sample.image.data, digest_size=12).hexdigest())
        if "cls" in sample.members:
            entry = scan.labels.setdefault(
                (sample.members["cls"].data or b"").decode("latin-1").strip()[:40], [0, sample.key]
            )
            entry[0] += 1
        scan.without_class += "cls" not in sample.members
        text = sample.members.get("txt")
        scan.without_text += text is None
        if text is None and "cls" not in sample.members:
            scan.without_both.append(sample.key)
        if sample.image.problem:
            scan.unreadable[sample.key] = sample.image.problem
        if texts:
            problem = "has no txt" if text is None else _text_problem(text.data or b"")
            if problem:
                scan.bad_texts[sample.key] = problem
    return scan


def _text_problem(data: bytes) -> str | None:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as cause:
        return f"has a txt that is not UTF-8 ({cause.reason} at byte {cause.start}: {data[:40]!r})"
    return None if text.strip() else "has an empty txt"


def _cache_path(url: str, texts: bool, decode: bool) -> Path | None:
    if is_remote(url):
        return None
    path = local_path(url)
    try:
        stat = path.stat()
    except OSError:
        return None
    name = digest([_FORMAT, str(path.absolute()), stat.st_size, stat.st_mtime_ns, texts, decode])
    return cache_folder() / "scans" / f"{name[:40]}.json"
