"""A pool that is known only by what a clip-retrieval service has said of its hits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.errors import PoolError
from arf_plugin.files import list_files
from arf_plugin.pipeline.embeddings import METADATA, Embeddings
from arf_plugin.pipeline.tables import TEXT, WHOLE, read_columns

if TYPE_CHECKING:
    import pyarrow as pa

# Columns of the hits, by the name that the client has for what they hold.
REPLY_COLUMNS = {"image_path": "key", "caption": "caption", "url": "url", "sha256": "sha256"}


@dataclass(frozen=True)
class Replies(Embeddings):
    """The hits in ``folder``/hits of a stage retrieve; a row is one of the service's index."""

    queries: Embeddings | None = None
    rows = (1 << 62) + 1  # the client's largest, and 0

    @property
    def dimension(self) -> int:
        """That of the queries: the service answers to no other."""
        assert self.queries is not None
        return self.queries.dimension

    @property
    def model(self) -> dict[str, Any] | None:
        """Not known."""
        return None

    @cached_property
    def _said(self) -> pa.Table:
        """What was said of each row, by row."""
        import pyarrow as pa

        kinds = {"row": WHOLE} | dict.fromkeys(REPLY_COLUMNS, TEXT)
        tables = [
            read_columns(path, kinds, PoolError, kinds)
            for path in list_files(self.folder / "hits", ".parquet")
        ]
        hits = pa.concat_tables(tables)
        _, first = np.unique(hits["row"].to_numpy(), return_index=True)
        return hits.take(first)

    def take(self, rows: np.ndarray, names: list[str]) -> pa.Table:
        """See the base class."""
        import pyarrow as pa

        found = self._said.take(np.searchsorted(self._said["row"].to_numpy(), rows))
        types = {TEXT: pa.string(), WHOLE: pa.int64()}
        others = {
            name: pa.nulls(len(rows), types[METADATA[name]]) for name in names if name not in REPLY_COLUMNS
        }
        return pa.table({name: found[name] if name in REPLY_COLUMNS else others[name] for name in names})

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Digests [n, 32] in the place of vectors: of the links, which tell images apart here."""
        ascending, back = np.unique(rows, return_inverse=True)
        urls = self.take(ascending, ["url"])["url"].to_pylist()
        digests = [hashlib.sha256((url or "").encode()).digest() for url in urls]
        return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)[back]

    def fingerprint(self) -> list[Any]:
        """Nothing is known of the pool beforehand."""
        return []
