"""Which hits of a search become pair anchors.

The paper leaves this open (section 3.3). Ours: hits below a floor are left out; each query chooses its nearest pairs,
up to a cap; a cap on the total is filled in rounds, so that every query has its nearest pair before any has its second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arf_plugin.errors import FlagError

CAPS = ("queries", "similarity")


@dataclass(frozen=True)
class Selection:
    """Which hits become pair anchors.

    Attributes:
        k: neighbours per query that are searched for.
        min_similarity: hits below are dropped; None keeps all.
        max_pairs: pairs in all; None keeps all.
        random: draws as many pairs at random from the pool instead, as a control.
        seed: of that draw.
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
        for flag, count in (
            ("k", self.k),
            ("max-pairs", self.max_pairs),
            ("max-per-query", self.max_per_query),
        ):
            if count is not None and count < 1:
                raise FlagError(f"--{flag} {count}: expected at least 1.")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise FlagError(f"--min-similarity {self.min_similarity}: a cosine lies between -1 and 1.")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise FlagError(f"--near-duplicates {self.near_duplicates}: expected a cosine above 0, up to 1.")
        if self.cap_by not in CAPS:
            raise FlagError(f"--cap-by {self.cap_by}: expected one of {', '.join(CAPS)}.")


@dataclass(frozen=True)
class Hits:
    """Hits of a search, in order of queries, nearest first; ties go to the lower row.

    Attributes:
        query: [hits] query rows.
        row: [hits] pool rows.
        similarity: [hits] their cosines.
    """

    query: np.ndarray
    row: np.ndarray
    similarity: np.ndarray

    @classmethod
    def of(cls, query: np.ndarray, row: np.ndarray, similarity: np.ndarray) -> Hits:
        """Hits in any order."""
        order = np.lexsort((row, -similarity, query))
        return cls(query[order], row[order], similarity[order])

    def where(self, keep: np.ndarray) -> Hits:
        """The hits that a mask [hits] marks."""
        return Hits(self.query[keep], self.row[keep], self.similarity[keep])

    def ranks(self) -> np.ndarray:
        """Rank [hits] of each hit among those of its query, from 0."""
        if len(self.query) == 0:
            return np.zeros(0, np.int64)
        starts = np.flatnonzero(np.r_[True, self.query[1:] != self.query[:-1]])
        counts = np.diff(np.r_[starts, len(self.query)])
        return np.arange(len(self.query)) - np.repeat(starts, counts)

    def candidates(self, cap_by: str = "queries") -> np.ndarray:
        """The pool rows that were hit, each once, those to be taken first in front."""
        best = self.similarity if cap_by == "similarity" else -self.ranks()
        order = np.lexsort((self.row, -self.similarity, -best))
        rows = self.row[order]
        _, first = np.unique(rows, return_index=True)
        return rows[np.sort(first)]


@dataclass(frozen=True)
class Chosen:
    """Selected pool rows, ascending, with the queries that chose them.

    Attributes:
        rows: [n] pool rows.
        similarity: [n] similarity to the nearest query.
        starts: [n + 1]; the queries of row i are ``queries[starts[i]:starts[i + 1]]``, nearest first.
        queries: query rows.
        similarities: those of ``queries``.
    """

    rows: np.ndarray
    similarity: np.ndarray
    starts: np.ndarray
    queries: np.ndarray
    similarities: np.ndarray


def select(hits: Hits, selection: Selection) -> Chosen:
    """Selects unique pool rows from hits; the floor, exclusion and duplicates come before."""
    if selection.max_per_query is not None:
        hits = hits.where(hits.ranks() < selection.max_per_query)
    taken = hits.candidates(selection.cap_by)[: selection.max_pairs]
    hits = hits.where(np.isin(hits.row, taken))
    order = np.lexsort((hits.query, -hits.similarity, hits.row))
    rows, starts = np.unique(hits.row[order], return_index=True)
    similarities = hits.similarity[order]
    return Chosen(rows, similarities[starts], np.r_[starts, len(order)], hits.query[order], similarities)


def draw(rows: np.ndarray) -> Chosen:
    """Rows [n] that no query has chosen, as a control."""
    nothing, none = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return Chosen(
        np.sort(rows),
        np.full(len(rows), np.nan, np.float32),
        np.zeros(len(rows) + 1, np.int64),
        nothing,
        none,
    )
