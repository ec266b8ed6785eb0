"""The real clip-retrieval: its service as a back end of ``arf retrieve``, and the folders that it writes.

It lives in an environment of its own that scripts/knn_service.sh makes (6 GB, minutes the first time), so all of this
is marked slow. Where EmojiNet's embeddings are at hand (runs/quickstart, or ARF_TEST_EMBEDDINGS=DIR with DIR/task and
DIR/pool), they are searched as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import knn_service
from support.building import folder_bytes, unit_vectors
from support.building_fixtures import Inputs
from support.hits import assert_same_hits, hits_of, retrieve
from support.knn_servers import FlakyProxy
from support.knn_service import PER_TAR, TARS, Pool, write_pool
from test_embed import write_embeddings

from arf_plugin.pipeline.embeddings import Embeddings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def small(tmp_path_factory, inputs: Inputs) -> Pool:
    return write_pool(tmp_path_factory.mktemp("knn_service"), inputs)


@pytest.fixture(scope="module")
def environment() -> None:
    knn_service.make_environment()


@pytest.fixture(scope="module")
def indices(small: Pool, environment) -> dict[str, Path]:
    """Index folders, sound ones and such as people make by mistake."""
    from arf_plugin.cli.main import main as arf

    folder = small.logs

    def build(name: str, vectors: np.ndarray, factory: str = "Flat") -> Path:
        write_embeddings(folder / f"{name}-emb", vectors, parts=3)
        argv = ["index", "--embeddings", folder / f"{name}-emb", "--factory", factory, "--out", folder / name]
        assert arf([str(word) for word in argv]) == 0
        return folder / name

    found = {
        "pool": small.flat,
        "wide": build("wide", unit_vectors(50, 128, seed=3)),
        "twins": build("twins", np.repeat(unit_vectors(20, 16, seed=4), 3, axis=0)),
        "ivf": build("ivf", unit_vectors(400, 16, seed=6), "IVF40,Flat"),
        "text": build("text", unit_vectors(50, 16, seed=5)),
        "short": build("short", unit_vectors(50, 16, seed=5)),
        "keyless": build("keyless", unit_vectors(50, 16, seed=5)),
        "gaps": build("gaps", unit_vectors(50, 16, seed=5)),
    }
    (found["text"] / "image.index").rename(found["text"] / "text.index")
    for path in sorted((found["short"] / "metadata").iterdir())[1:]:
        path.unlink()
    for path in (found["keyless"] / "metadata").iterdir():
        pq.write_table(pq.read_table(path).select(["caption"]), path)
    for path in (found["gaps"] / "metadata").iterdir():
        table = pq.read_table(path)
        none = pa.nulls(table.num_rows, pa.float64())  # NaN in the service's pandas, and in its JSON
        pq.write_table(table.set_column(1, "caption", none), path)
    return found


@pytest.fixture(scope="module")
def service(small: Pool, indices: dict[str, Path]):
    """The address of one real service with all of them."""
    with knn_service.serving(small.logs / "service.log", indices) as url:
        yield url


def test_exact_faiss_and_the_service_find_the_same(arf, small: Pool, service: str, tmp_path: Path):
    asking = ("--backend", "service", "--service-url", service, "--service-index", "pool")
    searches = {
        "exact": (small.pool,),
        "faiss": (small.pool, "--backend", "faiss", "--index", small.flat),
        "index-alone": (small.flat, "--backend", "faiss"),
        "service": (small.pool, *asking),
        "service-index-alone": (small.flat, *asking),
    }
    packed = {}
    for name, (pool, *more) in searches.items():
        retrieve(arf, small.task, pool, tmp_path / name, *more)
        assert_same_hits(tmp_path / "exact", tmp_path / name)
        arf(
            "pack", "--retrieved", tmp_path / name, "--pool", small.tars, "--out", tmp_path / f"{name}-packed"
        )
        with tarfile.open(tmp_path / f"{name}-packed/pairs/000000.tar") as tar:
            packed[name] = {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith(".json")}
    assert len(packed["exact"]) > 40
    assert packed["exact"] == packed["faiss"] == packed["service"] == packed["service-index-alone"]


def emojinet() -> Path | None:
    places = [ROOT / "runs" / name / "fit" / "anchors" / "work" for name in ("quickstart", "quickstart-fast")]
    if "ARF_TEST_EMBEDDINGS" in os.environ:
        places.insert(0, Path(os.environ["ARF_TEST_EMBEDDINGS"]))
    return next((place for place in places if (place / "pool/img_emb").is_dir()), None)


@pytest.mark.skipif(
    emojinet() is None, reason="EmojiNet's embeddings are not here: run scripts/quickstart.sh first"
)
@pytest.mark.parametrize("factory", ["Flat", "auto"])
def test_the_same_hits_on_emojinet(arf, environment, factory: str, tmp_path: Path):
    task, pool = emojinet() / "task", emojinet() / "pool"
    retrieve(arf, task, pool, tmp_path / "exact")
    words = (
        *("--embeddings", pool, "--index", tmp_path / "index", "--factory", factory),
    )  # auto: clip-retrieval index
    with knn_service.started(tmp_path / "log", *words) as url:
        retrieve(arf, task, pool, tmp_path / "service", "--backend", "service", "--service-url", url)
    retrieve(arf, task, pool, tmp_path / "faiss", "--backend", "faiss", "--index", tmp_path / "index")
    for name in ("faiss", "service"):
        if factory == "Flat":
            assert_same_hits(tmp_path / "exact", tmp_path / name)
        else:  # approximate
            found, expected = hits_of(tmp_path / name)[0], hits_of(tmp_path / "exact")[0]
            recall = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)])
            assert recall > 0.9


@pytest.mark.parametrize("seed", [0, 1])
def test_a_service_that_fails_a_third_of_the_requests_changes_nothing(
    arf, small: Pool, service: str, tmp_path: Path, seed: int
):
    write_embeddings(tmp_path / "queries", Embeddings(small.pool).vectors(np.arange(TARS * PER_TAR)), parts=1)
    common = ("--backend", "service", "--service-index", "pool", "--service-threads", 4)
    queries = tmp_path / "queries"
    retrieve(arf, queries, small.pool, tmp_path / "calm", *common, "--service-url", service)
    with FlakyProxy(service, 0.3, delay=3, seed=seed) as proxy:
        disturbed = (*common, "--service-url", proxy.url, "--service-timeout", 2)
        retrieve(arf, queries, small.pool, tmp_path / "flaky", *disturbed)
    total = proxy.counts.total()
    assert total > 160 and 0.2 < 1 - proxy.counts["none"] / total < 0.4
    assert all(proxy.counts[fault] > 0 for fault in FlakyProxy.FAULTS), proxy.counts
    assert folder_bytes(tmp_path / "calm") == folder_bytes(tmp_path / "flaky")


def test_a_search_that_lost_its_service_goes_on_where_it_was(
    arf, small: Pool, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from arf_plugin.pipeline.knn_backends import ServiceBackend

    monkeypatch.setattr(ServiceBackend, "queries_per_shard", 5)
    words = ("--backend", "service", "--service-index", "pool", "--service-threads", 1)
    retrieve(arf, small.task, small.pool, tmp_path / "whole", *words, "--service-url", service)

    class Dying(FlakyProxy):
        def answer(self, handler, method, path, body):
            self.counts[path] += 1
            if self.counts["/knn-service"] > 13:
                handler.close_connection = True
                return None
            return super().answer(handler, method, path, body)

    with Dying(service, 0) as proxy:
        words_now = (*words, "--service-url", proxy.url, "--service-patience", 1)
        _, err = retrieve(arf, small.task, small.pool, tmp_path / "lost", *words_now, status=1)
    assert "gave no answer" in err and "What is found so far is kept" in err
    # Three files of 7 queries are searched in shards of 5 and 2: 12 answers and the probe make three shards.
    assert len(list((tmp_path / "lost/hits").glob("*.parquet"))) == 3
    retrieve(arf, small.task, small.pool, tmp_path / "lost", *words, "--service-url", service)
    assert folder_bytes(tmp_path / "lost") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("poool", "has no index 'poool'. Choose one with --service-index: pool, wide"),
        ("wide", "holds vectors of dimension 128, the queries have 16. Embed the queries with the model"),
        ("text", "has a text index and no image index"),
        ("short", "metadata has fewer rows than"),
        ("keyless", "has no 'image_path' (found: caption, id, similarity)"),
        ("ivf", "it is approximate and looks at too few of them"),
        ("twins", "names the pair '000"),  # another pool than --pool
        (None, "serves 8 indices. Choose one with --service-index: pool"),
    ],
)
def test_what_is_wrong_with_the_real_service_is_said(arf, service: str, tmp_path: Path, index, expected: str):
    write_embeddings(tmp_path / "queries", unit_vectors(3, 16, seed=1), parts=1)
    write_embeddings(tmp_path / "pool", unit_vectors(400, 16, seed=6), parts=3)  # that of the index "ivf"
    if index == "twins":
        for path in (tmp_path / "pool/metadata").iterdir():
            rows = pq.read_metadata(path).num_rows
            keys = pa.array([f"{path.stem}-{i}" for i in range(rows)])
            pq.write_table(pq.read_table(path).set_column(0, "image_path", keys), path)
    words = ("--backend", "service", "--service-url", service, *(("--service-index", index) if index else ()))
    started = time.monotonic()
    _, err = retrieve(arf, tmp_path / "queries", tmp_path / "pool", tmp_path / "H", *words, status=1)
    assert expected in err, err
    assert time.monotonic() - started < 30


def test_another_models_index_of_the_same_dimension_is_noticed(arf, service: str, tmp_path: Path):
    write_embeddings(tmp_path / "queries", unit_vectors(3, 16, seed=1), parts=1)
    write_embeddings(
        tmp_path / "pool", unit_vectors(60, 16, seed=99), parts=1
    )  # the keys of "twins", other vectors
    words = ("--backend", "service", "--service-url", service, "--service-index", "twins")
    _, err = retrieve(arf, tmp_path / "queries", tmp_path / "pool", tmp_path / "H", *words, status=1)
    assert "its index holds other vectors. Was it built with another model" in err


def test_keys_that_occur_twice_are_refused(arf, service: str, tmp_path: Path):
    write_embeddings(tmp_path / "queries", unit_vectors(3, 16, seed=1), parts=1)
    write_embeddings(tmp_path / "pool", unit_vectors(60, 16, seed=5), parts=2)
    path = tmp_path / "pool/metadata/metadata_1.parquet"
    pq.write_table(pq.read_table(tmp_path / "pool/metadata/metadata_0.parquet"), path)
    words = ("--backend", "service", "--service-url", service, "--service-index", "twins")
    _, err = retrieve(arf, tmp_path / "queries", tmp_path / "pool", tmp_path / "H", *words, status=1)
    assert "The key '00000' occurs twice in the pool" in err and "metadata_1.parquet, row 0" in err


def test_metadata_with_gaps_that_do_not_matter(arf, small: Pool, service: str, tmp_path: Path):
    """The service writes NaN for a missing caption, which is not JSON."""
    write_embeddings(tmp_path / "queries", unit_vectors(3, 16, seed=1), parts=1)
    words = ("--backend", "service", "--service-url", service, "--service-index", "gaps")
    retrieve(arf, tmp_path / "queries", small.logs / "gaps-emb", tmp_path / "H", *words)
    retrieve(arf, tmp_path / "queries", small.logs / "gaps-emb", tmp_path / "exact")
    assert_same_hits(tmp_path / "exact", tmp_path / "H")


def test_equal_vectors_are_all_returned(arf, small: Pool, service: str, tmp_path: Path):
    """The service's own client would drop them: it asks for deduplication by default."""
    vectors = np.repeat(unit_vectors(20, 16, seed=4), 3, axis=0)
    write_embeddings(tmp_path / "queries", vectors[::3], parts=1)
    words = ("--backend", "service", "--service-url", service, "--service-index", "twins")
    retrieve(arf, tmp_path / "queries", small.logs / "twins-emb", tmp_path / "H", *words, k=3)
    rows, _ = hits_of(tmp_path / "H")
    assert rows.tolist() == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(20)]


