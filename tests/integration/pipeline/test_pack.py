"""``arf pack``: the bytes of the chosen pairs, from tars by offset and by scan."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from support.building import describe, drawing, folder_bytes, unit_vectors
from support.building_fixtures import Inputs, retrieve_pairs
from support.tars import write_tar
from test_embed import write_embeddings


@pytest.fixture
def retrieved(arf, inputs: Inputs, tmp_path: Path) -> Path:
    """Hits in a pool that the test may change."""
    return retrieve_pairs(arf, inputs, tmp_path, k=3)


def samples_of(anchors: Path) -> list[dict]:
    urls = sorted(map(str, (anchors / "pairs").glob("*.tar")))
    return list(wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples()))


def test_pairs_hold_the_pools_bytes_and_their_provenance(arf, retrieved: Path, tmp_path: Path):
    out, _ = arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A", "--shard-size", 10, "--json")
    chosen = pq.read_table(retrieved / "pairs.parquet").to_pylist()
    samples = samples_of(tmp_path / "A")
    assert len(samples) == len(chosen) == json.loads(out)["pairs"]
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    for sample, pair in zip(samples, chosen, strict=True):
        index = 1000 + pair["row"]
        kind, ext = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))[index % 3]
        assert sample[ext] == drawing(index, kind, 40)
        assert sample["txt"].decode() == f"{describe(index)}, number {index}"
        provenance = json.loads(sample["json"])
        assert provenance["pool_shard"] == f"pool-{pair['row'] // 12:02d}"
        assert provenance["pool_key"] == f"{pair['row'] % 12:04d}"
        assert provenance["queries"] == pair["queries"] != []
    sizes = []
    for path in sorted((tmp_path / "A/pairs").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.uname) for m in members} == {(0, 0, "")}
        sizes.append(len(members) // 3)
    assert sizes[:-1] == [10] * (len(sizes) - 1)


def test_the_same_bytes_from_offsets_from_a_scan_and_from_compressed_tars(
    arf, retrieved: Path, tmp_path: Path
):
    arf("pack", "--retrieved", retrieved, "--out", tmp_path / "offsets")
    listing = retrieved / "pairs.parquet"
    table = pq.read_table(listing)

    unknown = tmp_path / "unknown"
    unknown.mkdir()
    offset = table.schema.get_field_index("offset")
    pq.write_table(
        table.set_column(offset, "offset", pa.array([-1] * len(table), pa.int64())), unknown / "pairs.parquet"
    )
    arf("pack", "--retrieved", unknown, "--out", tmp_path / "scan")

    packed = tmp_path / "packed"
    packed.mkdir()
    for path in (tmp_path / "pool").glob("*.tar"):
        (packed / path.name).write_bytes(gzip.compress(path.read_bytes()))
    arf("pack", "--retrieved", unknown, "--out", tmp_path / "gzip", "--pool", f"{packed}/pool-{{00..03}}.tar")

    expected = folder_bytes(tmp_path / "offsets/pairs")
    assert folder_bytes(tmp_path / "scan/pairs") == expected
    assert folder_bytes(tmp_path / "gzip/pairs") == expected


def test_unneeded_tars_are_not_opened(arf, retrieved: Path, tmp_path: Path):
    table = pq.read_table(retrieved / "pairs.parquet")
    few = table.filter(pa.compute.match_substring(table["tar"], "pool-02"))
    assert 0 < len(few) < len(table)
    (tmp_path / "few").mkdir()
    pq.write_table(few, tmp_path / "few/pairs.parquet")
    for number in (0, 1, 3):
        (tmp_path / f"pool/pool-{number:02d}.tar").unlink()
    arf("pack", "--retrieved", tmp_path / "few", "--out", tmp_path / "A")
    assert len(samples_of(tmp_path / "A")) == len(few)


def test_embeddings_of_clip_retrieval_need_the_pool(arf, tmp_path: Path):
    """Its metadata has keys only; the tars are found by scanning the pool."""
    members = [
        (f"{i:05d}{ext}", d) for i in range(40) for ext, d in ((".jpg", drawing(i)), (".txt", b"of the tar"))
    ]
    for shard in range(2):
        write_tar(tmp_path / f"pool/{shard}.tar", members[40 * shard : 40 * shard + 40])
    write_embeddings(tmp_path / "Q", unit_vectors(6, 16, seed=1))
    write_embeddings(tmp_path / "P", unit_vectors(40, 16, seed=2))
    arf("retrieve", "--queries", tmp_path / "Q", "--pool", tmp_path / "P", "--k", 2, "--out", tmp_path / "H")
    command = ("pack", "--retrieved", tmp_path / "H", "--out", tmp_path / "A")
    _, err = arf(*command, status=1)
    assert "--pool" in err
    arf(*command, "--pool", f"{tmp_path}/pool/{{0..1}}.tar")
    rows = [pair["row"] for pair in pq.read_table(tmp_path / "H/pairs.parquet").to_pylist()]
    samples = samples_of(tmp_path / "A")
    assert [sample["jpg"] for sample in samples] == [drawing(row) for row in rows]
    assert {sample["txt"] for sample in samples} == {b"c"}, "the caption that was embedded counts"

    arguments = ("pack", "--retrieved", tmp_path / "H", "--out", tmp_path / "B", "--pool")
    _, err = arf(*arguments, f"{tmp_path}/pool/0.tar", status=1)
    assert "chosen keys are in none of the 1 pool tars" in err
    write_tar(tmp_path / "pool/2.tar", members[:40])
    _, err = arf(*arguments, f"{tmp_path}/pool/{{0..2}}.tar", status=1)
    assert "is ambiguous" in err


def test_a_pool_that_has_changed_is_refused(arf, retrieved: Path, tmp_path: Path):
    write_tar(tmp_path / "pool/pool-02.tar", [(f"{i}.jpg", drawing(i, size=48)) for i in range(40)])
    _, err = arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A", status=1)
    assert "pool-02.tar does not hold the image of" in err and "has changed since it was embedded" in err


def test_damaged_images_and_missing_members_are_rejected(arf, retrieved: Path, tmp_path: Path):
    table = pq.read_table(retrieved / "pairs.parquet").to_pylist()
    victim = table[0]
    with Path(victim["tar"]).open("r+b") as tar:  # damaged on disk after it was embedded
        tar.seek(victim["offset"])
        tar.write(os.urandom(victim["size"]))
    command = ("pack", "--retrieved", retrieved, "--out", tmp_path / "A")
    _, err = arf(*command, status=1)
    assert "is not an image that PIL can read" in err
    arf(*command, "--max-bad-fraction", 0.2)
    assert len(samples_of(tmp_path / "A")) == len(table) - 1


def test_refusals(arf, tmp_path: Path):
    _, err = arf("pack", "--retrieved", tmp_path, "--out", tmp_path / "A", status=1)
    assert "Expected the output folder of: arf retrieve" in err


def test_vectors_choose_the_images_they_should(arf, tmp_path: Path):
    """A query that equals a pool vector brings that very image."""
    vectors = unit_vectors(40, 16, seed=2)
    members = [(f"{i:05d}.jpg", drawing(i)) for i in range(40)]
    write_tar(tmp_path / "pool.tar", members)
    write_embeddings(tmp_path / "P", vectors)
    write_embeddings(tmp_path / "Q", vectors[np.array([3, 17, 29])], parts=1)
    arf("retrieve", "--queries", tmp_path / "Q", "--pool", tmp_path / "P", "--k", 1, "--out", tmp_path / "H")
    arf("pack", "--retrieved", tmp_path / "H", "--out", tmp_path / "A", "--pool", tmp_path / "pool.tar")
    assert [sample["jpg"] for sample in samples_of(tmp_path / "A")] == [drawing(i) for i in (3, 17, 29)]
