"""Stage retrieve (ITAR): the pool pairs that are nearest to the images of the task data.

Paper: section 3.3, image-text anchor retrieval. It leaves open which of the neighbours become anchors. Ours: hits below
a floor are left out, and so are pairs that say the same twice and pairs that show evaluation images, which are looked
for among the hits only (:mod:`arf_plugin.pipeline.near`). Each query chooses its nearest pairs, up to a cap; the anchor
set holds each chosen pair once. A cap on the total is filled in rounds, so that every query has its nearest pair before
any has its second. Queries may also be texts, such as captions or class prompts (``arf embed --captions``).

Writes ``hits/hits_NNNNN.parquet`` (query, row, similarity; best first), ``pairs.parquet`` (the chosen pool rows with
all that the stage pack needs), ``dropped.parquet`` (what was kept out of the anchors, and why) and ``retrieve.json``
(counts and settings).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.errors import FlagError, PoolError
from arf_plugin.files import digest, write_json
from arf_plugin.pipeline.embeddings import EmbeddingFile, Embeddings, same_model
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.knn_backends import Search
from arf_plugin.pipeline.near import Dropped, Exclusion, exact_duplicates, near_duplicates
from arf_plugin.pipeline.replies import Replies
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import NUMBER, WHOLE, read_columns, write_table

if TYPE_CHECKING:
    import pandas as pd

QUERIES_NAMED = 10  # per pair, in its provenance; the hits have them all
POOL_COLUMNS = ["image_path", "id", "tar", "ext", "offset", "size", "caption", "sha256", "url"]


@dataclass(frozen=True)
class Selection:
    """Which hits become pair anchors: the flags of ``arf retrieve``, by name.

    Attributes:
        k: neighbours per query that are searched for.
        min_similarity: hits below are dropped; None keeps all.
        max_pairs: pairs in all; None keeps all.
        random, seed: draws as many pairs at random from the pool instead, as a control.
        max_per_query: pairs that a query may choose, of those left by the floor, exclusion and duplicates.
        cap_by: how ``max_pairs`` is filled: ``queries`` in rounds, every query's nearest pair first; ``similarity``
            with the most similar pairs, whichever queries they belong to.
        near_duplicates: pairs whose image is at least this similar (cosine) to that of a better placed pair are
            dropped; None drops exact duplicates only.
    """

    k: int = 10
    min_similarity: float | None = None
    max_pairs: int | None = None
    random: bool = False
    seed: int = 0
    max_per_query: int | None = None
    cap_by: str = "queries"
    near_duplicates: float | None = None

    def __post_init__(self) -> None:
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise FlagError(f"--min-similarity {self.min_similarity}: a cosine lies between -1 and 1.")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise FlagError(f"--near-duplicates {self.near_duplicates}: expected a cosine above 0, up to 1.")


def ordered(hits: pd.DataFrame) -> pd.DataFrame:
    """Hits of a search, of columns query, row and similarity: by query, nearest first; ties go to the lower row."""
    return hits.sort_values(["query", "similarity", "row"], ascending=[True, False, True])


def candidates(hits: pd.DataFrame, cap_by: str = "queries") -> np.ndarray:
    """The pool rows of hits in order, each once, those to be taken first in front."""
    ranked = hits.assign(rank=hits.groupby("query").cumcount() if cap_by == "queries" else 0)
    rows: np.ndarray = ranked.sort_values(["rank", "similarity", "row"], ascending=[True, False, True])[
        "row"
    ].unique()
    return rows


def select(hits: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """The hits that choose a pair, of hits in order: by pool row, nearest query first.

    The floor, exclusion and duplicates come before.
    """
    if selection.max_per_query is not None:
        hits = hits[hits.groupby("query").cumcount() < selection.max_per_query]
    taken = candidates(hits, selection.cap_by)[: selection.max_pairs]
    return hits[hits["row"].isin(taken)].sort_values(
        ["row", "similarity", "query"], ascending=[True, False, True]
    )


@dataclass
class RetrieveStage(Stage):
    """Searches the pool for every query, of the task data, and selects pairs; none may show an excluded image."""

    queries: Embeddings
    pool: Embeddings
    selection: Selection = field(default_factory=Selection)
    exclusion: Exclusion | None = None
    search: Search = field(default_factory=Search)
    name = "retrieve"
    unit = "queries"

    def __post_init__(self) -> None:
        same_model(self.queries, self.pool)
        chosen = self.selection
        if isinstance(self.pool, Replies) and (self.exclusion or chosen.random or chosen.near_duplicates):
            raise FlagError(
                "--exclude, --near-duplicates and --random need the pool's vectors: name them with --pool."
            )
        if self.exclusion is not None:
            self.exclusion.check(self.pool)
        self._k = min(self.selection.k, self.pool.rows)
        self._backend = self.search.open(self.pool, self._k)

    def config(self) -> dict[str, Any]:
        """Search, selection, exclusion and the contents of all folders."""
        excluded = self.exclusion.folders if self.exclusion else ()
        return {
            "search": self._backend.config(),
            "selection": asdict(self.selection),
            "exclude": [digest(folder.fingerprint()) for folder in excluded],
            "exclude_similarity": self.exclusion.similarity if self.exclusion else None,
            "modality": [self.queries.modality, self.pool.modality],
            "queries": digest(self.queries.fingerprint()),
            "pool": digest(self.pool.fingerprint()),
        }

    def plan(self) -> list[Shard]:
        """One shard per vector file of the queries, or several where a search is slow."""
        spans = []
        for file in self.queries.files:
            step = self._backend.queries_per_shard or file.rows
            spans += [(file, start, min(start + step, file.rows)) for start in range(0, file.rows, step)]
        return [Shard.counted(i, span, span[2] - span[1]) for i, span in enumerate(spans)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One file of hits per shard."""
        return [self.out / "hits" / f"hits_{shard.name}.parquet" for shard in shards]

    def prepare(self, execution: Execution) -> None:
        """Makes ready for the search, and tries it with the first query."""
        _, probe = next(self.queries.files[0].blocks(1, unit=True))
        self._backend.prepare(probe[0], execution)

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Searches for the queries of a file, or of a part of it."""
        import pyarrow as pa

        file: EmbeddingFile
        file, start, stop = shard.source
        found, said = [], []
        for _, block in file.blocks(self._backend.queries_at_once, start, stop, unit=True):
            found.append(self._backend.search(block))
            said.append(self._backend.described(found[-1][0].ravel()))
            advance(len(block))
        rows, similarities = (np.concatenate(parts).ravel() for parts in zip(*found, strict=True))
        query = np.repeat(np.arange(file.first + start, file.first + stop), self._k)
        table = pa.table(
            {
                "query": self._ids(file).take(query - file.first),
                "query_row": query,
                "row": rows,
                "similarity": similarities,
            }
        )
        for name in said[0]:
            column = pa.array([value for columns in said for value in columns[name]], pa.string())
            table = table.append_column(name, column)
        write_table(self.artifacts([shard])[0], table)
        return Outcome(samples=stop - start, kept=stop - start)

    def fetches(self) -> str | None:
        """A service."""
        how = self.search
        return f"{how.service_url} would be asked for neighbours" if how.backend == "service" else None

    def attempt(self, shard: Shard, execution: Execution, advance: Callable[[float], object]) -> None:
        """Searches a part of the pool for the first queries."""
        file, start, stop = shard.source
        _, block = next(file.blocks(self._backend.queries_at_once, start, stop, unit=True))
        self._backend.begin(block[0], execution)
        advance(0)
        advance(len(block) * self._backend.attempt(block))

    def disk(self, shards: list[Shard]) -> float | None:
        """The hits."""
        return 24.0 * self._k * self.queries.rows

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Selects the pairs and writes them with their provenance."""
        hits = self._hits(shards)
        kept, dropped = self._drop(hits, execution)
        chosen = select(kept, self.selection)
        rows = chosen["row"].unique()
        info: dict[str, Any] = {
            "pairs": len(rows),
            "queries": self.queries.rows,
            "queries_with_pairs": chosen["query"].nunique(),
            "pool_rows": None if isinstance(self.pool, Replies) else self.pool.rows,
            "hits": len(hits),
            "dropped": dict(sorted(Counter(item.reason for item in dropped).items())),
            "search": self._backend.config(),
            "selection": asdict(self.selection),
            "model": self.pool.model,
        }
        if self.selection.random:
            rows, chosen = np.sort(self._random_rows(len(rows), execution)), chosen[:0]
        else:
            found = chosen.groupby("row")["similarity"].first().to_numpy()
            summary = {"min": found.min(), "mean": found.mean(), "max": found.max()}
            info["similarity"] = {name: round(float(value), 4) for name, value in summary.items()}
        self._write_pairs(rows, chosen)
        self._write_dropped(dropped)
        write_json(self.out / "retrieve.json", info)
        return info

    def _hits(self, shards: list[Shard]) -> pd.DataFrame:
        import pandas as pd

        kinds = {"query_row": WHOLE, "row": WHOLE, "similarity": NUMBER}
        frames = []
        for path in self.artifacts(shards):
            hits = read_columns(path, kinds, PoolError, required=kinds).to_pandas()
            inside = hits["query_row"].between(0, self.queries.rows - 1) & hits["row"].between(
                0, self.pool.rows - 1
            )
            if not (inside & np.isfinite(hits["similarity"])).all():  # a null has become NaN
                raise PoolError(
                    f"{path} holds hits that are no rows of the queries and the pool; it has been changed. Search "
                    "again, with --restart."
                )
            frames.append(hits.rename(columns={"query_row": "query"}))
        hits = ordered(pd.concat(frames, ignore_index=True))
        return hits.assign(rank=hits.groupby("query").cumcount() + 1)

    def _drop(self, hits: pd.DataFrame, execution: Execution) -> tuple[pd.DataFrame, list[Dropped]]:
        """Leaves out hits below the floor, and pairs that are near excluded images or better placed pairs."""
        floor = self.selection.min_similarity
        kept = hits if floor is None else hits[hits["similarity"] >= floor]
        if len(kept) == 0:
            raise PoolError(
                f"No hit reaches --min-similarity {floor} (best: {hits['similarity'].max():.3f})."
            )
        device = execution.torch_device()
        rows = candidates(kept, self.selection.cap_by)
        dropped: list[Dropped] = []

        def drop(found: list[Dropped]) -> None:
            nonlocal rows
            dropped.extend(found)
            rows = rows[~np.isin(rows, [item.row for item in found])]

        if self.exclusion is not None:
            drop(self.exclusion.near(self.pool, rows, device))
        drop(exact_duplicates(self.pool, rows))
        if self.selection.near_duplicates is not None:
            drop(near_duplicates(self.pool, rows, self.selection.near_duplicates, device))
        if len(rows) == 0:
            raise PoolError(
                f"All {len(dropped)} pairs that the queries found are near excluded images. Raise --k, or "
                "--exclude-similarity if these are not the same images."
            )
        return kept[kept["row"].isin(rows)], dropped

    def _random_rows(self, count: int, execution: Execution) -> np.ndarray:
        """Draws rows of the pool, as many as were chosen; excluded images stay out of the control, too."""
        order = np.random.default_rng(self.selection.seed).permutation(self.pool.rows)
        if self.exclusion is None:
            return order[:count]
        device = execution.torch_device()
        drawn = order[:0]
        while len(drawn) < count and len(order):
            some, order = order[: count - len(drawn)], order[count - len(drawn) :]
            near = [item.row for item in self.exclusion.near(self.pool, some, device)]
            drawn = np.concatenate([drawn, some[~np.isin(some, near)]])
        return drawn

    def _write_pairs(self, rows: np.ndarray, chosen: pd.DataFrame) -> None:
        """Writes pool rows, ascending, with the hits that have chosen them, if any."""
        import pyarrow as pa

        ids = pa.chunked_array([self._ids(file) for file in self.queries.files], pa.string())
        table = self.pool.take(rows, POOL_COLUMNS)
        by_row = chosen.groupby("row")
        counts = by_row.size().reindex(rows, fill_value=0)
        named = chosen[by_row.cumcount() < QUERIES_NAMED]
        ends = pa.array(np.r_[0, counts.clip(upper=QUERIES_NAMED).cumsum()], pa.int32())
        queries = ids.take(pa.array(named["query"], pa.int64())).combine_chunks()
        cosines = pa.array(named["similarity"], pa.float32())
        for name, column in {
            "row": pa.array(rows, pa.int64()),
            "similarity": pa.array(by_row["similarity"].first().reindex(rows), pa.float32()),
            "rank": pa.array(by_row["rank"].first().reindex(rows), pa.int64(), from_pandas=True),
            "query_count": pa.array(counts, pa.int64()),
            "queries": pa.ListArray.from_arrays(ends, queries),
            "query_similarities": pa.ListArray.from_arrays(ends, cosines),
        }.items():
            table = table.append_column(name, column)
        write_table(self.out / "pairs.parquet", table)

    def _write_dropped(self, dropped: list[Dropped]) -> None:
        import pyarrow as pa

        ordered = sorted(dropped, key=lambda item: item.row)
        rows = np.array([item.row for item in ordered], np.int64)
        columns = {
            "row": rows,
            "image_path": self.pool.take(rows, ["image_path"])["image_path"],
            "reason": pa.array([item.reason for item in ordered], pa.string()),
            "near": pa.array([str(item.near) for item in ordered], pa.string()),
            "similarity": pa.array([item.similarity for item in ordered], pa.float32()),
        }
        write_table(self.out / "dropped.parquet", pa.table(columns))

    def _ids(self, file: EmbeddingFile) -> Any:
        """Sample ids of a file of queries (an Arrow array); clip-retrieval's folders have only keys."""
        table = self.queries.columns(file, ["id", "image_path"])
        return table["id" if table["id"].null_count < file.rows else "image_path"].combine_chunks()