def test_what_clip_retrieval_writes_is_taken_as_it_is(
    arf, inputs: Inputs, small: Pool, environment, tmp_path: Path
):
    """Its own inference and index, with the same weights as `arf embed`, in its own environment."""
    clip = Path(inputs.clip.removeprefix("local-dir:"))
    config = json.loads((clip / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny.json").write_text(json.dumps(config))
    emb = tmp_path / "emb"
    arguments = {
        "input_dataset": small.tars, "output_folder": emb, "input_format": "webdataset", "wds_image_key": "png",
        "clip_model": f"open_clip:tiny/{clip}/open_clip_model.safetensors", "num_prepro_workers": 1, "batch_size": 7,
        "wds_number_file_per_input_file": PER_TAR, "write_batch_size": PER_TAR,
    }  # fmt: skip
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    knn_service.run_script("--models", tmp_path / "models", "--run", "inference", *words)
    theirs, ours = Embeddings(emb), Embeddings(small.pool)
    assert len(list((emb / "img_emb").iterdir())) == TARS  # so rows are in order of file names
    assert theirs.rows == ours.rows == TARS * PER_TAR and theirs.dimension == 32
    vectors = theirs.vectors(np.arange(theirs.rows))
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=2e-3)
    keys = theirs.take(np.arange(theirs.rows), ["image_path", "caption"])
    assert keys.to_pylist() == ours.take(np.arange(ours.rows), ["image_path", "caption"]).to_pylist()
    cosines = (vectors.astype(np.float32) * ours.vectors(np.arange(ours.rows)).astype(np.float32)).sum(axis=1)
    assert cosines.min() > 0.999

    index = tmp_path / "index"
    index.mkdir()
    knn_service.run_script(
        "--run", "index", "--embeddings_folder", emb, "--index_folder", index, "--nb_cores", 1
    )
    retrieve(arf, small.task, emb, tmp_path / "exact")
    retrieve(arf, small.task, emb, tmp_path / "faiss", "--backend", "faiss", "--index", index)
    assert_same_hits(tmp_path / "exact", tmp_path / "faiss")
    arf("pack", "--retrieved", tmp_path / "faiss", "--pool", small.tars, "--out", tmp_path / "A")
    with tarfile.open(tmp_path / "A/pairs/000000.tar") as tar:
        assert sum(name.endswith(".png") for name in tar.getnames()) > 20
    (emb / "img_emb/img_emb_2.npy").unlink()  # a job that did not finish
    (emb / "metadata/metadata_2.parquet").unlink()
    _, err = retrieve(arf, small.task, emb, tmp_path / "H", "--backend", "faiss", "--index", index, status=1)
    assert "image.index has 132 vectors" in err and "has 88 rows; expected one for one" in err


def test_the_script_listens_on_loopback_and_ends_with_its_parent(small: Pool, environment, tmp_path: Path):
    port = knn_service.free_port()
    command = f"bash {knn_service.SCRIPT} --index {small.flat} --port {port} --stop-after 600"
    starter = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({command.split()!r}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        last = time.monotonic() + knn_service.START
        while not knn_service.listening_addresses(port) and time.monotonic() < last:
            time.sleep(0.2)
        assert knn_service.listening_addresses(port) == {"0100007F"}
    finally:
        parent.kill()
        parent.wait()
    last = time.monotonic() + 10
    while knn_service.alive(pid) and time.monotonic() < last:
        time.sleep(0.2)
    assert not knn_service.alive(pid)
    done = subprocess.run(["bash", knn_service.SCRIPT, "--port"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--port: expected a value" in done.stderr


def test_the_service_alone_tells_the_links_of_its_pool(arf, small: Pool, environment, tmp_path: Path):
    """Its metadata has links; the pool is not at hand. What is found is what a search of the pool finds."""
    shutil.copytree(small.flat, tmp_path / "index")
    for path in (tmp_path / "index/metadata").iterdir():
        table = pq.read_table(path)
        links = [f"http://a.example/{key}.png" for key in table["image_path"].to_pylist()]
        pq.write_table(table.append_column("url", pa.array(links)), path)
    words = ["--queries", small.task, "--k", 3]
    arf("retrieve", *words, "--pool", small.pool, "--out", tmp_path / "exact")
    with knn_service.started(tmp_path / "log.txt", "--index", tmp_path / "index") as url:
        service = ["--backend", "service", "--service-url", url, "--urls-out", tmp_path / "links.parquet"]
        arf("retrieve", *words, *service, "--out", tmp_path / "hits")
    assert_same_hits(tmp_path / "exact", tmp_path / "hits")
    for link in pq.read_table(tmp_path / "links.parquet").to_pylist():
        assert link["url"] == f"http://a.example/{link['pool_id']}.png" and len(link["sha256"]) == 64
