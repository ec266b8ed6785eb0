"""``arf check``: each bad thing has a sentence of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.building import drawing, write_task
from support.tars import write_tar

from arf_plugin.checks.inputs import Inputs
from arf_plugin.checks.report import check_anchor_set


def write_captions(anchors: Path, rows: dict[str, object], name: str = "part-00000.parquet") -> Path:
    path = anchors / "captions" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture
def task(tmp_path: Path) -> str:
    return write_task(tmp_path / "task", shards=2, per_shard=4)


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    """A hand-made set that fits the task: no manifest, captions and pairs."""
    folder = tmp_path / "A"
    ids = [f"{i // 4:03d}/{i:05d}" for i in range(8)]
    write_captions(folder, {"id": ids, "caption": [f"caption {i}" for i in range(8)]})
    members = []
    for i in range(5):
        members += [(f"{i}.jpg", drawing(i)), (f"{i}.txt", f"pair {i}".encode())]
    write_tar(folder / "pairs/000000.tar", members)
    return folder


@pytest.fixture
def check(arf, task: str, anchors: Path):
    """Runs arf check --json on the set; returns the report."""

    def run(*more: object, status: int, train_data: object = task) -> dict:
        out, _ = arf("check", anchors, "--train-data", train_data, *more, "--json", status=status)
        return json.loads(out)

    return run


def test_a_hand_made_set_is_good(arf, check, anchors: Path, task: str):
    report = check(status=0)
    assert report["captions"] == {"rows": 8, "samples": 8, "mean_length": 9.0, "repeated": 0}
    assert (report["pairs"]["count"], report["pairs"]["shards"]) == (5, 1)
    assert report["coverage"] | {"missing_examples": 0} == {
        "samples": 8, "covered": 8, "percent": 100.0, "missing": 0, "missing_examples": 0, "unused": 0,
    }  # fmt: skip
    out, _ = arf("check", anchors, "--train-data", task)
    assert "8 of 8 samples have a caption (100.0%)" in out and out.strip().endswith("all good")


def test_either_half_may_be_absent(check, anchors: Path):
    shutil.rmtree(anchors / "pairs")
    assert check(status=0)["pairs"] is None
    write_tar(anchors / "pairs/0.tar", [("a.jpg", drawing(0)), ("a.txt", b"t")])
    shutil.rmtree(anchors / "captions")
    report = check(status=0)
    assert report["captions"] is None and report["coverage"] is None and report["pairs"]["count"] == 1


def only_error(report: dict) -> str:
    assert len(report["errors"]) == 1, report["errors"]
    return report["errors"][0]


def test_missing_and_empty_folders(arf, tmp_path: Path):
    out, _ = arf("check", tmp_path / "absent", status=1)
    assert "is not a folder" in out and "arf anchors" in out
    (tmp_path / "empty").mkdir()
    out, _ = arf("check", tmp_path / "empty", status=1)
    assert "no captions/*.parquet and no pairs/*.tar (found: nothing)" in out


def test_one_missing_caption(check, anchors: Path):
    write_captions(anchors, {"id": [f"{i // 4:03d}/{i:05d}" for i in range(7)], "caption": ["c"] * 7})
    report = check(status=1)
    assert "No caption for task sample 001/00007;" in only_error(report)
    assert report["coverage"]["missing_examples"] == ["001/00007"]
    report = check("--arf-missing-caption", "prompt", status=0)
    assert "their class prompt takes its place" in report["warnings"][0]


def test_captions_of_other_data(check, anchors: Path):
    write_captions(anchors, {"id": ["train/1", "train/2"], "caption": ["a", "b"]})
    error = only_error(check(status=1))
    assert "cover none of the 8 task samples" in error and "'000/00000'" in error and "'train/1'" in error


def test_captions_that_are_not_used_are_a_warning(check, anchors: Path):
    write_captions(anchors, {"id": ["other/1"], "caption": ["a"]}, "part-00001.parquet")
    assert "1 samples with captions are not in the task data" in check(status=0)["warnings"][0]


def test_repeated_captions_are_a_warning(check, anchors: Path):
    write_captions(anchors, {"id": ["000/00000"], "caption": ["caption 0"]}, "part-00001.parquet")
    assert "1 captions repeat" in check(status=0)["warnings"][0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"key": ["000/00000"], "text": ["a"]}, "no column 'id'"),
        ({"id": ["000/00000"], "caption": [1.5]}, "column 'caption' holds double, expected string"),
        ({"id": ["000/00000", "000/00001"], "caption": ["a", " "]}, "row 1: caption is ' '"),
        ({"id": ["000/00000", "000/00001"], "caption": ["a", None]}, "row 1: caption is None"),
        ({"id": ["000/00000"], "caption": ["a\0b"]}, "row 0: caption is 'a\\x00b'"),
        (
            {"id": ["000/00000"], "caption": pa.array([b"caf\xe9"], pa.binary())},
            "row 0: caption is not UTF-8",
        ),
    ],
)
def test_bad_caption_files(check, anchors: Path, rows: dict[str, object], expected: str):
    write_captions(anchors, rows)
    error = only_error(check(status=1))
    assert expected in error and "part-00000.parquet" in error


def test_a_caption_file_that_is_no_parquet(check, anchors: Path):
    path = anchors / "captions/part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    assert "part-00000.parquet is no readable parquet file" in only_error(check(status=1))


def test_repeated_pair_images_are_found_by_full(check, anchors: Path):
    write_tar(anchors / "pairs/000001.tar", [("x.jpg", drawing(3)), ("x.txt", b"again")])
    assert check(status=0)["pairs"]["repeated"] is None
    report = check("--full", status=0)
    assert report["pairs"]["repeated"] == 1 and "1 pairs repeat the image" in report["warnings"][0]


def test_every_bad_pair_is_named(check, anchors: Path):
    write_tar(anchors / "pairs/000001.tar", [
        ("cut.jpg", drawing(0)[:300]), ("cut.txt", b"t"), ("mute.jpg", drawing(1)), ("latin.jpg", drawing(2)),
        ("latin.txt", b"caf\xe9"), ("empty.png", drawing(3, "PNG")), ("empty.txt", b"\n"), ("blind.txt", b"t"),
    ])  # fmt: skip
    errors = {error.split("pair ")[1].split(":")[0]: error for error in check(status=1)["errors"]}
    assert all("000001.tar" in error for error in errors.values())
    assert "cannot be decoded" in errors["cut"]
    assert "has no txt" in errors["mute"]
    assert "not UTF-8" in errors["latin"]
    assert "empty txt" in errors["empty"]
    assert "has no image" in errors["blind"]
    assert len(errors) == 5


def test_damaged_pair_tars(check, anchors: Path):
    path = anchors / "pairs/000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert "000000.tar is cut off" in only_error(check(status=1))
    path.write_bytes(b"")
    assert "000000.tar is cut off or corrupt after the start: empty file" in only_error(check(status=1))
    write_tar(path, [("../a.jpg", drawing(0)), ("../a.txt", b"t")])
    assert "leaves the folder: '../a.jpg'" in only_error(check(status=1))
    write_tar(
        path,
        [("a.jpg", drawing(0)), ("a.txt", b"t"), ("b.jpg", drawing(0)), ("b.txt", b"t"), ("a.txt", b"t")],
    )
    assert "has the key 'a' twice" in only_error(check(status=1))


def test_full_finds_what_the_end_markers_hide(check, anchors: Path):
    damaged = bytearray(drawing(0, "PNG", 64))
    damaged[60:90] = b"\0" * 30
    write_tar(anchors / "pairs/000000.tar", [("a.png", bytes(damaged)), ("a.txt", b"t")])
    assert check(status=0)["errors"] == []
    assert "pair a: cannot be decoded" in only_error(check("--full", status=1))


def test_task_data_with_mistakes(check, task: str, tmp_path: Path):
    assert "does not exist" in only_error(check(train_data=tmp_path / "absent.tar", status=1))
    twice = f"{task}::{write_task(tmp_path / 'again', shards=1)}"
    assert "'000/00000' occurs twice" in only_error(check(train_data=twice, status=1))
    members = [(f"{i:05d}.jpg", drawing(i)) for i in range(4)]
    write_tar(
        tmp_path / "task/000.tar", [*members[:3], ("00003.jpg", drawing(3)[:300]), ("x.txt", b"no image")]
    )
    warnings = check(status=0)["warnings"]
    assert "1 task samples have no image, the first being 000/x" in warnings[0]
    assert "000/00003 cannot be decoded" in warnings[1]
    assert "no txt" in warnings[2] and "--arf-classnames" in warnings[2]


def test_a_csv_as_task_data(arf, anchors: Path, tmp_path: Path):
    paths = []
    for i in range(3):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(drawing(i))
        paths.append(str(path))
    csv = tmp_path / "train.csv"
    pd.DataFrame({"img": paths, "cap": "x"}).to_csv(csv, index=False, sep=";")
    write_captions(anchors, {"id": paths, "caption": ["a", "b", "c"]})
    flags = ("--csv-img-key", "img", "--csv-separator", ";")
    out, _ = arf("check", anchors, "--train-data", csv, *flags)
    assert "3 of 3 samples" in out
    out, _ = arf("check", anchors, "--train-data", csv, status=1)
    assert "no column 'filepath'" in out


def test_a_manifest_of_the_future_is_refused(check, anchors: Path):
    (anchors / "anchors.json").write_text('{"format_version": 99}')
    assert "format_version 99" in only_error(check(status=1))
    (anchors / "anchors.json").write_text("{")
    assert "is no JSON" in only_error(check(status=1))


def test_a_set_may_be_a_url(anchors: Path):
    report = check_anchor_set(Inputs(f"file://{anchors}"))
    assert report.errors == []
    assert report.captions is not None and report.captions["rows"] == 8
    assert report.pairs is not None and report.pairs["count"] == 5
