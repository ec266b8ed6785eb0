"""``arf retrieve``: which pairs are chosen, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.building import folder_bytes, save_tiny_clip, unit_vectors
from support.building_fixtures import Inputs
from test_embed import write_embeddings


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Embeddings of 30 queries in 3 files and a pool of 200 in 4, as clip-retrieval writes them."""
    write_embeddings(tmp_path / "queries", unit_vectors(30, 16, seed=1), parts=3)
    write_embeddings(tmp_path / "pool", unit_vectors(200, 16, seed=2), parts=4)
    return tmp_path / "queries", tmp_path / "pool"


def expected_scores() -> np.ndarray:
    queries, pool = unit_vectors(30, 16, seed=1), unit_vectors(200, 16, seed=2)
    return queries.astype(np.float32) @ pool.astype(np.float32).T


def pairs_of(out: Path) -> list[dict]:
    return pq.read_table(out / "pairs.parquet").to_pylist()


def test_pairs_are_the_union_of_each_querys_nearest(arf, folders: tuple[Path, Path], tmp_path: Path):
    queries, pool = folders
    out, _ = arf(
        "retrieve", "--queries", queries, "--pool", pool, "--k", 4, "--out", tmp_path / "H", "--json"
    )
    scores = expected_scores()
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    pairs = pairs_of(tmp_path / "H")
    assert [pair["row"] for pair in pairs] == sorted(set(nearest.ravel().tolist()))
    assert json.loads(out)["pairs"] == len(pairs)
    for pair in pairs:
        choosers = [q for q in range(30) if pair["row"] in nearest[q]]
        choosers.sort(key=lambda q: -scores[q, pair["row"]])
        assert pair["query_count"] == len(choosers)
        assert pair["queries"] == [f"{q:05d}" for q in choosers[:10]]
        assert pair["similarity"] == pytest.approx(scores[choosers[0], pair["row"]], abs=1e-5)
        assert pair["image_path"] == f"{pair['row']:05d}" and pair["caption"] == "c" and pair["tar"] is None
    hits = [
        row for path in sorted((tmp_path / "H/hits").iterdir()) for row in pq.read_table(path).to_pylist()
    ]
    assert len(hits) == 120
    assert [hit["row"] for hit in hits] == nearest.ravel().tolist()
    assert hits[17]["query"] == "00004"


def test_floor_and_cap(arf, folders: tuple[Path, Path], tmp_path: Path):
    queries, pool = folders
    common = ("retrieve", "--queries", queries, "--pool", pool, "--k", 4)
    arf(*common, "--min-similarity", 0.6, "--out", tmp_path / "floor")
    floor = pairs_of(tmp_path / "floor")
    scores = expected_scores()
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    kept = {int(row) for q in range(30) for row in nearest[q] if scores[q, row] >= 0.6}
    assert {pair["row"] for pair in floor} == kept and 0 < len(kept) < 120
    arf(*common, "--max-pairs", 7, "--cap-by", "similarity", "--out", tmp_path / "cap")
    best = {
        int(row): max(scores[q, row] for q in range(30) if row in nearest[q]) for row in np.unique(nearest)
    }
    assert {p["row"] for p in pairs_of(tmp_path / "cap")} == set(sorted(best, key=best.__getitem__)[-7:])
    _, err = arf(*common, "--min-similarity", 0.999, "--out", tmp_path / "none", status=1)
    assert "No hit reaches --min-similarity 0.999 (best: 0." in err


def test_random_pairs_are_as_many_and_repeatable(arf, folders: tuple[Path, Path], tmp_path: Path):
    queries, pool = folders
    common = ("retrieve", "--queries", queries, "--pool", pool, "--k", 4)
    arf(*common, "--out", tmp_path / "near")
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        arf(*common, "--random", "--seed", seed, "--out", tmp_path / name)
    near, one, two, three = (pairs_of(tmp_path / name) for name in ("near", "one", "two", "three"))
    assert one == two != three
    assert len(one) == len(three) == len(near) == len({pair["row"] for pair in one})
    assert one != near
    assert all(
        pair["similarity"] is None and pair["query_count"] == 0 and pair["queries"] == [] for pair in one
    )


def test_two_ranks_give_the_bytes_of_one(
    arf, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    queries, pool = folders
    common = ("retrieve", "--queries", queries, "--pool", pool, "--k", 4, "--out")
    arf(*common, tmp_path / "one")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        arf(*common, tmp_path / "two")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_refusals(arf, folders: tuple[Path, Path], inputs: Inputs, tmp_path: Path):
    queries, pool = folders

    def refused(expected: str, queries: Path = queries, pool: Path = pool, *more: object):
        _, err = arf(
            "retrieve",
            "--queries",
            queries,
            "--pool",
            pool,
            "--out",
            tmp_path / "H",
            "--restart",
            *more,
            status=1,
        )
        assert expected in err, err

    refused("Expected an embedding folder", tmp_path)
    write_embeddings(tmp_path / "narrow", unit_vectors(9, 8, seed=0))
    refused("of dimension 8", tmp_path / "narrow")
    bad = unit_vectors(200, 16, seed=2)
    bad[150] = np.nan
    write_embeddings(tmp_path / "nan", bad, parts=4)
    refused("img_emb_3.npy, row 0 (row 150 of the folder) has norm nan", queries, tmp_path / "nan")
    refused("img_emb_3.npy, row 0 (row 150 of the folder) has norm nan", tmp_path / "nan")
    for flag in ("--k", "--max-pairs", "--max-per-query", "--service-threads"):
        with pytest.raises(SystemExit):  # of argparse
            refused("", queries, pool, flag, 0)
    refused("a cosine lies between", queries, pool, "--min-similarity", 1.5)
    other = save_tiny_clip(tmp_path / "other", seed=5)
    arf("embed", "--task-data", inputs.task, "--model", inputs.clip, "--out", tmp_path / "E1")
    arf("embed", "--pool", inputs.pool, "--model", other, "--out", tmp_path / "E2")
    refused("with the same model and weights", tmp_path / "E1", tmp_path / "E2")
