"""Writes WebDataset shards for training and folders in CLIP_benchmark's layout for evaluation."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.draw import add_bytes
from benchmarks.files import replacing, unit_hash, write_json, write_text

POOL_SHARD_SIZE = 1000
Record = tuple[str, Mapping[str, bytes]]  # key, and the content of each extension


def write_tar(path: Path, records: Iterable[Record]) -> int:
    """Writes one shard atomically.

    Returns:
        The number of samples in it.
    """
    count = 0
    with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for key, parts in records:
            for extension, data in parts.items():
                add_bytes(tar, f"{key}.{extension}", data)
            count += 1
    return count


def write_shards(folder: Path, prefix: str, records: Sequence[Record], shards: int) -> dict[str, int]:
    """Deals records out to `shards` files `<prefix>000.tar`, ... and returns the files' sample counts."""
    return {
        f"{prefix}{n:03d}.tar": write_tar(folder / f"{prefix}{n:03d}.tar", records[n::shards])
        for n in range(shards)
    }


def write_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Writes `sizes.json`, from which open_clip knows how many samples an epoch has."""
    write_json(folder / "sizes.json", dict(sizes))


def pair(key: str, png: bytes, text: str, about: Mapping[str, str]) -> Record:
    """A pool's record: image, text, and where the image is from."""
    parts = {"png": png, "txt": text.encode(), "json": json.dumps(about, sort_keys=True).encode()}
    return key, parts


def shuffled(records: Iterable[Record]) -> list[Record]:
    """The records in the order of a hash of their keys."""
    return sorted(records, key=lambda record: unit_hash("order", record[0]))


def write_pool(folder: Path, groups: Mapping[str, Sequence[Record]]) -> None:
    """Writes groups of pairs as `<prefix>NNN.tar`, about `POOL_SHARD_SIZE` in each, by prefix."""
    sizes = {}
    for prefix, records in groups.items():
        sizes |= write_shards(folder, prefix, records, max(2, round(len(records) / POOL_SHARD_SIZE)))
    write_sizes(folder, sizes)


def write_evaluation_set(
    folder: Path,
    records: Sequence[tuple[str, bytes, int]],
    classnames: Sequence[str],
    templates: Sequence[str],
) -> int:
    """Writes one classification set in CLIP_benchmark's WebDataset layout.

    Args:
        folder: the set's folder.
        records: key, PNG and class number of each image.
        classnames: one name per class.
        templates: prompts with `{c}` for the class name.
    """
    write_text(folder / "classnames.txt", "\n".join(classnames) + "\n")
    write_text(folder / "zeroshot_classification_templates.txt", "\n".join(templates) + "\n")
    write_text(folder / "test" / "nshards.txt", "1\n")
    return write_tar(
        folder / "test" / "0.tar",
        ((key, {"png": png, "cls": str(number).encode()}) for key, png, number in records),
    )
