"""A pair is the image and the text that were embedded, whatever its tar is called and wherever it lies."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.building import unit_vectors, write_embeddings
from support.building_fixtures import Inputs
from support.tars import write_tar
from test_pack import samples_of

PER_TAR = 9


def picture(index: int) -> bytes:
    """Images of equal size, all different."""
    noise = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def text(index: int) -> str:
    return f"pair {index:05d}"


def members(
    first: int, order: list[int] | None = None, keys: list[int] | None = None
) -> list[tuple[str, bytes]]:
    """Samples of a tar, in an order, each under the key of another where that is asked for."""
    order = order or list(range(PER_TAR))
    keys = keys or list(range(PER_TAR))
    return [
        (f"{keys[i]:09d}.{ext}", data)
        for i in order
        for ext, data in (("png", picture(first + i)), ("txt", text(first + i).encode()))
    ]


@pytest.fixture
def pool(tmp_path: Path) -> list[Path]:
    """Two sets as img2dataset writes them: names of tars and keys are the same in both."""
    return [
        write_tar(tmp_path / f"{name}/00000.tar", members(first))
        for name, first in (("cc3m", 100), ("cc12m", 200))
    ]


@pytest.fixture
def retrieved(arf, inputs: Inputs, pool: list[Path], tmp_path: Path) -> Path:
    """All pairs of both sets."""
    urls = "::".join(map(str, pool))
    arf("embed", "--pool", urls, "--model", inputs.clip, "--out", tmp_path / "P")
    arf("embed", "--task-data", inputs.task, "--model", inputs.clip, "--out", tmp_path / "Q")
    retrieve = ("retrieve", "--queries", tmp_path / "Q", "--pool", tmp_path / "P", "--k", 2 * PER_TAR)
    arf(*retrieve, "--out", tmp_path / "H")
    return tmp_path / "H"


def packed(folder: Path) -> list[tuple[bytes, str]]:
    return [(sample["png"], sample["txt"].decode()) for sample in samples_of(folder)]


RIGHT = [(picture(first + i), text(first + i)) for first in (100, 200) for i in range(PER_TAR)]


def edit(listing: Path, change: Callable[[list[dict]], object], drop: tuple[str, ...] = ()) -> None:
    """Changes the rows of a parquet file."""
    table = pq.read_table(listing)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema).drop_columns(list(drop)), listing)


def move(pool: list[Path], folder: Path, compress: bool) -> str:
    """Moves both sets, in the other order; returns their URLs."""
    urls = []
    for path in reversed(pool):
        new = folder / path.parent.name / (path.name + (".gz" if compress else ""))
        new.parent.mkdir(parents=True)
        data = path.read_bytes()
        new.write_bytes(gzip.compress(data) if compress else data)
        path.unlink()
        urls.append(str(new))
    return "::".join(urls)


@pytest.mark.parametrize("how", ["named", "unnamed", "moved", "compressed"])
def test_two_tars_of_one_name(arf, pool: list[Path], retrieved: Path, tmp_path: Path, how: str):
    more: tuple[object, ...] = ()
    if how == "named":
        more = ("--pool", "::".join(map(str, reversed(pool))))
    if how in ("moved", "compressed"):
        more = ("--pool", move(pool, tmp_path / "new", how == "compressed"))
    _, err = arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A", *more)
    assert packed(tmp_path / "A") == RIGHT and "verified" not in err
    digests = [json.loads(sample["json"])["sha256"] for sample in samples_of(tmp_path / "A")]
    assert len(set(digests)) == len(RIGHT)


@pytest.mark.parametrize("digests", [True, False])
def test_content_tells_tars_apart_where_no_path_does(
    arf, pool: list[Path], retrieved: Path, tmp_path: Path, digests: bool
):
    for path, new in zip(pool, ("one", "two"), strict=True):
        (tmp_path / new).mkdir()
        path.rename(tmp_path / new / path.name)
    edit(retrieved / "pairs.parquet", lambda rows: None, () if digests else ("sha256",))
    words = (
        *("pack", "--retrieved", retrieved),
        *("--pool", f"{tmp_path}/two/00000.tar::{tmp_path}/one/00000.tar"),
    )
    _, err = arf(*words, "--out", tmp_path / "A")
    assert packed(tmp_path / "A") == RIGHT
    assert ("18 of 18 pairs have no digest" in err) == (not digests)


def test_copies_are_as_good_and_doubtful_ones_are_not(arf, pool: list[Path], retrieved: Path, tmp_path: Path):
    """Two tars of one name with equal contents do with digests; without, they are one too many."""
    for new in ("one", "two"):
        (tmp_path / new).mkdir()
        shutil.copy(pool[0], tmp_path / new / pool[0].name)
    pool[0].unlink()
    edit(retrieved / "pairs.parquet", lambda rows: rows.__delitem__(slice(PER_TAR, None)))
    words = (
        *("pack", "--retrieved", retrieved),
        *("--pool", f"{tmp_path}/one/00000.tar::{tmp_path}/two/00000.tar"),
    )
    arf(*words, "--out", tmp_path / "A")
    assert packed(tmp_path / "A") == RIGHT[:PER_TAR]
    write_tar(
        tmp_path / "two/00000.tar", members(300)[::2] + members(100)[1::2]
    )  # the same texts, other images
    arf(*words, "--out", tmp_path / "B")
    assert packed(tmp_path / "B") == RIGHT[:PER_TAR]
    shutil.copy(tmp_path / "one/00000.tar", tmp_path / "two/00000.tar")
    edit(retrieved / "pairs.parquet", lambda rows: None, ("sha256",))
    _, err = arf(*words, "--out", tmp_path / "C", status=1)
    assert "nothing tells which of them was embedded" in err


@pytest.mark.parametrize("digests", [True, False])
def test_a_tar_that_was_written_in_another_order(
    arf, pool: list[Path], retrieved: Path, tmp_path: Path, digests: bool
):
    """The same samples elsewhere in the tar are found; other samples of the same sizes and keys are refused."""
    edit(retrieved / "pairs.parquet", lambda rows: None, () if digests else ("sha256",))
    backwards = list(range(PER_TAR))[::-1]
    write_tar(pool[0], members(100, order=backwards))
    arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A")
    assert packed(tmp_path / "A") == RIGHT
    write_tar(pool[0], members(300) if digests else members(100, keys=backwards))
    _, err = arf("pack", "--retrieved", retrieved, "--out", tmp_path / "B", status=1)
    assert "cc3m/00000.tar does not hold the image of" in err and "has changed since it was embedded" in err
    assert not list((tmp_path / "B/pairs").glob("*.tar"))


def test_a_key_that_a_tar_has_twice(arf, inputs: Inputs, tmp_path: Path):
    """Samples of one key apart from each other: the image that was embedded is taken for each."""
    pool = write_tar(tmp_path / "p.tar", members(100) + members(200, order=[0, 1]))
    for flag, data, name in (("--pool", pool, "P"), ("--task-data", inputs.task, "Q")):
        arf("embed", flag, data, "--model", inputs.clip, "--out", tmp_path / name)
    words = ("--queries", tmp_path / "Q", "--pool", tmp_path / "P", "--k", 11)
    arf("retrieve", *words, "--out", tmp_path / "H")
    arf("pack", "--retrieved", tmp_path / "H", "--out", tmp_path / "A")
    write_tar(pool, members(200, order=[1, 0]) + members(100))
    arf("pack", "--retrieved", tmp_path / "H", "--out", tmp_path / "B")
    assert (
        packed(tmp_path / "A") == packed(tmp_path / "B") == [*RIGHT[:PER_TAR], *RIGHT[PER_TAR : PER_TAR + 2]]
    )


def test_texts_tell_apart_what_clip_retrieval_has_embedded(arf, pool: list[Path], tmp_path: Path):
    """Its metadata name no tar: keys that occur in two tars are told apart by their texts."""
    write_embeddings(tmp_path / "P", unit_vectors(2 * PER_TAR, 16, seed=2), parts=1)
    write_embeddings(tmp_path / "Q", unit_vectors(4, 16, seed=1), parts=1)

    def name(rows: list[dict]) -> None:
        for i, row in enumerate(rows):
            row |= {"image_path": f"{i % PER_TAR:09d}", "caption": RIGHT[i][1]}

    edit(tmp_path / "P/metadata/metadata_0.parquet", name)
    words = ("--queries", tmp_path / "Q", "--pool", tmp_path / "P", "--k", 2 * PER_TAR)
    arf("retrieve", *words, "--out", tmp_path / "H")
    urls = "::".join(map(str, pool))
    pack = ("pack", "--retrieved", tmp_path / "H", "--pool", urls, "--out")
    _, err = arf(*pack, tmp_path / "A")
    assert packed(tmp_path / "A") == RIGHT and "could not be verified" in err
    write_tar(pool[1], members(200, keys=[1, 0, *range(2, PER_TAR)]))
    _, err = arf(*pack, tmp_path / "B", status=1)
    assert "is ambiguous" in err


def test_captions_that_are_no_longer_those_of_the_tars(arf, pool: list[Path], tmp_path: Path):
    """Most are: then those that are not have been changed. None are: they may come from elsewhere, which is said."""
    write_embeddings(tmp_path / "P", unit_vectors(PER_TAR, 16, seed=2), parts=1)
    write_embeddings(tmp_path / "Q", unit_vectors(4, 16, seed=1), parts=1)

    def name(rows: list[dict]) -> None:
        for i, row in enumerate(rows):
            row |= {"image_path": f"{i:09d}", "caption": RIGHT[i][1]}

    edit(tmp_path / "P/metadata/metadata_0.parquet", name)
    words = ("--queries", tmp_path / "Q", "--pool", tmp_path / "P", "--k", PER_TAR)
    arf("retrieve", *words, "--out", tmp_path / "H")
    pack = ("pack", "--retrieved", tmp_path / "H", "--pool", pool[0], "--out")
    write_tar(pool[0], members(100, keys=[1, 0, *range(2, PER_TAR)]))
    _, err = arf(*pack, tmp_path / "A", status=1)
    assert "The texts of 2 of 9 chosen pairs are not those of the pool's tars" in err
    write_tar(pool[0], members(300))
    _, err = arf(*pack, tmp_path / "B")
    assert "these are the wrong images" in err


LOCATIONS = [
    *(
        "pipe:touch {mark}; cat x.tar",
        "pipe: touch {mark} #a.tar",
        "pipe:",
        " pipe:touch {mark}",
        "PIPE:touch {mark}",
    ),
    *(
        "file:pipe:touch {mark}",
        "https://127.0.0.1:9/00000.tar",
        "simplecache::https://127.0.0.1:9/00000.tar",
    ),
    *(
        "local::/etc/passwd",
        "file:///nowhere/00000.tar",
        "../../etc",
        "C:\\pool\\00000.tar",
        "/dev/zero",
        "/etc",
    ),
    *("a\0b.tar", "x" * 5000, "::", "memory://00000.tar"),
]


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_location_in_data_is_never_opened(arf, retrieved: Path, tmp_path: Path, location: str):
    mark = tmp_path / "mark"
    location = location.format(mark=mark)
    edit(retrieved / "pairs.parquet", lambda rows: rows[3].update(tar=location))
    _, err = arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A", status=1)
    assert "--pool" in err and "Traceback" not in err and "names the tar" in err
    assert not mark.exists() and not list((tmp_path / "A").glob("pairs/*.tar"))


def test_a_command_that_the_user_names_is_run(arf, pool: list[Path], retrieved: Path, tmp_path: Path):
    command = f"pipe:cat {pool[0]}"
    edit(retrieved / "pairs.parquet", lambda rows: [row.update(tar=command) for row in rows[:PER_TAR]])
    _, err = arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A", status=1)
    assert "is not opened because data say so" in err
    arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A", "--pool", command)
    assert packed(tmp_path / "A") == RIGHT


def test_a_recorded_path_may_be_any_file_but_must_hold_the_pairs(
    arf, retrieved: Path, pool: list[Path], tmp_path: Path
):
    link = tmp_path / "link.tar"
    link.symlink_to(pool[0])
    edit(retrieved / "pairs.parquet", lambda rows: [row.update(tar=str(link)) for row in rows[:PER_TAR]])
    arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A")
    assert packed(tmp_path / "A") == RIGHT
    edit(retrieved / "pairs.parquet", lambda rows: rows[0].update(tar="/etc/passwd"))
    _, err = arf("pack", "--retrieved", retrieved, "--out", tmp_path / "B", status=1)
    assert "/etc/passwd" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "../../x"},
        {"similarity": float("nan")},
        {"image_path": None},
        {"offset": -7},
        {"query_similarities": [None]},
    ],
)
def test_a_list_of_pairs_that_was_changed(arf, retrieved: Path, tmp_path: Path, change: dict):
    edit(retrieved / "pairs.parquet", lambda rows: rows[2].update(change))
    _, err = arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A", status=1)
    assert "pairs.parquet" in err and "Traceback" not in err


def test_offsets_and_endings_of_the_list_lead_nowhere_else(arf, retrieved: Path, tmp_path: Path):
    """Neither a place beyond the tar nor an ending with a path in it changes what is packed."""
    changes = [
        {"offset": 1 << 60},
        {"size": 1 << 61},
        {"offset": 0},
        {"ext": "../../../evil"},
        {"ext": "jpg"},
    ]

    def change(rows: list[dict]) -> None:
        for row, values in zip(rows, changes, strict=False):
            row.update(values)

    edit(retrieved / "pairs.parquet", change)
    arf("pack", "--retrieved", retrieved, "--out", tmp_path / "A")
    with tarfile.open(tmp_path / "A/pairs/000000.tar") as tar:
        names = tar.getnames()
    assert {name.split(".", 1)[1] for name in names} == {"png", "txt", "json"}
    assert packed(tmp_path / "A") == RIGHT


def test_names_that_are_not_utf8(arf, inputs: Inputs, tmp_path: Path):
    """Folder, tar and keys in Latin-1, from the pool into the anchors."""
    folder = tmp_path / "stra\udcdfe"
    write_tar(folder / "b\udce4r.tar", [(f"stra\udcdfe_{name}", data) for name, data in members(100)])
    for flag, data, name in (("--pool", folder / "b\udce4r.tar", "P"), ("--task-data", inputs.task, "Q")):
        arf("embed", flag, data, "--model", inputs.clip, "--out", folder / name)
    arf("retrieve", "--queries", folder / "Q", "--pool", folder / "P", "--k", PER_TAR, "--out", folder / "H")
    arf("pack", "--retrieved", folder / "H", "--out", folder / "A")
    arf("pack", "--retrieved", folder / "H", "--pool", folder / "b\udce4r.tar", "--out", folder / "B")
    for name in "AB":
        tars = sorted((folder / name / "pairs").glob("*.tar"))
        with tarfile.open(tars[0]) as tar:
            images = [tar.extractfile(member).read() for member in tar if member.name.endswith(".png")]  # type: ignore[union-attr]
        assert images == [image for image, _ in RIGHT[:PER_TAR]]


def test_system_files_of_a_pool_tar_are_no_samples(arf, inputs: Inputs, tmp_path: Path):
    strays = [("README.md", b"read me"), ("._0.png", b"\0\5\x16\7"), (".DS_Store", b"x")]
    pool = write_tar(tmp_path / "p.tar", [*strays, *members(100)])
    out, _ = arf("embed", "--pool", pool, "--model", inputs.clip, "--out", tmp_path / "P", "--json")
    assert json.loads(out)["kept"] == PER_TAR
