"""Selection against plain loops that say what is meant."""

from __future__ import annotations

import numpy as np
import pytest

from arf_plugin.errors import FlagError
from arf_plugin.pipeline.selection import Hits, Selection, select


def some_hits(queries: int = 12, k: int = 6, pool: int = 40, seed: int = 0) -> Hits:
    rng = np.random.default_rng(seed)
    row = np.concatenate([rng.choice(pool, k, replace=False) for _ in range(queries)])
    similarity = rng.integers(1, 30, queries * k).astype(np.float32) / 32  # with ties
    shuffled = rng.permutation(queries * k)
    return Hits.of(np.repeat(np.arange(queries), k)[shuffled], row[shuffled], similarity[shuffled])


def as_lists(hits: Hits) -> dict[int, list[tuple[float, int]]]:
    """Per query its hits as (similarity, row), nearest first, ties by row."""
    lists: dict[int, list[tuple[float, int]]] = {}
    for query, row, similarity in zip(
        *map(np.ndarray.tolist, (hits.query, hits.row, hits.similarity)), strict=True
    ):
        lists.setdefault(query, []).append((similarity, row))
    return {query: sorted(found, key=lambda hit: (-hit[0], hit[1])) for query, found in lists.items()}


def in_rounds(hits: Hits, share: int, total: int) -> set[int]:
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
    assert set(chosen.rows.tolist()) == in_rounds(hits, share, total)
    assert (np.diff(chosen.rows) > 0).all()
    lists = as_lists(hits)
    for i, row in enumerate(chosen.rows.tolist()):
        part = slice(chosen.starts[i], chosen.starts[i + 1])
        expected = [(s, q) for q, found in lists.items() for s, r in found[:share] if r == row]
        expected.sort(key=lambda hit: (-hit[0], hit[1]))
        assert chosen.queries[part].tolist() == [query for _, query in expected]
        assert chosen.similarities[part].tolist() == [similarity for similarity, _ in expected]
        assert chosen.similarity[i] == expected[0][0]


def test_balance_serves_queries_that_similarity_would_leave_out():
    """Query 0 has the four best hits of all; three others have weak ones."""
    query = np.array([0, 0, 0, 0, 1, 2, 3])
    similarity = np.array([0.9, 0.89, 0.88, 0.87, 0.3, 0.2, 0.1], np.float32)
    hits = Hits.of(query, np.arange(7), similarity)
    assert select(hits, Selection(max_pairs=4)).rows.tolist() == [0, 4, 5, 6]
    assert select(hits, Selection(max_pairs=4, cap_by="similarity")).rows.tolist() == [0, 1, 2, 3]


def test_settings_that_make_no_sense():
    for wrong, expected in (
        ({"max_pairs": 0}, "--max-pairs 0"),
        ({"max_per_query": -1}, "--max-per-query -1"),
        ({"near_duplicates": 1.5}, "--near-duplicates 1.5"),
        ({"cap_by": "luck"}, "--cap-by luck"),
    ):
        with pytest.raises(FlagError, match=expected):
            Selection(**wrong)
