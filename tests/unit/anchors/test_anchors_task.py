"""Ids of task data from tars and CSVs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from support.building import drawing, write_task
from support.tars import write_tar

from arf_plugin.anchors import scan as scan_module
from arf_plugin.anchors.task import expand_urls, is_csv, scan_task_ids
from arf_plugin.errors import TaskDataError


def test_ids_of_shards(tmp_path: Path):
    scan = scan_task_ids(write_task(tmp_path, shards=2, per_shard=3))
    assert scan.ids == ["000/00000", "000/00001", "000/00002", "001/00003", "001/00004", "001/00005"]
    assert (scan.shards, scan.without_text, scan.without_class, scan.unreadable) == (2, 6, 0, {})


def test_what_samples_lack_is_counted(tmp_path: Path):
    cut = drawing(1)[:200]
    path = write_tar(
        tmp_path / "x.tar",
        [("a.jpg", drawing(0)), ("a.txt", b"a"), ("b.txt", b"b"), ("c.jpg", cut), ("c.cls", b"1")],
    )
    scan = scan_task_ids(str(path))
    assert scan.ids == ["x/a", "x/c"]
    assert scan.without_image == ["x/b"]
    assert (scan.without_text, scan.without_class) == (1, 1)
    assert list(scan.unreadable) == ["x/c"]


def test_scans_are_cached_until_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", drawing(0))])
    assert scan_task_ids(str(path)).ids == ["x/a"]
    real = scan_module.scan_samples
    calls: list[str] = []
    monkeypatch.setattr(
        scan_module, "scan_samples", lambda url, *a, **k: (calls.append(url), real(url, *a, **k))[1]
    )
    assert scan_task_ids(str(path)).ids == ["x/a"]
    assert calls == []
    write_tar(path, [("a.jpg", drawing(0)), ("b.jpg", drawing(1)), ("c.jpg", drawing(2))])
    assert scan_task_ids(str(path)).ids == ["x/a", "x/b", "x/c"]
    assert calls == [str(path)]


def test_a_damaged_cache_is_as_good_as_none(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", drawing(0))])
    scan_task_ids(str(path))
    files = list((tmp_path / "cache/scans").iterdir())
    assert len(files) == 1
    files[0].write_text('{"scan": {"url"')
    assert scan_task_ids(str(path)).ids == ["x/a"]


def test_duplicate_keys_in_one_shard(tmp_path: Path):
    path = write_tar(
        tmp_path / "x.tar", [("a.jpg", drawing(0)), ("b.jpg", drawing(1)), ("a.jpg", drawing(2))]
    )
    with pytest.raises(TaskDataError, match=r"x\.tar has the key 'a' twice"):
        scan_task_ids(str(path))


def test_duplicate_ids_in_two_folders_name_both(tmp_path: Path):
    one, two = write_task(tmp_path / "one", shards=1), write_task(tmp_path / "two", shards=1)
    with pytest.raises(TaskDataError) as caught:
        scan_task_ids(f"{one}::{two}")
    text = str(caught.value)
    assert "'000/00000' occurs twice" in text and "one/000.tar" in text and "two/000.tar" in text


def test_one_shard_name_in_two_folders_is_fine_with_different_keys(tmp_path: Path):
    one = write_tar(tmp_path / "one/x.tar", [("a.jpg", drawing(0))])
    two = write_tar(tmp_path / "two/x.tar", [("b.jpg", drawing(0))])
    assert scan_task_ids(f"{one}::{two}").ids == ["x/a", "x/b"]


def test_a_shard_named_twice_is_refused(tmp_path: Path):
    url = write_task(tmp_path, shards=2)
    with pytest.raises(TaskDataError, match=r"001\.tar is named 2 times"):
        scan_task_ids(f"{url}::{tmp_path}/001.tar")


def test_data_without_images_is_refused(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"a")])
    with pytest.raises(TaskDataError, match="no sample with an image"):
        scan_task_ids(str(path))


def write_csv(path: Path, images: list[object], separator: str = "\t", column: str = "filepath") -> str:
    pd.DataFrame({column: images, "title": "t"}).to_csv(path, sep=separator, index=False)
    return str(path)


def test_ids_of_a_csv_are_its_paths_as_they_stand(tmp_path: Path):
    path = write_csv(tmp_path / "a.csv", ["./x/1.jpg", "x//2.jpg", "ü/3.jpg"], ",", "image")
    assert scan_task_ids(path, "auto", "image", ",").ids == ["./x/1.jpg", "x//2.jpg", "ü/3.jpg"]


def test_image_files_of_a_csv_are_looked_at_when_asked(tmp_path: Path):
    (tmp_path / "good.jpg").write_bytes(drawing(0))
    (tmp_path / "cut.jpg").write_bytes(drawing(0)[:300])
    paths = [str(tmp_path / name) for name in ("good.jpg", "cut.jpg", "absent.jpg")]
    csv = write_csv(tmp_path / "a.tsv", paths)
    assert scan_task_ids(csv).unreadable == {}
    unreadable = scan_task_ids(csv, images=True).unreadable
    assert list(unreadable) == paths[1:]
    assert "cannot be opened" in unreadable[paths[2]]


def test_csv_mistakes(tmp_path: Path):
    def refused(path: str, match: str, **options: str) -> None:
        with pytest.raises(TaskDataError, match=match):
            scan_task_ids(path, **options)

    refused(str(tmp_path / "absent.csv"), "does not exist")
    refused(write_csv(tmp_path / "a.csv", ["1.jpg"], ","), "(?s)no column 'filepath'.*--csv-separator")
    refused(write_csv(tmp_path / "b.csv", ["1.jpg", None]), "no image path in row 2")
    refused(
        write_csv(tmp_path / "c.csv", ["1.jpg", "2.jpg", "1.jpg"]), "'1.jpg' occurs twice .* rows 1 and 3"
    )
    refused(write_csv(tmp_path / "d.csv", []), "has no rows")
    (tmp_path / "e.csv").write_bytes(b"\xff\xfe\x00garbage\xff")
    refused(str(tmp_path / "e.csv"), "cannot be read")


def test_the_kind_of_data_is_open_clips_choice(tmp_path: Path):
    assert is_csv("a.csv") and is_csv("a.tsv") and not is_csv("a.tar")
    assert is_csv("a.txt", "csv") and not is_csv("a.csv", "webdataset")
    with pytest.raises(TaskDataError, match="synthetic"):
        is_csv("a", "synthetic")


def test_braces_and_double_colons():
    assert expand_urls("a/{0..1}.tar::b/x.tar") == ["a/0.tar", "a/1.tar", "b/x.tar"]
    with pytest.raises(TaskDataError, match="names no shard"):
        expand_urls("")
    with pytest.raises(TaskDataError, match="more than 10,000,000 shards"):
        expand_urls("{0..4000000000}.tar")
    with pytest.raises(TaskDataError, match="cannot be expanded"):
        expand_urls("{0..1.tar")
