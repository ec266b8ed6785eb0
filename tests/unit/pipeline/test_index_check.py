"""A faiss index is believed only as far as its ids are the pool's rows and its vectors the pool's."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from support.building import unit_vectors, write_embeddings

from arf_plugin.errors import PoolError
from arf_plugin.pipeline.embeddings import Embeddings
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.index import (
    SAMPLED,
    check_found,
    check_row_ids,
    check_vectors,
    open_index,
    reconstruct,
)
from arf_plugin.pipeline.knn_backends import Search

faiss = pytest.importorskip("faiss")
ROWS, DIMENSION = 3000, 16


def seconds(kind: str):
    """A kind whose training takes seconds."""
    return pytest.param(kind, marks=pytest.mark.process)


KINDS = ["Flat", "HNSW16", "IVF8,Flat", "PQ4x4", "IVF8,PQ4x4", seconds("OPQ4_16,IVF8,PQ4x4"), "SQ8", "PCA8,Flat",
         "SQfp16", "HNSW16_SQ8", "PQ4x4fs", "IVF8,PQ4x4fs", "IVF8,Flat,RFlat",
         seconds("PQ4x4,RFlat"), "RaBitQ"]  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    folder = tmp_path_factory.mktemp("pool")
    write_embeddings(folder, unit_vectors(ROWS, DIMENSION, seed=1), parts=5)
    return Embeddings(folder)


@functools.cache
def trained(kind: str):
    """An empty index; training takes most of the time."""
    index = faiss.index_factory(DIMENSION, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(unit_vectors(1000, DIMENSION, seed=1).astype(np.float32))
    return index


def built(kind: str, vectors: np.ndarray, ids: np.ndarray | None = None):
    index = faiss.clone_index(trained(kind))
    vectors = vectors.astype(np.float32)
    if ids is None:
        index.add(vectors)
    else:
        index.add_with_ids(vectors, ids.astype(np.int64))
    return index


def checked(index, path: Path, pool: Embeddings) -> None:
    """What the search does before its first query, with the index as it comes from the disk."""
    faiss.write_index(index, str(path))
    Search("faiss", index=path).open(pool, 1).prepare(pool.vectors(np.array([0]))[0], Execution())


def stored(pool: Embeddings) -> np.ndarray:
    return pool.vectors(np.arange(pool.rows))


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_index_of_any_kind_passes_and_another_does_not(kind: str, pool: Embeddings, tmp_path: Path):
    vectors = stored(pool)
    checked(built(kind, vectors), tmp_path / "right.index", pool)
    shuffled = vectors[np.random.default_rng(0).permutation(ROWS)]
    for other in (shuffled, unit_vectors(ROWS, DIMENSION, seed=9), np.roll(vectors, 1, axis=0)):
        with pytest.raises(PoolError, match=r"does not hold the vectors of .* in its order"):
            checked(built(kind, other), tmp_path / "wrong.index", pool)


@pytest.mark.parametrize(
    "kind", ["Flat", "HNSW16", "IVF8,Flat", seconds("PQ8x4"), "SQ8", seconds("IVF8,PQ8x4")]
)
def test_two_rows_of_a_small_pool_that_changed_places(kind: str, tmp_path: Path):
    write_embeddings(tmp_path / "E", unit_vectors(400, DIMENSION, seed=1))
    small = Embeddings(tmp_path / "E")
    vectors = stored(small)
    checked(built(kind, vectors), tmp_path / "right.index", small)
    vectors[[7, 300]] = vectors[[300, 7]]
    with pytest.raises(PoolError, match="2 of 400 rows that were compared differ, row 7 first"):
        checked(built(kind, vectors), tmp_path / "wrong.index", small)


def test_files_of_the_pool_in_another_order(pool: Embeddings, tmp_path: Path):
    vectors = stored(pool)
    other = np.concatenate([vectors[1200:1800], vectors[600:1200], vectors[:600], vectors[1800:]])
    assert pool.rows > SAMPLED
    with pytest.raises(PoolError, match="row 0 first"):
        checked(built("HNSW16", other), tmp_path / "x.index", pool)


@pytest.mark.parametrize(
    "kind", ["IDMap,Flat", "IDMap2,Flat", "IDMap,HNSW16", "IVF8,Flat", "IVF8,PQ4x4", "IDMap,PQ4x4"]
)
def test_ids_must_be_row_numbers(kind: str, pool: Embeddings, tmp_path: Path):
    vectors = stored(pool)
    checked(built(kind, vectors, np.arange(ROWS)), tmp_path / "right.index", pool)
    numbers = np.arange(ROWS)
    for ids in (7 * numbers + 1_000_000, numbers + 1, -numbers - 1, 0 * numbers, numbers[::-1]):
        with pytest.raises(PoolError, match=r"has ids of its own|of them twice|does not hold the vectors"):
            checked(built(kind, vectors, ids), tmp_path / "wrong.index", pool)


def test_ids_in_lists_that_lie_in_other_indexes(pool: Embeddings, tmp_path: Path):
    """A transform around lists with keys of a data base."""
    index = built("PCAR8,IVF8,Flat", stored(pool), np.arange(ROWS) + 10**12)
    with pytest.raises(PoolError, match=r"has ids of its own .*1000000000"):
        checked(index, tmp_path / "x.index", pool)
    removed = built("IVF8,Flat", stored(pool))
    removed.remove_ids(np.arange(100))
    removed.add_with_ids(np.zeros((100, DIMENSION), np.float32), np.arange(ROWS, ROWS + 100))
    with pytest.raises(PoolError, match="has ids of its own"):
        checked(removed, tmp_path / "y.index", pool)


def test_equal_vectors_are_no_sign_of_another_order(tmp_path: Path):
    write_embeddings(tmp_path / "E", np.tile(unit_vectors(20, DIMENSION, seed=3), (10, 1)))
    twins = Embeddings(tmp_path / "E")
    for kind in ("Flat", "HNSW16", "SQ8", "IVF4,Flat"):
        checked(built(kind, stored(twins)), tmp_path / "x.index", twins)


def test_an_index_of_the_vectors_before_they_were_rounded(pool: Embeddings, tmp_path: Path):
    """An index may have been built of fp32 vectors, of which the folder has the fp16."""
    exact = stored(pool).astype(np.float32)
    exact *= 1 + np.random.default_rng(0).uniform(-2e-4, 2e-4, exact.shape).astype(np.float32)
    for kind in ("Flat", "SQ8", "PQ4x4", "IVF8,PQ4x4"):
        checked(built(kind, exact), tmp_path / "x.index", pool)


def test_what_a_search_returns_is_looked_at(tmp_path: Path):
    rows, good = np.array([[3, -1]]), np.array([[0.5, np.nan]], np.float32)
    check_found(rows, good, 4, tmp_path)
    for bad_rows, similarities in (([[4, 0]], good), ([[-2, 0]], good), ([[3, 1]], good)):
        with pytest.raises(PoolError, match=r"no row of a pool of 4|no finite number"):
            check_found(np.array(bad_rows), similarities, 4, tmp_path)


def test_lists_packed_for_fast_scans_give_no_vectors(pool: Embeddings, tmp_path: Path):
    """faiss 1.15 ends the process over those."""
    path = tmp_path / "x.index"
    faiss.write_index(built("IVF8,PQ4x4fs", stored(pool)), str(path))
    index = open_index(path)
    check_row_ids(index, path)
    with pytest.raises(RuntimeError, match="fast scans"):
        reconstruct(index, np.arange(3))
    check_vectors(index, path, pool)


def test_files_that_are_no_index(pool: Embeddings, tmp_path: Path):
    path = tmp_path / "x.index"
    whole = faiss.serialize_index(built("Flat", stored(pool))).tobytes()
    binary = faiss.IndexBinaryFlat(16)
    faiss.write_index_binary(binary, str(tmp_path / "binary"))
    for data in (b"", b"IxFI", whole[:50], whole[:-5], b"\xff" * 200, (tmp_path / "binary").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(PoolError, match="is not a faiss index, or damaged"):
            open_index(path)
