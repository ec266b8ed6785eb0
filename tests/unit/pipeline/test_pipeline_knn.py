"""Exact search against a plain loop, and its independence of blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.building import unit_vectors

from arf_plugin.errors import FlagError
from arf_plugin.pipeline.knn import block_sizes, exact_search, top_k

CPU = torch.device("cpu")


def in_blocks(vectors: np.ndarray, size: int):
    return ((start, vectors[start : start + size]) for start in range(0, len(vectors), size))


def by_loop(queries: np.ndarray, pool: np.ndarray, k: int) -> list[list[int]]:
    """Rows by descending product, ties by ascending row."""
    found = []
    for query in queries.astype(np.float32):
        scores = [float(np.dot(query, row)) for row in pool.astype(np.float32)]
        found.append(sorted(range(len(pool)), key=lambda row: (-scores[row], row))[:k])
    return found


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_agrees_with_a_plain_loop(block: int):
    queries, pool = unit_vectors(20, 16, seed=0), unit_vectors(300, 16, seed=1)
    rows, similarities = exact_search(queries, in_blocks(pool, block), 5, CPU)
    assert rows.tolist() == by_loop(queries, pool, 5)
    expected = np.take_along_axis(queries.astype(np.float32) @ pool.astype(np.float32).T, rows, axis=1)
    np.testing.assert_allclose(similarities, expected, atol=1e-6)
    assert (np.diff(similarities, axis=1) <= 0).all()


@pytest.mark.parametrize("block", [3, 10, 16, 100])
def test_ties_go_to_the_lower_row_in_every_blocking(block: int):
    basis = np.eye(4, dtype=np.float16)
    pool = np.concatenate(
        [basis[[1]], basis[[0]].repeat(40, axis=0), basis[[2]], basis[[0]].repeat(8, axis=0)]
    )
    rows, similarities = exact_search(basis[:2], in_blocks(pool, block), 6, CPU)
    assert rows[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert rows[1].tolist() == [0, 1, 2, 3, 4, 5]  # one match, then zeros in order
    assert similarities[0].tolist() == [1.0] * 6


def test_k_beyond_the_pool_returns_the_whole_pool():
    queries, pool = unit_vectors(2, 8, seed=0), unit_vectors(5, 8, seed=1)
    rows, _ = exact_search(queries, in_blocks(pool, 2), 50, CPU)
    assert sorted(rows[0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_chunks_find_what_a_full_sort_finds(k: int):
    """Wide rows are searched by chunks; few distinct scores make ties everywhere, also across chunks."""
    for seed, distinct in ((0, 4), (1, 50), (2, 10**6)):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, distinct, (20, 3001), generator=generator).float()
        expected_values, expected = scores.sort(dim=1, descending=True, stable=True)
        values, columns = top_k(scores, k)
        assert columns.tolist() == expected[:, :k].tolist()
        assert values.tolist() == expected_values[:, :k].tolist()


def test_blocks_fit_the_memory_and_too_little_is_refused():
    assert block_sizes(1 << 34, 512, 10) == (4096, 16384)
    small = block_sizes(1 << 26, 512, 10)
    assert small[0] * small[1] * 4 < 1 << 26 and small < (4096, 16384)
    with pytest.raises(FlagError, match=r"--memory 1M .* expected at least \d+M"):
        block_sizes(1 << 20, 512, 10)
