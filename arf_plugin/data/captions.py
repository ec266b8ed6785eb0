"""Caption anchors by sample id; see :mod:`arf_plugin.anchors.mapped`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arf_plugin.anchors.captions import caption_batches, list_caption_files
from arf_plugin.anchors.mapped import MappedTable, mapped_file
from arf_plugin.anchors.reading import file_stamp
from arf_plugin.anchors.text_columns import digests
from arf_plugin.errors import AnchorSetError

FORMAT = "arf-captions-3"


class CaptionStore(MappedTable):
    """Read-only captions, memory-mapped."""

    kind, column = "captions", "caption"

    def get(self, sample_id: str) -> list[str]:
        """All captions of a sample, in the order of the parquet files; empty if there are none."""
        return [self._values[row].as_py() for row in self._rows(sample_id)]

    @cached_property
    def mean_length(self) -> float:
        """Mean length of the captions in characters."""
        lengths = (pc.sum(pc.utf8_length(batch["caption"])).as_py() or 0 for batch in self.batches())
        return float(sum(lengths) / max(1, len(self)))

    @cached_property
    def repeated(self) -> int:
        """How many rows repeat the caption of another one of the same sample, by digests of both."""
        between = pa.scalar("\0", pa.large_string())  # neither holds it
        both = [
            digests(pc.binary_join_element_wise(batch["id"], batch["caption"], between))
            for batch in self.batches()
        ]
        found = np.sort(np.concatenate([np.zeros(0, np.uint64), *both]))
        return int(np.count_nonzero(found[1:] == found[:-1]))


def open_captions(anchors: str) -> CaptionStore | None:
    """Opens the captions of an anchor set, building the cache file if it is not there yet.

    Args:
        anchors: Folder or fsspec URL of the anchor set.

    Returns:
        The captions; None if the set has no ``captions/*.parquet``.

    Raises:
        AnchorSetError: A parquet file that cannot be read, has no ``id`` or ``caption`` column, or holds a row that
            cannot be used.
        CacheError: There is no place for the cache file.
    """
    fs, files = list_caption_files(anchors)
    if not files:
        return None
    root = fsspec.core.url_to_fs(anchors)[1]
    try:
        stamps = [[name.rsplit("/", 1)[-1], file_stamp(fs, name)] for name in files]
    except OSError as cause:
        raise AnchorSetError(f"{anchors}: captions cannot be read: {cause}.") from cause
    key = hashlib.sha256(repr([FORMAT, str(fs.protocol), root, stamps]).encode("utf-8", "surrogateescape"))

    def read() -> Iterator[pa.Table]:
        return (batch for name in files for batch in caption_batches(fs, name))

    value = pa.field("caption", pa.large_string())
    return CaptionStore(mapped_file("captions", key.hexdigest(), value, read))
