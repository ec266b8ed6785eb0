"""``arf download`` by the real img2dataset, out of the environment that scripts/knn_service.sh makes; links lead to a
server on 127.0.0.1 that has lost, changed or forbidden some of its images."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import knn_service
from support.building import describe, drawing
from support.image_server import ImageServer
from support.tars import write_tar

pytestmark = pytest.mark.slow
LINKS, DEAD, SWAPPED = 200, 60, 10
DEAD_AS = (404, 410, 503, "drop", "html", "noai", "truncate")
SIZE = 40


@pytest.fixture(scope="module")
def img2dataset() -> list[object]:
    """The flag that names its environment."""
    knn_service.make_environment()
    return ["--python", knn_service.python()]


def images(count: int) -> dict[int, bytes]:
    """Different JPEGs, the first larger than those of the pool are to be."""
    found = {number: drawing(number, size=SIZE) for number in range(count)}
    return found | {0: drawing(0, size=4 * SIZE)}


def write_links(path: Path, server: ImageServer, count: int, **others: object) -> Path:
    rows = [
        {"url": server.link(n), "caption": describe(n), "pool_id": f"p{n}"}
        | {"sha256": hashlib.sha256(server.images[n]).hexdigest()}
        for n in range(count)
    ]
    pq.write_table(pa.Table.from_pylist([*rows, *others.values()]), path)
    return path


def samples(pool: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(pool.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, ext = member.name.split(".")
                found.setdefault(key, {})[ext] = tar.extractfile(member).read()
    return found


def test_what_arrives_is_what_was_meant_and_the_rest_is_counted(arf, inputs, img2dataset, tmp_path: Path):
    """A pool in clip-retrieval's layout with links; 30 % of them dead in seven ways, 5 % lead to another image."""
    draw = random.Random(0).sample(range(1, LINKS), DEAD + SWAPPED)
    faults = {number: DEAD_AS[i % len(DEAD_AS)] for i, number in enumerate(draw[:DEAD])}
    faults |= dict.fromkeys(draw[DEAD:], "swap")
    with ImageServer(images(LINKS), faults) as server:
        members = [(f"{n:04d}.{ext}", data) for n, image in server.images.items()
                   for ext, data in (("jpg", image), ("txt", f"{describe(n)} {n}".encode()))]  # fmt: skip
        write_tar(tmp_path / "all.tar", members)
        model = ["--model", inputs.clip]
        arf("embed", "--pool", tmp_path / "all.tar", *model, "--out", tmp_path / "E")
        arf("embed", "--train-data", inputs.task, *model, "--out", tmp_path / "T")
        path = next((tmp_path / "E/metadata").iterdir())
        known = pq.read_table(path).select(["image_path", "caption", "sha256"])
        links = [server.link(int(key)) for key in known["image_path"].to_pylist()]
        pq.write_table(known.append_column("url", pa.array(links)), path)

        hits = tmp_path / "hits.parquet"
        words = ["--queries", tmp_path / "T", "--pool", tmp_path / "E", "--out", tmp_path / "H"]
        _, err = arf("retrieve", *words, "--k", LINKS // 2, "--over", 2, "--urls-out", hits)
        chosen = pq.read_table(hits).to_pylist()
        assert f"{len(chosen)} links" in err and len(chosen) == LINKS
        out, _ = arf("download", hits, "--out", tmp_path / "pool", "--image-size", SIZE, *img2dataset)
        assert server.asked.total() == LINKS  # each once, and nothing else

    arrived = set(range(LINKS)) - set(draw)
    counts = json.loads((tmp_path / "pool/download.json").read_text())
    assert (counts["links"], counts["arrived"]) == (LINKS, len(arrived))
    by_kind = {kind: sum(fault == kind for fault in faults.values()) for kind in (*DEAD_AS, "swap")}
    assert counts["missing"] == {
        **{f"HTTP {status}": by_kind[status] for status in (404, 410, 503)},
        "no connection": by_kind["drop"], "no image": by_kind["html"], "incomplete": by_kind["truncate"],
        "not to be used (noai, noindex)": by_kind["noai"], "another image": by_kind["swap"],
    }  # fmt: skip
    assert "another image" in out and str(by_kind["swap"]) in out
    found = samples(tmp_path / "pool")
    assert {int(json.loads(sample["json"])["pool_id"]) for sample in found.values()} == arrived
    for key, sample in found.items():
        said, row = json.loads(sample["json"]), chosen[int(key)]
        number = int(said["pool_id"])
        assert {name: said[name] for name in row} == row and sample["txt"].decode() == row["caption"]
        if number:
            assert sample["jpg"] == server.images[number]
        else:  # larger than --image-size
            assert Image.open(io.BytesIO(sample["jpg"])).size == (SIZE, SIZE)

    # The pool as it was chosen, by pool_id, and as a pool of its own.
    out, err = arf(
        "pack", "--retrieved", tmp_path / "H", "--pool", tmp_path / "pool/00000.tar", "--out", tmp_path / "A"
    )
    assert f"{DEAD + SWAPPED} of {LINKS} chosen pairs were not downloaded" in err
    packed = samples(tmp_path / "A/pairs")
    assert {int(json.loads(sample["json"])["pool_id"]) for sample in packed.values()} == arrived
    assert {sample["jpg"] for sample in packed.values()} == {sample["jpg"] for sample in found.values()}
    arf("embed", "--pool", tmp_path / "pool/00000.tar", *model, "--out", tmp_path / "again")


def test_only_links_of_the_list_are_opened(arf, img2dataset, tmp_path: Path):
    """No file, no other scheme, and no address of this machine that a server redirects to."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(drawing(5))
    row = {"caption": "c", "pool_id": "p", "sha256": None}
    with ImageServer(images(1), {}) as other, ImageServer(images(4), {1: other.link(0)}) as server:
        server.faults |= {2: server.link(3), 3: f"file://{secret}"}
        bad = {
            str(i): row | {"url": url}
            for i, url in enumerate([f"file://{secret}", "ftp://127.0.0.1/a.jpg", "a"])
        }
        links = write_links(tmp_path / "links.parquet", server, 4, **bad)
        arf("download", links, "--out", tmp_path / "pool", *img2dataset)
    assert not other.asked and server.asked[2] == 1
    counts = json.loads((tmp_path / "pool/download.json").read_text())
    assert counts["arrived"] == 1 and counts["missing"] == {
        "no link of http or https": 3,
        "redirected to elsewhere": 3,
    }


def test_a_killed_download_goes_on_and_ends_with_the_same_bytes(arf, img2dataset, tmp_path: Path):
    with ImageServer(images(20), {}) as server:
        links = write_links(tmp_path / "links.parquet", server, 20)
        words = ["download", str(links), "--shard-size", "10", *map(str, img2dataset), "--threads", "3"]
        arf(*words, "--out", tmp_path / "whole")
        killed = tmp_path / "killed"
        process = subprocess.Popen(
            [sys.executable, "-m", "arf_plugin.cli.main", *words, "--out", str(killed)]
        )
        while not (killed / "00000.tar").exists() or not list((killed / "work/download").glob("raw-*/out")):
            assert process.poll() is None
            time.sleep(0.02)
        raw = next((killed / "work/download").glob("raw-*"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = time.monotonic() + 60
        while any(str(raw) in line for line in _commands()):
            assert time.monotonic() < last, "img2dataset goes on without the process that started it"
            time.sleep(0.1)
        asked = server.asked.total()
        arf(*words, "--out", killed)
        assert server.asked.total() - asked == 10  # the first shard was done
    whole, resumed = ([p.read_bytes() for p in sorted(d.glob("*.tar"))] for d in (tmp_path / "whole", killed))
    assert whole == resumed and len(samples(killed)) == 20
    assert not list((killed / "work/download").glob("raw-*"))


def test_a_lost_network_is_no_dead_links(arf, img2dataset, tmp_path: Path):
    """A shard of which nothing could be reached is not done: the same command tries again."""
    with ImageServer(images(50), {}) as server:
        links = write_links(tmp_path / "links.parquet", server, 50)
        words = ["download", links, "--out", tmp_path / "pool", *img2dataset]
        server.faults = dict.fromkeys(range(50), "drop")
        _, err = arf(*words, status=1)
        assert "could be reached" in err and server.link(0) in err
        server.faults = {}
        arf(*words)
    assert len(samples(tmp_path / "pool")) == 50


def test_an_environment_without_img2dataset_is_said_at_once(arf, tmp_path: Path):
    with ImageServer(images(1), {}) as server:
        links = write_links(tmp_path / "links.parquet", server, 1)
        _, err = arf("download", links, "--out", tmp_path / "pool", status=1)
        assert "arf-plugin[download]" in err
        _, err = arf("download", links, "--out", tmp_path / "pool", "--python", tmp_path / "none", status=1)
        assert "cannot be run" in err
        assert not server.asked


def _commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace"))
    return found
