"""``arf retrieve --urls-out``: links of pools in every layout that has some; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.building import drawing, unit_vectors, write_embeddings
from support.knn_servers import SmallService
from support.tars import write_tar

POOL = unit_vectors(60, 768, seed=2)
QUERIES = POOL[[3, 40, 41]]
SHA = "0" * 64


@pytest.fixture
def retrieve(arf, tmp_path: Path):
    """Runs ``arf retrieve`` with three queries, each a vector of the pool; returns what it says and the links."""
    write_embeddings(tmp_path / "queries", QUERIES, parts=1)

    def run(*more: object, status: int = 0) -> tuple[str, list[dict]]:
        links = tmp_path / "links.parquet"
        words = ["--queries", tmp_path / "queries", "--out", tmp_path / "hits", "--urls-out", links]
        _, err = arf("retrieve", *words, *more, status=status)
        return err, pq.read_table(links).to_pylist() if links.exists() else []

    return run


def is_model(folder: Path, name: str, weights: str = "openai") -> None:
    (folder / "model.json").write_text(json.dumps({"model": {"name": name, "weights": weights}}))


def write_datacomp(folder: Path, length: float = 1.0) -> None:
    """Two files of DataComp's metadata below a folder each, as those of its largest scale."""
    for part in range(2):
        rows = range(part * 30, (part + 1) * 30)
        (folder / str(part)).mkdir(parents=True)
        columns = {"uid": [f"uid{i}" for i in rows], "url": [f"http://a.example/{i}.jpg" for i in rows]}
        columns |= {"text": [f"text {i}" for i in rows], "sha256": [SHA] * 30, "original_width": [640] * 30}
        pq.write_table(pa.table(columns), folder / f"{part}/0a{part}f.parquet")
        others = unit_vectors(30, 512, seed=9)
        vectors = {
            "l14_img": length * POOL[rows],
            "l14_txt": -POOL[rows],
            "b32_img": others,
            "b32_txt": others,
        }
        np.savez_compressed(folder / f"{part}/0a{part}f.npz", **vectors)


@pytest.mark.parametrize("length", [1.0, 7.5])
def test_datacomps_vectors_are_searched_as_they_are(retrieve, tmp_path: Path, length: float):
    write_datacomp(tmp_path / "datacomp", length)
    is_model(tmp_path / "queries", "ViT-L-14-quickgelu")
    err, links = retrieve("--pool", tmp_path / "datacomp", "--k", 1)
    assert "3 links" in err and [link["pool_id"] for link in links] == ["uid3", "uid40", "uid41"]
    assert links[1] == {
        "url": "http://a.example/40.jpg", "caption": "text 40", "pool_id": "uid40", "query_id": "00001", "rank": 1,
        "similarity": pytest.approx(1, abs=2e-3), "sha256": SHA,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "weights"), [("ViT-L-14", "laion2b_s32b_b82k"), ("ViT-B-32", "openai")])
def test_queries_of_another_model_are_refused(retrieve, tmp_path: Path, name: str, weights: str):
    """The same dimension is not enough; ViT-B-32 has a dimension of its own."""
    write_datacomp(tmp_path / "datacomp")
    is_model(tmp_path / "queries", name, weights)
    err, _ = retrieve("--pool", tmp_path / "datacomp", status=1)
    assert "ViT-L-14-quickgelu --pretrained openai" in err and weights in err


@pytest.mark.parametrize("damage", ["alone", "short", "pickle", "truncated"])
def test_damaged_metadata_are_named(retrieve, tmp_path: Path, damage: str):
    write_datacomp(tmp_path / "datacomp")
    path = tmp_path / "datacomp/1/0a1f.npz"
    if damage == "alone":
        path.unlink()
    elif damage == "short":
        np.savez(path, l14_img=POOL[:29])
    elif damage == "pickle":
        np.savez(path, l14_img=np.array([{}] * 30, object))
    else:
        path.write_bytes(path.read_bytes()[:5000])
    err, _ = retrieve("--pool", tmp_path / "datacomp", status=1)
    assert "0a1f" in err and "Download" in err


def test_over_retrieval_chooses_more_of_everything(retrieve, tmp_path: Path):
    write_datacomp(tmp_path / "datacomp")
    _, links = retrieve(
        "--pool", tmp_path / "datacomp", "--k", 4, "--max-per-query", 2, "--max-pairs", 5, "--over", 2.5
    )
    assert len(links) == 13 and max(link["rank"] for link in links) <= 5  # of three queries; none twice


def test_a_pool_without_links_is_refused(retrieve, tmp_path: Path):
    write_embeddings(tmp_path / "pool", POOL)
    err, links = retrieve("--pool", tmp_path / "pool", status=1)
    assert "url" in err and not links
    err, _ = retrieve(status=1)
    assert "--pool" in err


def described(request: dict, reply: list) -> list:
    """As a service whose index was built with links; of every fourth it knows none that could be opened."""
    for hit in reply:
        known = hit["id"] % 4 != 3 or hit["id"] == 3
        hit |= {
            "url": f"http://a.example/{hit['id']}.jpg" if known else "file:///etc/passwd",
            "caption": f"text {hit['id']}",
        }
    return reply


def test_a_service_alone_knows_enough(arf, retrieve, tmp_path: Path):
    """Its pool is not at hand; the pairs are packed from what was downloaded, some of which did not arrive."""
    keys = [f"key{i}" for i in range(60)]
    with SmallService(POOL, keys, described) as service:
        words = ["--backend", "service", "--service-url", service.url, "--k", 5]
        err, links = retrieve(*words)
        assert "have no link" in err
        err, _ = retrieve(*words, "--exclude", tmp_path / "queries", "--restart", status=1)
        assert "--pool" in err
    assert {"key3", "key40", "key41"} <= {link["pool_id"] for link in links}
    assert all(link["url"].startswith("http://") and link["caption"] for link in links)
    assert links == sorted(links, key=lambda link: int(link["pool_id"][3:]))

    members = []
    for row, link in enumerate(links[:-2]):  # two are dead
        said = json.dumps({"pool_id": link["pool_id"], "url": link["url"]}).encode()
        members += [(f"{row:09d}.jpg", drawing(row)), (f"{row:09d}.txt", link["caption"].encode())]
        members += [(f"{row:09d}.json", said)]
    write_tar(tmp_path / "pool/00000.tar", members)
    _, err = arf(
        "pack",
        "--retrieved",
        tmp_path / "hits",
        "--pool",
        tmp_path / "pool/00000.tar",
        "--out",
        tmp_path / "A",
    )
    assert "were not downloaded" in err


def test_a_service_that_tells_no_links_is_said_at_once(retrieve):
    with SmallService(POOL, ["k"] * 60) as service:
        err, _ = retrieve("--backend", "service", "--service-url", service.url, status=1)
    assert "no 'url'" in err and "columns_to_return" in err
