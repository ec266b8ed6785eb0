"""Selection against plain loops that say what is meant."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from arf_plugin.errors import FlagError
from arf_plugin.pipeline.retrieve import Selection, ordered, select


def frame(query: np.ndarray, row: np.ndarray, similarity: np.ndarray) -> pd.DataFrame:
    return ordered(pd.DataFrame({"query": query, "row": row, "similarity": similarity}))


def some_hits(queries: int = 12, k: int = 6, pool: int = 40, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    row = np.concatenate([rng.choice(pool, k, replace=False) for _ in range(queries)])
    similarity = rng.integers(1, 30, queries * k).astype(np.float32) / 32  # with ties
    shuffled = rng.permutation(queries * k)
    return frame(np.repeat(np.arange(queries), k)[shuffled], row[shuffled], similarity[shuffled])


def as_lists(hits: pd.DataFrame) -> dict[int, list[tuple[float, int]]]:
    """Per query its hits as (similarity, row), nearest first, ties by row."""
    lists: dict[int, list[tuple[float, int]]] = {}
    for query, row, similarity in hits.itertuples(index=False):
        lists.setdefault(query, []).append((similarity, row))
    return {query: sorted(found, key=lambda hit: (-hit[0], hit[1])) for query, found in lists.items()}


def in_rounds(hits: pd.DataFrame, share: int, total: int) -> set[int]:
    """Every query chooses its nearest, then every query its second, and so on until there are enough."""
    taken: set[int] = set()
    lists = as_lists(hits)
    for rank in range(share):
        offers = sorted({(-found[rank][0], found[rank][1]) for found in lists.values() if rank < len(found)})
        for _, row in offers:
            if len(taken) < total:
                taken.add(row)
    return taken


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("share", "total"), [(6, 1000), (2, 1000), (6, 5), (6, 12), (3, 17), (1, 3)])
def test_caps_are_filled_in_rounds(share: int, total: int, seed: int):
    hits = some_hits(seed=seed)
    chosen = select(hits, Selection(k=6, max_per_query=share, max_pairs=total))
    assert set(chosen["row"]) == in_rounds(hits, share, total)
    assert chosen["row"].is_monotonic_increasing
    lists = as_lists(hits)
    for row, part in chosen.groupby("row"):
        expected = [(s, q) for q, found in lists.items() for s, r in found[:share] if r == row]
        expected.sort(key=lambda hit: (-hit[0], hit[1]))
        assert list(zip(part["similarity"], part["query"], strict=True)) == expected


def test_balance_serves_queries_that_similarity_would_leave_out():
    """Query 0 has the four best hits of all; three others have weak ones."""
    query = np.array([0, 0, 0, 0, 1, 2, 3])
    similarity = np.array([0.9, 0.89, 0.88, 0.87, 0.3, 0.2, 0.1], np.float32)
    hits = frame(query, np.arange(7), similarity)
    assert select(hits, Selection(max_pairs=4))["row"].tolist() == [0, 4, 5, 6]
    assert select(hits, Selection(max_pairs=4, cap_by="similarity"))["row"].tolist() == [0, 1, 2, 3]


def test_settings_that_make_no_sense():
    for wrong, expected in (
        ({"near_duplicates": 1.5}, "--near-duplicates 1.5"),
        ({"min_similarity": -2}, "--min-similarity -2"),
    ):
        with pytest.raises(FlagError, match=expected):
            Selection(**wrong)
