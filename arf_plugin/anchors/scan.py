"""What a WebDataset shard holds, by its headers, with a cache: a million samples are looked at once.

A shard that has changed in size, times or inode is scanned again, and one whose images are to be decoded always is.
Only local shards are cached (see :mod:`arf_plugin.files`).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

from arf_plugin.anchors.images import IMAGE_EXTENSIONS
from arf_plugin.anchors.tars import Sample, is_remote, local_path, scan_samples
from arf_plugin.errors import ArfError, TaskDataError
from arf_plugin.files import digest, read_cache, stat_key, write_cache

MOST_LABELS = 100_000  # distinct values of cls that are noted

_FORMAT = 6
_LABEL_LENGTH = 40


@dataclass
class ShardScan:
    """The samples of one shard. Keys are text that can be written anywhere (:func:`arf_plugin.untrusted.utf8`)."""

    url: str
    keys: list[str] = field(default_factory=list)  # of the samples that have an image, in order
    without_image: list[str] = field(default_factory=list)  # keys of samples with txt or cls alone
    without_text: int = 0  # samples that have an image but no txt
    without_class: int = 0  # samples that have an image but no cls
    without_both: list[str] = field(default_factory=list)  # keys of samples with an image but neither
    unreadable: dict[str, str] = field(default_factory=dict)  # reason per key of a damaged image
    bad_texts: dict[str, str] = field(default_factory=dict)  # reason per key of a bad txt, if texts were read
    image_bytes: int = 0  # size of all images
    digests: list[str] = field(default_factory=list)  # of images, as in keys, if they were decoded
    # For each cls beside an image, stripped and cut to 40 characters: how many samples have it, and the key of the
    # first; of more than MOST_LABELS different ones, those that came first.
    labels: dict[str, list[Any]] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)  # how often each key occurs in samples apart


def scan_shard(
    url: str, error: type[ArfError] = TaskDataError, *, texts: bool = False, decode: bool = False
) -> ShardScan:
    """Scans a shard, or finds its scan in the cache.

    Args:
        url: local path, fsspec URL or ``pipe:`` command.
        error: family of the errors.
        texts: also reads each ``txt`` and notes those that are missing, empty or not UTF-8.
        decode: decodes every image in full rather than look at its end markers; never answered from the cache.

    Raises:
        error: see :func:`arf_plugin.anchors.tars.scan_samples`.
    """
    key = None if decode else _cache_key(url, texts)
    known = _cached(url, key)
    if known is not None:
        return known
    scan = _scan(url, error, texts, decode)
    if key is not None:
        write_cache("scans", key, asdict(scan))
    return scan


def cached_scan(url: str, *, texts: bool = False) -> ShardScan | None:
    """Finds the scan of a shard in the cache; None if it is not there, or the shard has changed."""
    return _cached(url, _cache_key(url, texts))


def require_unique_keys(scan: ShardScan, error: type[ArfError] = TaskDataError) -> None:
    """Refuses a shard in which a key comes again, for data that something is joined with by its ids.

    Raises:
        error: a key occurs in samples apart from each other.
    """
    if scan.repeated:
        key, count = next(iter(scan.repeated.items()))
        times = "twice" if count == 2 else f"{count} times"
        raise error(
            f"{scan.url} has the key {key!r} {times}, in samples apart from each other. Expected each key once, "
            "with all members of a sample side by side (tar --sort=name); pack it again."
        )


def _scan(url: str, error: type[ArfError], texts: bool, decode: bool) -> ShardScan:
    scan = ShardScan(url)
    seen: set[str] = set()
    read = ("cls", *(["txt"] if texts else []), *(IMAGE_EXTENSIONS if decode else []))
    for sample in scan_samples(url, error, read=read, images=True, decode=decode):
        key, members, image = sample.key, sample.members, sample.image
        if image is None and sample.is_stray:
            continue
        if key in seen:
            scan.repeated[key] = scan.repeated.get(key, 1) + 1
        seen.add(key)
        if image is None:
            scan.without_image.append(key)
            continue
        scan.keys.append(key)
        scan.image_bytes += image.size
        if decode:
            scan.digests.append(hashlib.blake2b(image.data or b"", digest_size=12).hexdigest())
        text = members.get("txt")
        scan.without_text += text is None
        if "cls" in members:
            _note_label(scan, sample)
        else:
            scan.without_class += 1
            if text is None:
                scan.without_both.append(key)
        if image.problem:
            scan.unreadable[key] = image.problem
        if texts:
            problem = "has no txt" if text is None else _text_problem(text.data or b"")
            if problem:
                scan.bad_texts[key] = problem
    return scan


def _note_label(scan: ShardScan, sample: Sample) -> None:
    label = (sample.members["cls"].data or b"").strip()[:_LABEL_LENGTH].decode("latin-1")
    known = scan.labels.get(label)
    if known is not None:
        known[0] += 1
    elif len(scan.labels) < MOST_LABELS:
        scan.labels[label] = [1, sample.key]


def _text_problem(data: bytes) -> str | None:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as cause:
        return f"has a txt that is not UTF-8 ({cause.reason} at byte {cause.start}: {data[:40]!r})"
    return None if text.strip() else "has an empty txt"


def _cache_key(url: str, texts: bool) -> str | None:
    if is_remote(url):
        return None
    path = local_path(url)
    try:
        return digest([_FORMAT, str(path.absolute()), *stat_key(path), texts])
    except OSError:
        return None


def _cached(url: str, key: str | None) -> ShardScan | None:
    found = None if key is None else read_cache("scans", key)
    blank = vars(ShardScan(url))
    if found is None or {name: type(value) for name, value in found.items()} != {
        name: type(value) for name, value in blank.items()
    }:
        return None  # there is none, or it is damaged
    return ShardScan(**found | {"url": url})
