"""``arf retrieve --backend faiss`` and ``service``: what exact search finds, and what is refused.

The service here is a small one in this process; see test_knn_service.py for the real one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.building import folder_bytes, unit_vectors
from support.knn_servers import FlakyProxy, SmallService
from test_embed import write_embeddings

faiss = pytest.importorskip("faiss")
QUERIES, POOL = unit_vectors(30, 16, seed=1), unit_vectors(400, 16, seed=2)


@pytest.fixture
def retrieve(arf, tmp_path: Path):
    """Runs ``arf retrieve`` on 30 queries and a pool of 400; returns what it prints on standard error."""
    write_embeddings(tmp_path / "queries", QUERIES, parts=3)
    write_embeddings(tmp_path / "pool", POOL, parts=4)

    def run(
        out: str, *more: object, pool: str = "pool", queries: str = "queries", k: int = 5, status: int = 0
    ) -> str:
        words = (
            "--queries",
            tmp_path / queries,
            "--pool",
            tmp_path / pool,
            "--k",
            k,
            "--out",
            tmp_path / out,
        )
        return arf("retrieve", *words, *more, status=status)[1]

    return run


@pytest.fixture
def index(arf, tmp_path: Path):
    """Builds an index of the pool with ``arf index``."""

    def run(factory: str, name: str) -> Path:
        arf("index", "--embeddings", tmp_path / "pool", "--factory", factory, "--out", tmp_path / name)
        return tmp_path / name

    return run


def hits(folder: Path) -> list[tuple[int, int, float]]:
    rows = [row for path in sorted((folder / "hits").iterdir()) for row in pq.read_table(path).to_pylist()]
    return [(row["query_row"], row["row"], row["similarity"]) for row in rows]


def same(folder: Path, other: Path) -> bool:
    """The same rows in the same order; similarities may differ in their last bits."""
    one, two = hits(folder), hits(other)
    np.testing.assert_allclose([hit[2] for hit in one], [hit[2] for hit in two], atol=1e-6)
    return [hit[:2] for hit in one] == [hit[:2] for hit in two]


def test_a_flat_index_gives_what_exact_search_gives(retrieve, index, tmp_path: Path):
    retrieve("exact")
    retrieve("flat", "--backend", "faiss", "--index", index("Flat", "I"))
    retrieve("alone", "--backend", "faiss", pool="I")
    assert same(tmp_path / "exact", tmp_path / "flat") and same(tmp_path / "exact", tmp_path / "alone")
    ours, theirs = (pq.read_table(tmp_path / name / "pairs.parquet") for name in ("exact", "alone"))
    columns = ["image_path", "caption", "row", "query_count", "queries"]
    assert ours.select(columns) == theirs.select(columns)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_ties_go_to_the_lower_row(arf, retrieve, tmp_path: Path, factory: str):
    vectors = unit_vectors(20, 16, seed=4)
    write_embeddings(tmp_path / "twins", np.tile(vectors, (3, 1)), parts=2)
    write_embeddings(tmp_path / "each", vectors)
    arf("index", "--embeddings", tmp_path / "twins", "--factory", factory, "--out", tmp_path / "I")
    retrieve("H", "--backend", "faiss", "--index", tmp_path / "I", pool="twins", queries="each", k=3)
    assert [row for _, row, _ in hits(tmp_path / "H")] == [i + 20 * n for i in range(20) for n in range(3)]


def test_hits_of_a_compressed_index_are_ranked_on_the_stored_vectors(retrieve, index, tmp_path: Path):
    folder = index("PQ4x4", "I")
    retrieve("exact")
    retrieve("ranked", "--backend", "faiss", "--index", folder, "--candidates", 400)
    assert same(tmp_path / "ranked", tmp_path / "exact")  # all rows were candidates
    retrieve("few", "--backend", "faiss", "--index", folder)
    scores = QUERIES.astype(np.float32) @ POOL.astype(np.float32).T
    few = hits(tmp_path / "few")
    assert all(similarity == pytest.approx(scores[query, row], abs=2e-5) for query, row, similarity in few)
    retrieve("alone", "--backend", "faiss", pool="I")
    alone = hits(tmp_path / "alone")
    wrong = [abs(similarity - scores[query, row]) for query, row, similarity in alone]
    assert max(wrong) > 0.05  # so the test above means something

    def recall(found):
        return len({hit[:2] for hit in found} & {hit[:2] for hit in hits(tmp_path / "exact")}) / 150

    assert recall(few) > recall(alone)


def test_search_parameters_reach_the_index(retrieve, index, tmp_path: Path):
    folder = index("IVF8,Flat", "I")
    retrieve("exact")
    retrieve("all", "--backend", "faiss", "--index", folder, "--search-parameters", "nprobe=8")
    retrieve("one", "--backend", "faiss", "--index", folder)
    assert same(tmp_path / "all", tmp_path / "exact")
    assert [hit[1] for hit in hits(tmp_path / "one")] != [hit[1] for hit in hits(tmp_path / "exact")]
    refused = ("--backend", "faiss", "--index", folder, "--search-parameters")
    assert "faiss cannot set that for this kind of index" in retrieve("H", *refused, "efSearch=9", status=1)


def test_exclusion_and_duplicates_work_on_an_index_alone(retrieve, index, tmp_path: Path):
    write_embeddings(tmp_path / "test", POOL[:50])
    words = ("--exclude", tmp_path / "test", "--exclude-similarity", 0.99, "--near-duplicates", 0.9)
    retrieve("exact", *words)
    index("IVF4,Flat", "I")
    retrieve("alone", *words, "--backend", "faiss", "--search-parameters", "nprobe=4", pool="I")
    one, other = (
        pq.read_table(tmp_path / name / "dropped.parquet").to_pylist() for name in ("exact", "alone")
    )
    assert [row["row"] for row in one] == [row["row"] for row in other] and len(one) > 5


def test_refusals_of_faiss(retrieve, index, tmp_path: Path):
    folder = index("Flat", "I")

    def refused(path: Path, *more: object, **settings) -> str:
        return retrieve("H", "--backend", "faiss", "--index", path, *more, status=1, **settings)

    assert "build one with: arf index" in refused(tmp_path / "none")
    distances = faiss.IndexFlatL2(16)
    distances.add(POOL.astype(np.float32))
    faiss.write_index(distances, str(tmp_path / "l2.index"))
    assert "measures distances (faiss metric 1); expected inner product" in refused(tmp_path / "l2.index")
    (tmp_path / "damaged.index").write_bytes((folder / "image.index").read_bytes()[:1000])
    assert "is not a faiss index, or damaged" in refused(tmp_path / "damaged.index")
    write_embeddings(tmp_path / "fewer", POOL[:399])
    assert "has 400 vectors" in refused(folder, pool="fewer")
    write_embeddings(tmp_path / "narrow", unit_vectors(400, 8, seed=2))
    write_embeddings(tmp_path / "narrow-queries", unit_vectors(3, 8, seed=2))
    assert "holds vectors of dimension 16, the queries have 8" in refused(
        folder, pool="narrow", queries="narrow-queries"
    )
    narrow = index("IVF100,Flat", "J")
    assert "looks at too few of its vectors" in refused(narrow, "--candidates", 50, k=50)
    assert "are for --backend faiss" in retrieve("H", "--index", folder, status=1)
    assert "belong together" in retrieve("H", "--backend", "service", status=1)
    assert "belong together" in retrieve("H", "--service-url", "http://127.0.0.1:1", status=1)


def test_the_backend_is_part_of_the_configuration(retrieve, index):
    folder = index("Flat", "I")
    retrieve("H")
    err = retrieve("H", "--backend", "faiss", "--index", folder, status=1)
    assert 'search.backend: "exact" -> "faiss"' in err
    retrieve("H", "--backend", "faiss", "--index", folder, "--restart")


def test_a_service_gives_what_exact_search_gives(retrieve, tmp_path: Path):
    pytest.importorskip("requests")
    keys = [f"{i:05d}" for i in np.random.default_rng(0).permutation(400)]
    order = [int(key) for key in keys]  # the service has the same pool in another order
    common = ("--backend", "service", "--service-timeout", 0.5)
    retrieve("exact")
    with SmallService(POOL[order], keys) as service, FlakyProxy(service.url, 0.3, delay=0.7) as proxy:
        retrieve("service", *common, "--service-url", service.url)
        retrieve("flaky", *common, "--service-url", proxy.url)
    assert proxy.counts.total() > proxy.counts["none"]
    assert same(tmp_path / "service", tmp_path / "exact")
    assert folder_bytes(tmp_path / "service") == folder_bytes(tmp_path / "flaky")


def test_refusals_of_the_service(retrieve, tmp_path: Path):
    pytest.importorskip("requests")
    keys = [f"{i:05d}" for i in range(400)]

    def refused(service: SmallService, **settings) -> str:
        with service:
            words = ("--backend", "service", "--service-url", service.url, "--service-index", "pool")
            return retrieve("H", *words, status=1, **settings)

    assert "names the pair 'x" in refused(SmallService(POOL, [f"x{key}" for key in keys]))
    other = unit_vectors(400, 16, seed=77)
    assert "its index holds other vectors. Was it built with another model" in refused(
        SmallService(other, keys)
    )
    write_embeddings(tmp_path / "twice", POOL[:20], parts=2)
    for path in (tmp_path / "twice/metadata").iterdir():
        first = tmp_path / "twice/metadata/metadata_0.parquet"
        path.write_bytes(first.read_bytes())
    err = refused(SmallService(POOL, keys), pool="twice")
    assert "The key '00000' occurs twice in the pool" in err and "metadata_1.parquet, row 0" in err


def test_a_dry_run_asks_nobody(retrieve):
    pytest.importorskip("requests")
    with SmallService(POOL, []) as service:
        retrieve("H", "--backend", "service", "--service-url", service.url, "--dry-run")
    assert service.requests == []
