"""Stage retrieve (ITAR): the pool pairs that are nearest to the images of the task data.

Paper: section 3.3, image-text anchor retrieval. The paper leaves open how many neighbours are taken and whether a pair
may be chosen twice; here each image chooses its ``k`` nearest pairs, and the anchor set holds each chosen pair once
(ours, not the paper's). Queries may also be texts, such as captions or class prompts (``arf embed --captions``).

Writes ``hits/hits_NNNNN.parquet`` (query, row, similarity; best first), ``pairs.parquet`` (the chosen pool rows with
all that the stage pack needs), ``dropped.parquet`` (what was kept out of the anchors, and why) and ``retrieve.json``
(counts and settings).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from arf_plugin.anchors.files import digest, write_json
from arf_plugin.errors import PoolError
from arf_plugin.pipeline.device import pick_device
from arf_plugin.pipeline.duplicates import Dropped, Exclusion, exact_duplicates, near_duplicates
from arf_plugin.pipeline.embeddings import EmbeddingFile, Embeddings, check_unit, same_model
from arf_plugin.pipeline.knn_backends import Search
from arf_plugin.pipeline.selection import Chosen, Hits, Selection, draw, select
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import NUMBER, WHOLE, read_columns, write_table

QUERIES_NAMED = 10  # per pair, in its provenance; the hits have them all
POOL_COLUMNS = ["image_path", "id", "tar", "ext", "offset", "size", "caption", "sha256"]


class RetrieveStage(Stage):
    """Searches the pool for every query and selects pairs.

    Args:
        out: folder of hits and pairs.
        queries: embeddings of the task data.
        pool: embeddings of the pool.
        selection: see :class:`arf_plugin.pipeline.selection.Selection`.
        exclusion: images that no pair may show.
        search: how to search, and on which device to compare pairs.
    """

    name = "retrieve"
    unit = "queries"

    def __init__(
        self,
        out: Path,
        queries: Embeddings,
        pool: Embeddings,
        selection: Selection | None = None,
        *,
        exclusion: Exclusion | None = None,
        search: Search | None = None,
    ) -> None:
        super().__init__(out)
        self._queries, self._pool = queries, pool
        self._selection, self._exclusion = selection or Selection(), exclusion
        self._search = search or Search()
        same_model(queries, pool)
        if exclusion is not None:
            exclusion.check(pool)
        self._k = min(self._selection.k, pool.rows)
        self._backend = self._search.open(pool, self._k)

    def config(self) -> dict[str, Any]:
        """Search, selection, exclusion and the contents of all folders."""
        return {
            "search": self._backend.config(),
            "selection": asdict(self._selection),
            "exclude": [digest(folder.fingerprint()) for folder in self._excluded()],
            "exclude_similarity": self._exclusion.similarity if self._exclusion else None,
            "modality": [self._queries.modality, self._pool.modality],
            "queries": digest(self._queries.fingerprint()),
            "pool": digest(self._pool.fingerprint()),
        }

    def plan(self) -> list[Shard]:
        """One shard per vector file of the queries, or several where a search is slow."""
        spans = []
        for file in self._queries.files:
            step = self._backend.queries_per_shard or file.rows
            spans += [(file, start, min(start + step, file.rows)) for start in range(0, file.rows, step)]
        return [
            Shard(i, f"{i:05d}", span, float(span[2] - span[1]), span[2] - span[1])
            for i, span in enumerate(spans)
        ]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One file of hits per shard."""
        return [self.out / "hits" / f"hits_{shard.name}.parquet" for shard in shards]

    def prepare(self) -> None:
        """Makes ready for the search, and tries it with the first query."""
        file = self._queries.files[0]
        probe = np.array(file.load()[:1])
        check_unit(probe, file.vectors, file.first)
        self._backend.prepare(probe[0], self._k)

    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Searches for the queries of a file, or of a part of it."""
        import pyarrow as pa

        file: EmbeddingFile
        file, start, stop = shard.source
        rows, similarities = [], []
        for first, block in file.blocks(self._backend.queries_at_once, start, stop):
            check_unit(block, file.vectors, file.first, first - file.first)
            found = self._backend.search(block, self._k)
            rows.append(found[0])
            similarities.append(found[1])
            advance(len(block))
        query = np.repeat(np.arange(file.first + start, file.first + stop), self._k)
        table = pa.table(
            {
                "query": query_ids(self._queries, file).take(query - file.first),
                "query_row": query,
                "row": np.concatenate(rows).ravel(),
                "similarity": np.concatenate(similarities).ravel(),
            }
        )
        write_table(self.artifacts([shard])[0], table)
        return Outcome(samples=stop - start, kept=stop - start)

    def finalize(self, shards: list[Shard]) -> dict[str, Any]:
        """Selects the pairs and writes them with their provenance."""
        hits = self._hits(shards)
        kept, dropped = self._drop(hits)
        chosen = select(kept, self._selection)
        info: dict[str, Any] = {
            "pairs": len(chosen.rows),
            "queries": self._queries.rows,
            "queries_with_pairs": len(np.unique(chosen.queries)),
            "pool_rows": self._pool.rows,
            "hits": len(hits.row),
            "dropped": dict(sorted(Counter(item.reason for item in dropped).items())),
            "search": self._backend.config(),
            "selection": asdict(self._selection),
            "model": self._pool.model,
        }
        if self._selection.random:
            chosen = draw(self._random_rows(len(chosen.rows)))
        else:
            info["similarity"] = {
                "min": round(float(chosen.similarity.min()), 4),
                "mean": round(float(chosen.similarity.mean()), 4),
                "max": round(float(chosen.similarity.max()), 4),
            }
        self._write_pairs(chosen)
        self._write_dropped(dropped)
        write_json(self.out / "retrieve.json", info)
        return info

    def _hits(self, shards: list[Shard]) -> Hits:
        kinds = {"query_row": WHOLE, "row": WHOLE, "similarity": NUMBER}
        tables = []
        for path in self.artifacts(shards):
            table = read_columns(path, kinds, PoolError, required=kinds)
            query, row, similarity = columns = [table[name].to_numpy() for name in kinds]
            inside = (
                (query >= 0) & (query < self._queries.rows) & (row >= 0) & (row < self._pool.rows)
            ).all()
            if not (inside and np.isfinite(similarity).all()):  # a null has become NaN
                raise PoolError(
                    f"{path} holds hits that are no rows of the queries and the pool; it has been changed. Search "
                    "again, with --restart."
                )
            tables.append(columns)
        return Hits.of(*(np.concatenate(columns) for columns in zip(*tables, strict=True)))

    def _drop(self, hits: Hits) -> tuple[Hits, list[Dropped]]:
        """Leaves out hits below the floor, and pairs that are near excluded images or better placed pairs."""
        floor = self._selection.min_similarity
        kept = hits if floor is None else hits.where(hits.similarity >= floor)
        if len(kept.row) == 0:
            raise PoolError(f"No hit reaches --min-similarity {floor} (best: {hits.similarity.max():.3f}).")
        device = pick_device(self._search.device, self._search.rank)
        rows = kept.candidates(self._selection.cap_by)
        dropped: list[Dropped] = []

        def drop(found: list[Dropped]) -> None:
            nonlocal rows
            dropped.extend(found)
            rows = rows[~np.isin(rows, [item.row for item in found])]

        if self._exclusion is not None:
            drop(self._exclusion.near(self._pool, rows, device))
        drop(exact_duplicates(self._pool, rows))
        if self._selection.near_duplicates is not None:
            drop(near_duplicates(self._pool, rows, self._selection.near_duplicates, device))
        if len(rows) == 0:
            raise PoolError(
                f"All {len(dropped)} pairs that the queries found are near excluded images. Raise --k, or "
                "--exclude-similarity if these are not the same images."
            )
        return kept.where(np.isin(kept.row, rows)), dropped

    def _random_rows(self, count: int) -> np.ndarray:
        """Draws rows of the pool, as many as were chosen; excluded images stay out of the control, too."""
        order = np.random.default_rng(self._selection.seed).permutation(self._pool.rows)
        if self._exclusion is None:
            return order[:count]
        device = pick_device(self._search.device, self._search.rank)
        drawn = order[:0]
        while len(drawn) < count and len(order):
            some, order = order[: count - len(drawn)], order[count - len(drawn) :]
            near = [item.row for item in self._exclusion.near(self._pool, some, device)]
            drawn = np.concatenate([drawn, some[~np.isin(some, near)]])
        return drawn

    def _excluded(self) -> tuple[Embeddings, ...]:
        return self._exclusion.folders if self._exclusion else ()

    def _write_pairs(self, chosen: Chosen) -> None:
        import pyarrow as pa

        ids = pa.chunked_array([query_ids(self._queries, file) for file in self._queries.files], pa.string())
        table = self._pool.take(chosen.rows, POOL_COLUMNS)
        counts = np.diff(chosen.starts)
        named = [
            ids.take(chosen.queries[start : start + min(count, QUERIES_NAMED)]).to_pylist()
            for start, count in zip(chosen.starts[:-1], counts, strict=True)
        ]
        cosines = [
            chosen.similarities[start : start + min(count, QUERIES_NAMED)]
            for start, count in zip(chosen.starts[:-1], counts, strict=True)
        ]
        similarity = pa.array(chosen.similarity, pa.float32(), mask=np.isnan(chosen.similarity))
        table = table.append_column("row", pa.array(chosen.rows, pa.int64()))
        table = table.append_column("similarity", similarity)
        table = table.append_column("query_count", pa.array(counts, pa.int64()))
        table = table.append_column("queries", pa.array(named, pa.list_(pa.string())))
        table = table.append_column("query_similarities", pa.array(cosines, pa.list_(pa.float32())))
        write_table(self.out / "pairs.parquet", table)

    def _write_dropped(self, dropped: list[Dropped]) -> None:
        import pyarrow as pa

        ordered = sorted(dropped, key=lambda item: item.row)
        rows = np.array([item.row for item in ordered], np.int64)
        columns = {
            "row": rows,
            "image_path": self._pool.take(rows, ["image_path"])["image_path"],
            "reason": pa.array([item.reason for item in ordered], pa.string()),
            "near": pa.array([str(item.near) for item in ordered], pa.string()),
            "similarity": pa.array([item.similarity for item in ordered], pa.float32()),
        }
        write_table(self.out / "dropped.parquet", pa.table(columns))


def query_ids(queries: Embeddings, file: EmbeddingFile) -> Any:
    """Sample ids of a file of queries (an Arrow array); clip-retrieval's folders have only keys."""
    table = queries.columns(file, ["id", "image_path"])
    column = table["id"] if table["id"].null_count < file.rows else table["image_path"]
    return column.combine_chunks()
