"""Stage retrieve (ITAR): the pool pairs that are nearest to the images of the task data.

Paper: section 3.3, image-text anchor retrieval. The paper leaves open how many neighbours are taken and whether a pair
may be chosen twice; here each image chooses its ``k`` nearest pairs, and the anchor set holds each chosen pair once
(ours, not the paper's).

Writes ``hits/hits_NNNNN.parquet`` (query, row, similarity; best first), ``pairs.parquet`` (the chosen pool rows with
all that the stage pack needs) and ``retrieve.json`` (counts and settings).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arf_plugin.anchors.files import digest, replacing, write_json
from arf_plugin.errors import FlagError, PoolError
from arf_plugin.pipeline.device import pick_device
from arf_plugin.pipeline.embeddings import EmbeddingFile, Embeddings, check_unit
from arf_plugin.pipeline.knn import exact_search
from arf_plugin.pipeline.stage import Outcome, Shard, Stage

QUERY_BLOCK = 2048
POOL_BLOCK = 16384
QUERIES_NAMED = 10  # per pair, in its provenance; the hits have them all
POOL_COLUMNS = ["image_path", "id", "tar", "ext", "offset", "size", "caption"]


@dataclass(frozen=True)
class Selection:
    """Which hits become pair anchors.

    Attributes:
        k: neighbours per query.
        min_similarity: hits below are dropped; None keeps all.
        max_pairs: keeps the most similar pairs if there are more.
        random: draws as many pairs at random from the pool instead, as a control.
        seed: of that draw.
    """

    k: int = 10
    min_similarity: float | None = None
    max_pairs: int | None = None
    random: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise FlagError(f"--k {self.k}: expected at least 1 neighbour per query.")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise FlagError(f"--max-pairs {self.max_pairs}: expected at least 1.")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise FlagError(f"--min-similarity {self.min_similarity}: a cosine lies between -1 and 1.")


class RetrieveStage(Stage):
    """Searches the pool for every query and selects pairs.

    Args:
        out: folder of hits and pairs.
        queries: embeddings of the task data.
        pool: embeddings of the pool.
        selection: see :class:`Selection`.
        device: see :mod:`arf_plugin.pipeline.device`.
        rank: this process's rank, which picks its GPU.
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
        device: str = "auto",
        rank: int = 0,
    ) -> None:
        super().__init__(out)
        self._queries, self._pool = queries, pool
        self._selection = selection or Selection()
        self._device_name, self._rank = device, rank
        if queries.dimension != pool.dimension:
            raise PoolError(
                f"{queries.folder} has vectors of dimension {queries.dimension}, {pool.folder} of {pool.dimension}. "
                "Embed both with the same model."
            )
        if queries.model and pool.model and queries.model != pool.model:
            raise PoolError(
                f"{queries.folder} was embedded with {queries.model}, {pool.folder} with {pool.model}. "
                "Embed both with the same model and weights."
            )

    def config(self) -> dict[str, Any]:
        """Selection and the contents of both folders."""
        return {
            "selection": asdict(self._selection),
            "modality": [self._queries.modality, self._pool.modality],
            "queries": digest(self._queries.fingerprint()),
            "pool": digest(self._pool.fingerprint()),
        }

    def plan(self) -> list[Shard]:
        """One shard per vector file of the queries."""
        return [
            Shard(i, f"{i:05d}", file, float(file.rows), file.rows)
            for i, file in enumerate(self._queries.files)
        ]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One file of hits per shard."""
        return [self.out / "hits" / f"hits_{shard.name}.parquet" for shard in shards]

    def prepare(self) -> None:
        """Picks the device and checks all vectors of the pool."""
        self._device = pick_device(self._device_name, self._rank)
        for file in self._pool.files:
            check_unit(file.load(), file.vectors, file.first)

    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Searches for the queries of one file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file: EmbeddingFile = shard.source
        vectors = file.load()
        check_unit(vectors, file.vectors, file.first)
        rows, similarities = [], []
        for start in range(0, file.rows, QUERY_BLOCK):
            block = vectors[start : start + QUERY_BLOCK]
            found = exact_search(block, self._pool_blocks(), self._selection.k, self._device)
            rows.append(found[0])
            similarities.append(found[1])
            advance(len(block))
        k = rows[0].shape[1]
        query = np.repeat(np.arange(file.first, file.first + file.rows), k)
        table = pa.table(
            {
                "query": query_ids(self._queries, file).take(query - file.first),
                "query_row": query,
                "row": np.concatenate(rows).ravel(),
                "similarity": np.concatenate(similarities).ravel(),
            }
        )
        with replacing(self.artifacts([shard])[0]) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        return Outcome(samples=file.rows, kept=file.rows)

    def finalize(self, shards: list[Shard]) -> dict[str, Any]:
        """Selects the pairs and writes them with their provenance."""
        import pyarrow.parquet as pq

        hits = [pq.read_table(path) for path in self.artifacts(shards)]
        query = np.concatenate([table["query_row"].to_numpy() for table in hits])
        row = np.concatenate([table["row"].to_numpy() for table in hits])
        similarity = np.concatenate([table["similarity"].to_numpy() for table in hits])
        chosen = select(query, row, similarity, self._selection)
        info: dict[str, Any] = {
            "pairs": len(chosen.rows),
            "queries": self._queries.rows,
            "pool_rows": self._pool.rows,
            "hits": len(row),
            "selection": asdict(self._selection),
            "model": self._pool.model,
        }
        if len(chosen.rows) == 0:
            raise PoolError(
                f"No hit reaches --min-similarity {self._selection.min_similarity} (best: {similarity.max():.3f})."
            )
        if self._selection.random:
            rng = np.random.default_rng(self._selection.seed)
            drawn = np.sort(rng.choice(self._pool.rows, size=len(chosen.rows), replace=False))
            empty = np.zeros(len(drawn) + 1, dtype=np.int64)
            chosen = Chosen(drawn, np.full(len(drawn), np.nan, np.float32), empty, np.zeros(0, np.int64))
        else:
            info["similarity"] = {
                "min": round(float(chosen.similarity.min()), 4),
                "mean": round(float(chosen.similarity.mean()), 4),
                "max": round(float(chosen.similarity.max()), 4),
            }
        self._write_pairs(chosen)
        write_json(self.out / "retrieve.json", info)
        return info

    def _pool_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for file in self._pool.files:
            vectors = file.load()
            for start in range(0, file.rows, POOL_BLOCK):
                yield file.first + start, vectors[start : start + POOL_BLOCK]

    def _write_pairs(self, chosen: Chosen) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        ids = pa.chunked_array([query_ids(self._queries, file) for file in self._queries.files], pa.string())
        tables = []
        for file in self._pool.files:
            low, high = np.searchsorted(chosen.rows, [file.first, file.first + file.rows])
            if low < high:
                tables.append(self._pool.columns(file, POOL_COLUMNS).take(chosen.rows[low:high] - file.first))
        table = pa.concat_tables(tables, promote_options="permissive")
        counts = np.diff(chosen.starts)
        named = [
            ids.take(chosen.queries[start : start + min(count, QUERIES_NAMED)]).to_pylist()
            for start, count in zip(chosen.starts[:-1], counts, strict=True)
        ]
        similarity = pa.array(chosen.similarity, pa.float32(), mask=np.isnan(chosen.similarity))
        table = table.append_column("row", pa.array(chosen.rows, pa.int64()))
        table = table.append_column("similarity", similarity)
        table = table.append_column("query_count", pa.array(counts, pa.int64()))
        table = table.append_column("queries", pa.array(named, pa.list_(pa.string())))
        with replacing(self.out / "pairs.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")


@dataclass(frozen=True)
class Chosen:
    """Selected pool rows, ascending, with the queries that chose them.

    Attributes:
        rows: [n] pool rows.
        similarity: [n] similarity to the nearest query.
        starts: [n + 1]; the queries of row i are ``queries[starts[i]:starts[i + 1]]``, nearest first.
        queries: query rows.
    """

    rows: np.ndarray
    similarity: np.ndarray
    starts: np.ndarray
    queries: np.ndarray


def select(query: np.ndarray, row: np.ndarray, similarity: np.ndarray, selection: Selection) -> Chosen:
    """Selects unique pool rows from hits.

    Args:
        query: [hits] query rows.
        row: [hits] pool rows.
        similarity: [hits] their cosines.
        selection: floor and cap. The cap keeps the most similar rows; ties go to the lower row.
    """
    if selection.min_similarity is not None:
        keep = similarity >= selection.min_similarity
        query, row, similarity = query[keep], row[keep], similarity[keep]
    order = np.lexsort((query, -similarity, row))
    query, row, similarity = query[order], row[order], similarity[order]
    rows, starts, counts = np.unique(row, return_index=True, return_counts=True)
    ends, best = starts + counts, similarity[starts]
    if selection.max_pairs is not None and len(rows) > selection.max_pairs:
        kept = np.sort(np.lexsort((rows, -best))[: selection.max_pairs])
        rows, starts, ends, best = rows[kept], starts[kept], ends[kept], best[kept]
    spans = [query[start:end] for start, end in zip(starts, ends, strict=True)]
    return Chosen(
        rows,
        best,
        np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64),
        np.concatenate(spans) if spans else query[:0],
    )


def query_ids(queries: Embeddings, file: EmbeddingFile) -> Any:
    """Sample ids of a file of queries (an Arrow array); clip-retrieval's folders have only keys."""
    table = queries.columns(file, ["id", "image_path"])
    column = table["id"] if table["id"].null_count < file.rows else table["image_path"]
    return column.combine_chunks()
