"""Near-duplicates and excluded images by an index: what comparing all pairs finds, and in the same order every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from arf_plugin.pipeline import near
from arf_plugin.pipeline.embeddings import EmbeddingFile, Embeddings

CPU = torch.device("cpu")
ROWS, DIMENSION = 3000, 64


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def folder(path: Path, vectors: np.ndarray, captions: list[str] | None = None, files: int = 2) -> Embeddings:
    """An embedding folder."""
    for name in ("img_emb", "metadata"):
        (path / name).mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(vectors)), files)):
        np.save(path / "img_emb" / f"img_emb_{number}.npy", vectors[rows].astype(np.float16))
        columns = {name: [f"{path.name}-{row}" for row in rows] for name in ("id", "image_path")}
        if captions is not None:
            columns["caption"] = [captions[row] for row in rows]
        pq.write_table(pa.table(columns), path / "metadata" / f"metadata_{number}.parquet")
    return Embeddings(path)


@pytest.fixture(scope="module", params=[0.0, 1.5], ids=["all around", "one half of space"])
def pool(tmp_path_factory, request) -> Embeddings:
    """Clusters, copies, copies of copies, and one image that comes 300 times."""
    rng = np.random.default_rng(0)
    centers = unit(unit(rng.standard_normal((40, DIMENSION))) + request.param * np.eye(DIMENSION)[0])
    vectors = unit(centers[rng.integers(40, size=ROWS)] + 0.2 * rng.standard_normal((ROWS, DIMENSION)))
    for _ in range(2):
        to, of = rng.permutation(ROWS)[:600].reshape(2, -1)
        vectors[to] = unit(
            vectors[of] + rng.uniform(0, 0.03, (300, 1)) * rng.standard_normal((300, DIMENSION))
        )
    vectors[rng.permutation(ROWS)[:300]] = vectors[0]
    return folder(tmp_path_factory.mktemp("near") / "pool", vectors)


def by_index(monkeypatch) -> None:
    monkeypatch.setattr(near, "EXACT", {"cpu": 0})


def test_exact_duplicates_keep_what_comes_first_and_each_file_is_read_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    kinds = rng.integers(50, size=400)  # of vectors; every second one has the caption of its kind
    captions = [f"caption {kind if row % 2 else row}" for row, kind in enumerate(kinds)]
    pool = folder(tmp_path, unit(rng.standard_normal((50, DIMENSION)))[kinds], captions, files=8)
    read = []
    monkeypatch.setattr(near, "BLOCK", 50)
    monkeypatch.setattr(
        EmbeddingFile, "load", lambda file, load=EmbeddingFile.load: read.append(1) or load(file)
    )
    order, first, expected = rng.permutation(400).tolist(), {}, []
    for row in order:
        before = first.setdefault((kinds[row], captions[row]), row)
        expected += [(row, before)] if before != row else []
    found = near.exact_duplicates(pool, np.array(order))
    assert [(item.row, item.near) for item in found] == expected and len(expected) > 100
    assert len(read) < 3 * 8  # for the vectors, and for their type and dimension; not once a block


@pytest.mark.parametrize("similarity", [0.9, 0.97, 0.999])
def test_the_index_drops_what_comparing_all_drops(pool, monkeypatch, similarity):
    order = np.random.default_rng(1).permutation(ROWS)
    exact = near.near_duplicates(pool, order, similarity, CPU)
    by_index(monkeypatch)
    found = near.near_duplicates(pool, order, similarity, CPU)
    assert len(exact) >= 299
    both = {item.row for item in exact} ^ {item.row for item in found}
    assert len(both) <= 0.001 * len(exact)
    assert found == near.near_duplicates(pool, order, similarity, CPU)
    place, vectors = np.argsort(order), pool.vectors(np.arange(ROWS)).astype(np.float32)
    rows, stays, cosines = (np.array([item[i] for item in found]) for i in (0, 2, 3))
    assert not set(stays) & set(rows) and (place[stays] < place[rows]).all()
    np.testing.assert_allclose(cosines, (vectors[rows] * vectors[stays]).sum(1), atol=1e-5)
    assert (cosines >= similarity).all()


def test_the_index_excludes_what_comparing_all_excludes(pool, monkeypatch, tmp_path):
    rng = np.random.default_rng(2)
    shown = pool.vectors(rng.permutation(ROWS)[:500]).astype(np.float32)
    copies = unit(shown + 0.02 * rng.standard_normal(shown.shape))
    others = (folder(tmp_path / "one", copies[:200]), folder(tmp_path / "two", copies[200:]))
    exclusion, rows = near.Exclusion(others, 0.95), rng.permutation(ROWS)
    exact = exclusion.near(pool, rows, CPU)
    by_index(monkeypatch)
    found = exclusion.near(pool, rows, CPU)
    assert len(exact) >= 500
    assert [item[:3] for item in found] == [item[:3] for item in exact]
    np.testing.assert_allclose([i.similarity for i in found], [i.similarity for i in exact], atol=1e-5)
