"""Caption anchors by sample id; see :mod:`arf_plugin.anchors.mapped`."""

from __future__ import annotations

import hashlib

import fsspec
import pyarrow as pa

from arf_plugin.anchors.captions import list_caption_files, read_caption_files
from arf_plugin.anchors.mapped import MappedTable, file_stamp, mapped_file
from arf_plugin.errors import AnchorSetError

FORMAT = "arf-captions-2"


class CaptionStore(MappedTable):
    """Read-only captions, memory-mapped."""

    kind, column = "captions", "caption"

    def get(self, sample_id: str) -> list[str]:
        """All captions of a sample, in the order of the parquet files; empty if there are none."""
        return [self._values[row].as_py() for row in self._rows(sample_id)]


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
    value = pa.field("caption", pa.large_string())
    return CaptionStore(
        mapped_file("captions", key.hexdigest(), value, lambda: read_caption_files(fs, files))
    )
