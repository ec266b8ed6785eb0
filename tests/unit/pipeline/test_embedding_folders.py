"""Which vectors and which metadata of an embedding folder belong together, and what the folder is told by."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.building import unit_vectors, write_embeddings

from arf_plugin.errors import PoolError
from arf_plugin.pipeline.embeddings import Embeddings

PARTS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve files without leading zeros: number 10 stands before 2."""
    write_embeddings(tmp_path / "E", unit_vectors(36, 8, seed=0), parts=PARTS)
    return tmp_path / "E"


def keys(embeddings: Embeddings) -> list[str]:
    table = embeddings.take(np.arange(embeddings.rows), ["image_path"])
    return table["image_path"].to_pylist()


def rename(pattern: str, to: Callable[[int], str], folder: Path) -> None:
    head, _, end = pattern.partition("*")
    for number in range(PARTS):
        (folder / f"{head}{number}{end}").rename(folder / to(number))


def test_rows_are_in_the_order_of_the_names(folder: Path):
    embeddings = Embeddings(folder)
    order = [0, 1, 10, 11, *range(2, 10)]
    assert keys(embeddings) == [f"{3 * number + i:05d}" for number in order for i in range(3)]
    vectors = unit_vectors(36, 8, seed=0)
    np.testing.assert_array_equal(
        embeddings.vectors(np.arange(36)), vectors[[int(key) for key in keys(embeddings)]]
    )


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        (["img_emb/img_emb_3.npy", "metadata/metadata_7.parquet"], "metadata_3.parquet.* stand alone|img_emb_7.npy"),
        (["img_emb/img_emb_3.npy"], "has 11 files in img_emb but 12 in metadata; .* metadata_3.parquet stand"),
        (["img_emb/img_emb_3.npy", "metadata/metadata_3.parquet"], "no img_emb and no metadata of number 3, but of 11"),
        (["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"], "no img_emb and no metadata of number 0, but of 11"),
    ],
)  # fmt: skip
def test_a_partial_copy_is_refused(folder: Path, gone: list[str], expected: str):
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(PoolError, match=expected):
        _ = Embeddings(folder).rows


def test_files_are_joined_by_number_whatever_their_width(folder: Path):
    rename("metadata/metadata_*.parquet", lambda n: f"metadata/metadata_{n:04d}.parquet", folder)
    with pytest.raises(PoolError, match="not in the same order by name"):
        _ = Embeddings(folder).rows
    rename("img_emb/img_emb_*.npy", lambda n: f"img_emb/img_emb_{n:03d}.npy", folder)
    assert keys(Embeddings(folder)) == [f"{i:05d}" for i in range(36)]


def test_other_names(folder: Path, tmp_path: Path):
    shutil.copy(folder / "img_emb/img_emb_1.npy", folder / "img_emb/img_emb_01.npy")
    with pytest.raises(PoolError, match="have the same number"):
        _ = Embeddings(folder).rows
    (folder / "img_emb/img_emb_01.npy").rename(folder / "img_emb/copy.npy")
    with pytest.raises(PoolError, match=r"copy\.npy has no number at the end of its name"):
        _ = Embeddings(folder).rows
    (folder / "img_emb/copy.npy").rename(folder / f"img_emb/img_emb_{10**30}.npy")
    with pytest.raises(PoolError, match="stand alone"):
        _ = Embeddings(folder).rows
    write_embeddings(tmp_path / "one", unit_vectors(3, 8, seed=0), parts=1)
    (tmp_path / "one/img_emb/img_emb_0.npy").rename(tmp_path / "one/img_emb/all.npy")
    with pytest.raises(PoolError, match="no number"):
        _ = Embeddings(tmp_path / "one").rows
    (tmp_path / "one/metadata/metadata_0.parquet").rename(tmp_path / "one/metadata/all.parquet")
    assert Embeddings(tmp_path / "one").rows == 3


def test_files_of_killed_processes_are_no_part(folder: Path):
    shutil.copy(folder / "img_emb/img_emb_1.npy", folder / "img_emb/.incomplete-1@host@x@img_emb_1.npy")
    (folder / "metadata/.incomplete-1@host@x@metadata_1.parquet").write_bytes(b"half")
    assert Embeddings(folder).rows == 36


def test_what_would_block_is_refused(folder: Path):
    for name in ("img_emb/img_emb_1.npy", "metadata/metadata_1.parquet"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(PoolError, match="is a pipe, a socket or a device"):
            _ = Embeddings(folder).rows
        (folder / name).unlink()
        (folder / name).write_bytes(data)


def test_a_fingerprint_is_of_contents(folder: Path, tmp_path: Path):
    before = Embeddings(folder).fingerprint()
    os.utime(folder / "img_emb/img_emb_1.npy", (0, 0))
    shutil.copytree(folder, tmp_path / "copy")
    assert Embeddings(folder).fingerprint() == Embeddings(tmp_path / "copy").fingerprint() == before
    path = folder / "img_emb/img_emb_1.npy"
    stat = path.stat()
    np.save(path, unit_vectors(3, 8, seed=5))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size and time
    assert Embeddings(folder).fingerprint() != before
    path = tmp_path / "copy/metadata/metadata_0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "caption", [["d"] * 3]), path)
    assert Embeddings(tmp_path / "copy").fingerprint() != before


def test_a_folder_below_one_that_looks_like_a_column(tmp_path: Path):
    """Arrow's data sets take ``caption=x`` of a path for a column."""
    write_embeddings(tmp_path / "caption=x/E", unit_vectors(4, 8, seed=0))
    embeddings = Embeddings(tmp_path / "caption=x/E")
    assert embeddings.take(np.arange(4), ["caption"])["caption"].to_pylist() == ["c"] * 4
