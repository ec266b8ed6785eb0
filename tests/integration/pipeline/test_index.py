"""``arf index``: faiss finds what exact search finds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.building import unit_vectors
from test_embed import write_embeddings

from arf_plugin.pipeline.knn import exact_search


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_the_index_holds_the_vectors_in_order(arf, tmp_path: Path, factory: str):
    faiss = pytest.importorskip("faiss")
    pool, queries = unit_vectors(400, 16, seed=2), unit_vectors(20, 16, seed=1)
    write_embeddings(tmp_path / "P", pool, parts=3)
    arf("index", "--embeddings", tmp_path / "P", "--factory", factory, "--out", tmp_path / "I")
    index = faiss.read_index(str(tmp_path / "I/image.index"))
    assert index.ntotal == 400 and index.metric_type == faiss.METRIC_INNER_PRODUCT
    if factory != "Flat":
        faiss.extract_index_ivf(index).nprobe = 4  # all lists: exact again
    similarities, rows = index.search(queries.astype(np.float32), 5)
    expected = exact_search(queries, [(0, pool)], 5, torch.device("cpu"))
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_allclose(similarities, expected[1], atol=1e-5)
    metadata = sorted((tmp_path / "I/metadata").iterdir())
    keys = [row["image_path"] for path in metadata for row in pq.read_table(path).to_pylist()]
    assert keys == [f"{i:05d}" for i in range(400)]


def test_refusals(arf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_embeddings(tmp_path / "P", unit_vectors(20, 16, seed=2))
    common = ("index", "--embeddings", tmp_path / "P", "--out", tmp_path / "I")
    if "faiss" in sys.modules or pytest.importorskip("faiss"):
        _, err = arf(*common, "--factory", "Flatt", status=1)
        assert "--factory Flatt: faiss does not know it" in err
        _, err = arf(*common, "--factory", "IVF64,Flat", status=1)
        assert "cannot train 'IVF64,Flat' on 20 vectors" in err
    monkeypatch.setitem(sys.modules, "faiss", None)  # what an environment without it does
    _, err = arf(*common, status=1)
    assert "pip install 'arf-plugin[retrieval]'" in err


def test_a_factory_that_wants_ids_is_refused(arf, tmp_path: Path):
    pytest.importorskip("faiss")
    write_embeddings(tmp_path / "P", unit_vectors(20, 16, seed=2))
    common = ("index", "--embeddings", tmp_path / "P", "--out", tmp_path / "I", "--factory", "IDMap,Flat")
    _, err = arf(*common, status=1)
    assert "--factory IDMap,Flat: faiss cannot add vectors to it" in err
