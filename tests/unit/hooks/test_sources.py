"""What a source is told by: a cheap look at its files for each shard, and their contents."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.building import drawing, write_task
from support.tars import write_tar

from arf_plugin.anchors.task import expand_urls
from arf_plugin.errors import ArfError
from arf_plugin.pipeline import source as source_module
from arf_plugin.pipeline.source import CsvSource, TarSource


def write_csv(folder: Path, images: int = 5) -> CsvSource:
    folder.mkdir()
    paths = [folder / f"{i}.jpg" for i in range(images)]
    for i, path in enumerate(paths):
        path.write_bytes(drawing(i))
    (folder / "t.csv").write_text("filepath\ttitle\n" + "".join(f"{path}\tx\n" for path in paths))
    return CsvSource(str(folder / "t.csv"))


def state(source: CsvSource | TarSource) -> tuple[list, list[str], str]:
    return source.fingerprint(), [source.content(shard) for shard in source.shards()], source.digest()


def replace(path: Path, data: bytes) -> None:
    """Another content of the same size and time, as ``cp -p`` or ``rsync --inplace`` leave it."""
    stat = path.stat()
    assert len(data) <= stat.st_size
    path.write_bytes(data.ljust(stat.st_size, b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_images_of_a_csv_that_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_module, "CSV_ROWS_PER_SHARD", 2)
    source = write_csv(tmp_path / "d")
    before = state(source)
    assert len(before[0]) == len(before[1]) == len(source.shards()) == 3 and state(source) == before
    os.utime(tmp_path / "d/3.jpg", (1, 1))
    touched = state(source)
    assert [a == b for a, b in zip(touched[0], before[0], strict=True)] == [True, False, True]
    assert touched[1:] == before[1:]
    replace(tmp_path / "d/3.jpg", drawing(77)[:200])
    after = state(source)
    assert [a == b for a, b in zip(after[1], before[1], strict=True)] == [True, False, True]
    assert after[0][1] != touched[0][1] and after[2] != before[2]
    (tmp_path / "d/0.jpg").unlink()
    gone = state(source)
    assert gone[0][0] != after[0][0] and gone[1][0] != after[1][0] and gone[2] != after[2]


def test_tars_that_are_replaced_moved_and_touched(tmp_path: Path):
    source = TarSource(expand_urls(write_task(tmp_path / "task")))
    before = state(source)
    assert len(before[0]) == len(before[1]) == 3
    shutil.copytree(tmp_path / "task", tmp_path / "copy")
    copy = state(TarSource([url.replace("/task/", "/copy/") for url in source.urls]))
    assert copy[1:] == before[1:] and copy[0] != before[0]
    write_tar(tmp_path / "other.tar", [("00007.jpg", drawing(8)[:400])])
    replace(tmp_path / "task/001.tar", (tmp_path / "other.tar").read_bytes()[:2048])
    after = state(source)
    for one, other in zip(after[:2], before[:2], strict=True):
        assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, True]
    assert after[2] != before[2]


def test_remote_tars_are_told_by_what_the_server_says():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/sources/0.tar", b"one")
    source = TarSource(["memory://sources/0.tar"])
    before = source.content(source.shards()[0])
    assert before == source.content(source.shards()[0])
    memory.pipe("/sources/0.tar", b"three")
    assert source.content(source.shards()[0]) != before
    nowhere = TarSource(["memory://sources/none.tar", "pipe:cat x.tar"])
    assert all(nowhere.content(shard) for shard in nowhere.shards()) and len(nowhere.fingerprint()) == 2


def test_what_cannot_be_read(tmp_path: Path):
    os.mkfifo(tmp_path / "0.tar")
    for name in ("0.tar", "none.tar"):
        source = TarSource([str(tmp_path / name)])
        assert len(source.fingerprint()) == 1
        with pytest.raises(ArfError, match=name):
            source.content(source.shards()[0])


def test_rows_of_a_csv_that_name_no_file(tmp_path: Path):
    """Pipes and devices would block, or never end."""
    source = write_csv(tmp_path / "d", images=1)
    os.mkfifo(tmp_path / "d/pipe.jpg")
    with (tmp_path / "d/t.csv").open("a") as file:
        file.write(f"{tmp_path}/d/pipe.jpg\tx\n/dev/zero\tx\n{tmp_path}/d\tx\n{'x' * 5000}\tx\n")
    shard = source.shards()[0]
    problems = [sample.problem for sample in source.read(shard)]
    assert problems[:4] == [None, "is no file", "is no file", "is no file"] and "cannot be read" in str(
        problems[4]
    )
    assert source.content(shard) and source.fingerprint()
