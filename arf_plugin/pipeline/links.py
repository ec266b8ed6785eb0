"""Lists of links: what ``arf retrieve --urls-out`` writes and ``arf download`` reads, a parquet file, a row per pair.

``url`` and ``caption``; ``pool_id``, the pair's name in the pool; ``similarity`` to ``query_id``, the nearest query, of
which it is the ``rank``-th hit, from 1; ``sha256`` of the image's bytes at its link, where the pool knows it. A list
may also be made by hand: the first two columns are enough.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from arf_plugin.errors import PoolError
from arf_plugin.pipeline.tables import NUMBER, TEXT, TEXTS, WHOLE, read_columns, write_table

LINKS = {"url": TEXT, "caption": TEXT, "pool_id": TEXT, "similarity": NUMBER, "query_id": TEXT, "rank": WHOLE}
LINKS |= {"sha256": TEXT}
_FOUND = {name: kind for name, kind in LINKS.items() if name not in ("pool_id", "query_id")}
_FOUND |= {"image_path": TEXT, "queries": TEXTS}


def write_links(retrieved: Path, path: Path) -> int:
    """Writes the links of the pairs that the stage retrieve has chosen; returns their number.

    Raises:
        PoolError: none of them has one.
    """
    import pyarrow as pa

    listing = retrieved / "pairs.parquet"
    pairs = read_columns(listing, _FOUND, PoolError).to_pylist()
    links = [pair for pair in pairs if is_link(pair["url"])]
    if not links:
        raise PoolError(
            f"None of the {len(pairs)} pairs in {listing} has a link: expected a column 'url' of http or https "
            "addresses in the pool's metadata, as clip-retrieval (--enable_metadata True) and DataComp have it."
        )
    if len(links) < len(pairs):
        print(f"retrieve: {len(pairs) - len(links)} of {len(pairs)} pairs have no link", file=sys.stderr)
    for pair in links:
        pair["pool_id"] = pair["image_path"]
        pair["query_id"] = next(iter(pair["queries"] or ()), None)
        if not re.fullmatch("[0-9a-f]{64}", pair["sha256"] or ""):
            pair["sha256"] = None
    types = {TEXT: pa.string(), NUMBER: pa.float64(), WHOLE: pa.int64()}
    schema = pa.schema([(name, types[kind]) for name, kind in LINKS.items()])
    write_table(path, pa.Table.from_pylist(links, schema))
    return len(links)


def is_link(url: str | None) -> bool:
    """Whether it is an address of http or https; others, of files among them, are not opened."""
    try:
        parts = urlsplit(url or "")
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False
