"""What every form of images comes down to: entries that say where an image lies, and what is said of it."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from arf_plugin.errors import TaskDataError
from arf_plugin.evaluation.folders import SPLITS
from arf_plugin.untrusted import require_regular

# Names of columns in order of preference; compared in lower case, without signs between words.
IMAGE_COLUMNS = ("image", "img", "filepath", "filename", "path", "imagepath", "file", "imagefile")
CLASS_COLUMNS = ("label", "class", "classname", "labelname", "category", "target", "cls", "y")
SPLIT_COLUMNS = ("split", "subset", "set", "partition")
TEXT_COLUMNS = ("text", "caption", "title", "txt", "description", "prompt")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """An image of a source."""

    shown: str  # what the user knows it by: a path, or a place in a file of many images
    path: Path  # the file that holds it
    label: str | int | None  # name of its class, or its class index; None in a pool
    split: str | None = None  # train, val or test where the source says so
    text: str | None = None
    offset: int = -1  # of its bytes in a tar, or its row in a parquet file; -1 for an image file
    size: int = 0  # of its bytes in a tar

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: It cannot be read.
            TaskDataError: It is no file.
            ValueError: There is nothing where it should be.
        """
        require_regular(self.path, TaskDataError)
        if self.offset < 0:
            return self.path.read_bytes()
        if self.path.suffix == ".parquet":
            return parquet_image(self.path, self.offset)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a source holds."""

    form: str  # what it was taken for, in a few words
    entries: list[Entry]
    classnames: list[str] | None = None  # by class index, where labels are indices
    empty: tuple[str, ...] = ()  # classes without images
    notes: tuple[str, ...] = ()  # what was decided, or left out, and should be known


def split_of(name: str) -> str | None:
    """The split that a name stands for, such as ``validation``; None if it stands for none."""
    return SPLITS.get(name.lower())


def column(names: list[str], wanted: tuple[str, ...]) -> str | None:
    """The first of some columns that a table has, by whatever spelling: ``file_name``, ``FileName``."""
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(names)}
    return next((plain[name] for name in wanted if name in plain), None)


def parquet_image(path: Path, row: int) -> bytes:
    """The encoded image in a row of a parquet file; rows are asked for in order, so a row group is read once.

    Raises:
        ValueError: The row has none.
    """
    group = bisect.bisect(_row_groups(str(path)), row) - 1
    value: Any = _row_group(str(path), group)[row - _row_groups(str(path))[group]].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError("has no image bytes")
    return data


@lru_cache(maxsize=64)
def _row_groups(path: str) -> list[int]:
    """The first row of each row group."""
    import pyarrow.parquet as pq

    meta = pq.read_metadata(path)
    rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    return list(itertools.accumulate(rows, initial=0))[:-1]


@lru_cache(maxsize=2)
def _row_group(path: str, group: int) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        name = column(file.schema_arrow.names, IMAGE_COLUMNS)
        if name is None:
            raise TaskDataError(f"{path} has no column of images any more. Has it been replaced?")
        return file.read_row_group(group, columns=[name]).column(0)
