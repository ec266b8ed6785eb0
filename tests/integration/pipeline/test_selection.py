"""``arf retrieve``: duplicates within the anchors, and pairs near excluded images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.building import unit_vectors
from test_embed import write_embeddings

POOL = 200


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def pool() -> np.ndarray:
    """200 vectors; 100 to 119 nearly show what 0 to 19 show, 120 to 124 are the same to the bit."""
    vectors = unit_vectors(POOL, 32, seed=2)
    noise = np.random.default_rng(3).normal(size=(20, 32)) * 0.02
    vectors[100:120] = unit(vectors[:20] + noise)
    vectors[120:125] = vectors[:5]
    return vectors


@pytest.fixture
def retrieve(arf, pool: np.ndarray, tmp_path: Path):
    """Retrieves for 40 queries near pool rows 0 to 39; returns summary, pairs and dropped rows."""
    queries = unit(pool[:40] + np.random.default_rng(4).normal(size=(40, 32)) * 0.05)
    write_embeddings(tmp_path / "queries", queries, parts=3)
    write_embeddings(tmp_path / "pool", pool, parts=4)

    def run(name: str, *more: object) -> tuple[dict, list[dict], list[dict]]:
        out, _ = arf("retrieve", "--queries", tmp_path / "queries", "--pool", tmp_path / "pool", "--k", 5,
                     "--out", tmp_path / name, "--json", *more)  # fmt: skip
        tables = [
            pq.read_table(tmp_path / name / f"{what}.parquet").to_pylist() for what in ("pairs", "dropped")
        ]
        return json.loads(out), *tables

    return run


def cosines(pool: np.ndarray) -> np.ndarray:
    return pool.astype(np.float32) @ pool.astype(np.float32).T


def test_exact_duplicates_are_always_dropped(retrieve):
    summary, pairs, dropped = retrieve("H")
    assert {(item["row"], item["reason"], item["near"]) for item in dropped} == {
        (120 + i, "duplicate", str(i)) for i in range(5)
    }
    assert summary["dropped"] == {"duplicate": 5}
    assert dropped[0]["image_path"] == "00120" and dropped[0]["similarity"] == 1.0
    assert not {pair["row"] for pair in pairs} & set(range(120, 125))
    assert {pair["row"] for pair in pairs} >= set(range(20)) | set(range(100, 120))


def test_the_same_image_with_another_text_is_no_exact_duplicate(retrieve, tmp_path: Path):
    path = tmp_path / "pool/metadata/metadata_2.parquet"  # rows 100 to 149
    table = pq.read_table(path)
    texts = [f"text {i}" for i in range(len(table))]
    pq.write_table(table.set_column(1, "caption", pa.array(texts)), path)
    summary, pairs, _ = retrieve("H")
    assert summary["dropped"] == {}
    assert {pair["row"] for pair in pairs} >= set(range(120, 125))


@pytest.mark.parametrize("threshold", [0.97, 0.3])
def test_no_two_anchors_are_near_and_every_dropped_one_is_near_a_kept_one(retrieve, pool, threshold: float):
    summary, pairs, dropped = retrieve("H", "--near-duplicates", threshold)
    kept = [pair["row"] for pair in pairs]
    among = cosines(pool)[np.ix_(kept, kept)]
    assert among[~np.eye(len(kept), dtype=bool)].max() < threshold
    near = [item for item in dropped if item["reason"] == "near duplicate"]
    assert summary["dropped"]["near duplicate"] == len(near) >= 20
    for item in near:
        assert int(item["near"]) in kept
        assert item["similarity"] == pytest.approx(cosines(pool)[item["row"], int(item["near"])], abs=1e-3)
        assert item["similarity"] >= threshold
    if threshold == 0.97:  # one of each couple
        assert sorted(item["row"] % 100 for item in near) == list(range(20))


def test_excluded_images_keep_pairs_out_of_anchors_and_control(retrieve, pool, tmp_path: Path):
    """The evaluation set shows what pool rows 10 to 29 show."""
    evaluation = unit(pool[10:30] + np.random.default_rng(5).normal(size=(20, 32)) * 0.01)
    write_embeddings(tmp_path / "other", unit_vectors(50, 32, seed=9))
    write_embeddings(tmp_path / "evaluation", evaluation, parts=3)
    exclude = ("--exclude", tmp_path / "other", tmp_path / "evaluation")
    near = (pool.astype(np.float32) @ evaluation.astype(np.float32).T).max(axis=1)
    forbidden = set(np.flatnonzero(near >= 0.95).tolist())
    assert forbidden >= set(range(10, 30))

    plain, before, _ = retrieve("plain")
    summary, pairs, dropped = retrieve("H", *exclude)
    assert {pair["row"] for pair in before} & forbidden
    assert not {pair["row"] for pair in pairs} & forbidden
    excluded = [item for item in dropped if item["reason"] == "excluded"]
    assert {item["row"] for item in excluded} == {pair["row"] for pair in before} & forbidden
    assert summary["dropped"]["excluded"] == len(excluded) > 0
    twelve = next(item for item in excluded if item["row"] == 12)
    assert twelve["near"] == "evaluation:00002"
    assert twelve["similarity"] == pytest.approx(near[12], abs=1e-3)
    assert summary["pairs"] < plain["pairs"]

    for seed in range(8):
        _, control, _ = retrieve(f"R{seed}", *exclude, "--random", "--seed", seed)
        assert len(control) == len({pair["row"] for pair in control}) == summary["pairs"]
        assert not {pair["row"] for pair in control} & forbidden


def test_refusals(arf, retrieve, tmp_path: Path):
    retrieve("H")
    write_embeddings(tmp_path / "narrow", unit_vectors(9, 8, seed=0))
    common = (
        *("retrieve", "--queries", tmp_path / "queries", "--pool", tmp_path / "pool"),
        *("--out", tmp_path / "x"),
    )
    _, err = arf(*common, "--exclude", tmp_path / "narrow", status=1)
    assert "narrow has vectors of dimension 8" in err
    _, err = arf(*common, "--exclude", tmp_path / "pool", status=1)
    assert "pairs that the queries found are near excluded images" in err
    _, err = arf(*common, "--exclude", tmp_path / "pool", "--exclude-similarity", 0, status=1)
    assert "--exclude-similarity 0" in err
    _, err = arf(*common, "--memory", "2M", status=1)
    assert "--memory 2M is too little" in err


def test_little_memory_finds_the_same(retrieve, tmp_path: Path):
    _, pairs, _ = retrieve("much")
    _, same, _ = retrieve("little", "--memory", "16M")
    assert [pair["row"] for pair in pairs] == [pair["row"] for pair in same]
