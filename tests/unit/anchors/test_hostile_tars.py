"""Tars that no program should have written, and tars that programs do write: holes, labels, system files, odd names.

One module, because each of its tars is a few lines.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.data import image
from support.tars import members_of, write_tar
from webdataset.tariterators import tar_file_expander

from arf_plugin.anchors import headers as headers_module
from arf_plugin.anchors import tars as tars_module
from arf_plugin.anchors.headers import SeekableTar
from arf_plugin.anchors.scan import require_unique_keys, scan_shard
from arf_plugin.anchors.tars import scan_samples
from arf_plugin.errors import AnchorSetError, TaskDataError

PHOTO = image(1)


def checked(block: bytes) -> bytes:
    """A header block with a checksum that fits."""
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(name: str, size_field: bytes, type_: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size_field.ljust(12, b"\0")
    block[156:157] = type_
    return checked(bytes(block))


def member(name: str, content: bytes, type_: bytes = b"0") -> bytes:
    return header(name, b"%011o" % len(content), type_) + content + b"\0" * (-len(content) % 512)


def record(keyword: str, value: str) -> bytes:
    """A record of a pax header, which begins with its own length."""
    rest = f" {keyword}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


END = b"\0" * 1024
GOOD = member("0.txt", b"good")
HOSTILE: dict[str, bytes] = {
    "negative, octal": header("a.jpg", b"-0000001000"),
    "negative, base 256": header("a.jpg", b"\xff" * 10 + b"\xfe\x00"),
    "negative, pax": member("x", record("size", "-1024"), b"x") + header("a.jpg", b"0"),
    "negative long name": header("x", b"-0000001000", b"L") + header("a.jpg", b"0"),
    "8 GB, octal": header("a.jpg", b"77777777777"),
    "2 ** 80, base 256": header("a.jpg", b"\x80\x01" + b"\0" * 10),
    "2 ** 90, pax": member("x", record("size", str(2**90)), b"x") + header("a.jpg", b"0"),
    "long name of 8 GB": header("x", b"77777777777", b"L"),
    "records of 8 GB": header("x", b"77777777777", b"x"),
    "records for all of 8 GB": header("x", b"77777777777", b"g"),
    "records of 2 ** 80": header("x", b"\x80\x01" + b"\0" * 10, b"x"),
    "records without a member": member("x", record("path", "a.jpg"), b"x"),
    "cut records": header("x", b"%011o" % 2000, b"x") + b"30 path=a",
    "record of length 0": member("x", b"0 path=a\n", b"x") + GOOD,
    "long name alone": member("x", b"n" * 200, b"L"),
    "2,000 headers of one member": member("x", record("comment", "c"), b"x") * 2000 + GOOD,
    "bad checksum": header("a.jpg", b"0")[:-1] + b"!",
    "no number": header("a.jpg", b"what"),
    "map of holes that is cut": member(
        "x",
        record("GNU.sparse.major", "1")
        + record("GNU.sparse.minor", "0")
        + record("GNU.sparse.realsize", "99"),
        b"x",
    )
    + member("a.jpg", b"5\n0\n"),
    "holes that overlap": member(
        "x", record("GNU.sparse.map", "0,300,100,300") + record("GNU.sparse.size", "1000"), b"x"
    )
    + member("a.jpg", b"d" * 600),
    "holes before the start": member(
        "x", record("GNU.sparse.map", "-50,20") + record("GNU.sparse.size", "1000"), b"x"
    )
    + member("a.jpg", b"d" * 600),
    "holes beyond the end": member(
        "x", record("GNU.sparse.map", "900,200") + record("GNU.sparse.size", "1000"), b"x"
    )
    + member("a.jpg", b"d" * 600),
    "holes with a map of words": member(
        "x", record("GNU.sparse.map", "zero,one") + record("GNU.sparse.size", "1000"), b"x"
    )
    + member("a.jpg", b"d" * 600),
    "old table of holes that is cut": checked(
        header("a.jpg", b"%011o" % 512, b"S")[:482] + b"\1" + b"%011o\0" % 4096 + b"\0" * 17
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("packed", ["plain", "gzip"])
def test_hostile_headers_are_one_error_and_no_memory(tmp_path: Path, what: str, packed: str):
    tar = GOOD + HOSTILE[what] + END
    if "cut" in what or "without" in what:
        tar = tar[: -len(END)]
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(tar) if packed == "gzip" else tar)
    begin = time.monotonic()
    with pytest.raises(TaskDataError, match=r"x\.tar is cut off or corrupt after member '(0\.txt|a\.jpg)'"):
        list(members_of(str(path), read=("jpg", "txt"), images=True))
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("ext", "limit", "said"), [("jpg", "LARGEST_IMAGE", "jpg"), ("txt", "LARGEST_TEXT", "txt")]
)
@pytest.mark.parametrize("packed", ["plain", "gzip"])
def test_members_are_read_up_to_a_size(tmp_path, monkeypatch, ext, limit, said, packed):
    """Nine gigabytes of nothing take no room on this disk, and none in memory."""
    size = 9 << 30 if packed == "plain" else (1 << 20) + 1
    if packed == "gzip":
        monkeypatch.setattr(tars_module, limit, 1 << 20)
    path = tmp_path / "x.tar"
    head = header(f"a.{ext}", b"\x80" + size.to_bytes(11, "big"))
    if packed == "plain":
        with path.open("wb") as file:
            file.write(head)
            file.truncate(512 + size + 1024)
    else:
        path.write_bytes(gzip.compress(head + bytes(size + 1024 + -size % 512)))
    with pytest.raises(
        TaskDataError, match=rf"'a\.{said}' has [\d,]+ bytes, more than the [\d,]+ that are read"
    ):
        list(members_of(str(path), read=(ext,)))
    if packed == "plain" and ext == "jpg":
        (found,) = members_of(str(path), images=True)
        assert found.problem == "has 9,663,676,416 bytes, more than the 536,870,912 that are read"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    "make", [make_fifo, make_socket, Path.mkdir, lambda path: path.symlink_to("/dev/zero")]
)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, make: Callable[[Path], None]):
    path = tmp_path / "x.tar"
    make(path)
    with pytest.raises(AnchorSetError, match=r"x\.tar cannot be opened as a tar: .* expected a file"):
        list(members_of(str(path), AnchorSetError))


def holed(folder: Path) -> list[str]:
    """Writes images of which a part is a hole, and their texts."""
    names = []
    for number in range(3):
        name = f"{number}.jpg"
        with (folder / name).open("wb") as file:
            file.write(PHOTO)
            file.seek(40_000 * number, io.SEEK_CUR)
            file.write(PHOTO)
            file.truncate(file.tell() + 70_000)
        (folder / f"{number}.txt").write_text(f"text {number}")
        names += [name, f"{number}.txt"]
    return names


@pytest.mark.parametrize("form", ["gnu", "posix 1.0", "posix 0.1", "posix 0.0"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_files_with_holes_are_read_as_webdataset_reads_them(
    tmp_path: Path, form: str, pack: Callable[[bytes], bytes]
):
    kind, _, version = form.partition(" ")
    path = tmp_path / "x.tar"
    versioned = [f"--sparse-version={version}"] if version else []
    subprocess.run(
        [
            "tar",
            "--sparse",
            "--hole-detection=raw",
            *versioned,
            f"--format={kind}",
            "-cf",
            path,
            *holed(tmp_path),
        ],
        cwd=tmp_path,
        check=True,
    )
    assert path.stat().st_size < 100_000, "tar has kept no holes"
    path.write_bytes(pack(path.read_bytes()))
    with path.open("rb") as stream:
        stock = [(f["fname"], f["data"]) for f in tar_file_expander(iter([{"url": "x", "stream": stream}]))]
    members = list(members_of(str(path), read=("jpg", "txt"), images=True))
    assert [(m.name, m.data) for m in members] == stock
    assert all(m.offset == -1 for m in members if m.ext == "jpg" and m.size > 70_000)
    assert [len(m.data or b"") for m in members] == [m.size for m in members]
    assert scan_shard(str(path)).keys == ["0", "1", "2"]
    if pack is bytes:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(TaskDataError, match="cut off or corrupt"):
            list(members_of(str(path)))


def test_a_header_for_all_members_changes_them_as_in_tarfile(tmp_path: Path):
    for keyword, value in (("comment", "by git archive"), ("path", "all.jpg"), ("size", "4")):
        path = tmp_path / f"{keyword}.tar"
        path.write_bytes(member("g", record(keyword, value), b"g") + GOOD + member("1.txt", b"more") + END)
        with path.open("rb") as file:
            found = [tuple(h) for h in SeekableTar(file)]
        with tarfile.open(path) as tar:
            assert found == [(info.name, info.type, info.offset_data, info.size) for info in tar]
        assert len(found) == 2 and (keyword != "path" or found[1][0] == "all.jpg")


@pytest.mark.parametrize("field", [slice(100, 108), slice(108, 116), slice(136, 148), slice(329, 337)])
def test_headers_whose_numbers_tarfile_cannot_read_are_not_read_past(tmp_path: Path, field: slice):
    """tarfile, and with it webdataset, would take such a header for the end of the tar, and say nothing."""
    block = bytearray(header("a.jpg", b"0"))
    block[field] = b"junk".ljust(field.stop - field.start, b"k")
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + checked(bytes(block)) + END)
    with pytest.raises(TaskDataError, match="damaged header"):
        list(members_of(str(path)))


def test_what_webdataset_passes_over_is_passed_over(tmp_path: Path):
    path = tmp_path / "x.tar"
    path.write_bytes(
        member("a volume", b"", b"V")
        + member("data/", b"", b"5")
        + member("README", b"", b"2")
        + member("latest.json", b"", b"2")
        + member("lock", b"", b"6")
        + GOOD
        + END
    )
    assert [m.name for m in members_of(str(path))] == ["0.txt"]


@pytest.mark.parametrize("word", ["__key__", "__url__", "__bad__"])
def test_members_that_would_overwrite_webdatasets_notes_are_refused(tmp_path: Path, word: str):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", PHOTO), (f"a.{word}", b"other")])
    with pytest.raises(TaskDataError, match=f"'a.{word}', whose extension is a word"):
        list(members_of(str(path)))


def test_system_files_are_no_samples(tmp_path: Path):
    members = [
        *(
            ("._0.jpg", b"apple"),
            (".DS_Store", b"x"),
            ("README", b"x"),
            ("README.md", b"x"),
            ("README.txt", b"x"),
        ),
        *(("Thumbs.db", b"x"), ("desktop.ini", b"x"), ("d/.DS_Store", b"x"), ("__MACOSX/._a.jpg", b"x")),
        *(("d/._a.jpg", b"apple"), ("d/a.jpg", PHOTO), ("d/a.cls", b"1")),
        *(("d/._b.jpg", b"apple"), ("d/._b.cls", b"apple"), ("d/b.jpg", PHOTO), ("d/b.cls", b"2")),
        *(("__MACOSX/d/._b.jpg", b"apple"), ("lost.txt", b"a text without an image")),
    ]
    scan = scan_shard(str(write_tar(tmp_path / "x.tar", members)))
    assert scan.keys == ["d/a", "d/b"] and scan.without_class == 0
    assert scan.without_image == ["lost"]
    assert not scan.repeated


def test_labels_are_counted_with_the_key_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels = [b"1", b" 1\n", b"0", b"3.9", b"caf\xe9", b"x" * 99, b"", b"1"]
    members = [m for n, label in enumerate(labels) for m in ((f"{n}.cls", label), (f"{n}.jpg", PHOTO))]
    path = write_tar(tmp_path / "x.tar", [*members, ("lost.cls", b"7")])
    expected = {
        "1": [3, "0"],
        "0": [1, "2"],
        "3.9": [1, "3"],
        "café": [1, "4"],
        "x" * 40: [1, "5"],
        "": [1, "6"],
    }
    for _ in ("the tar", "the cache"):
        scan = scan_shard(str(path))
        assert scan.labels == expected
        assert scan.without_image == ["lost"]
    monkeypatch.setattr("arf_plugin.anchors.scan.MOST_LABELS", 2)
    capped = scan_shard(str(path), decode=True)
    assert capped.labels == {"1": [3, "0"], "0": [1, "2"]}


def test_repeated_keys_are_noted_and_refused_where_ids_are_joined(tmp_path: Path):
    names = ["a.jpg", "b.jpg", "a.jpg", "c.jpg", "a.jpg", "b.jpg"]
    path = write_tar(tmp_path / "x.tar", [(name, PHOTO) for name in names])
    scan = scan_shard(str(path))
    assert scan.keys == ["a", "b", "a", "c", "a", "b"] and scan.repeated == {"a": 3, "b": 2}
    with pytest.raises(AnchorSetError, match=r"x\.tar has the key 'a' 3 times, in samples apart"):
        require_unique_keys(scan, AnchorSetError)


def test_a_full_scan_never_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", PHOTO)])
    looked: list[str] = []
    monkeypatch.setattr(
        "arf_plugin.anchors.scan.scan_samples",
        lambda url, *a, **k: looked.append(url) or scan_samples(url, *a, **k),
    )
    for decode, times in ((False, 1), (False, 1), (True, 2), (True, 3), (False, 3)):
        scan_shard(str(path), decode=decode)
        assert len(looked) == times


def test_a_shard_that_takes_anothers_place_is_scanned_again(tmp_path: Path):
    """Of the same size, and with the same time of its last change."""
    path = write_tar(tmp_path / "x.tar", [("a.jpg", PHOTO)])
    stat = path.stat()
    assert scan_shard(str(path)).keys == ["a"]
    other = write_tar(tmp_path / "other.tar", [("b.jpg", PHOTO)])
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns
    assert scan_shard(str(path)).keys == ["b"]


def test_a_cache_with_values_of_other_kinds_is_as_good_as_none(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", PHOTO)])
    scan_shard(str(path))
    (cached,) = (tmp_path / "cache/scans").iterdir()
    whole = cached.read_text()
    for damaged in (
        whole.replace("[]", "5"),
        "[" * 100_000,
        "",
        '{"scan": []}',
        whole.replace('"keys"', '"kys"'),
    ):
        cached.write_text(damaged)
        assert scan_shard(str(path)).keys == ["a"]


def test_the_bound_on_headers_leaves_room_for_long_names(tmp_path: Path):
    name = "d/" * 40_000 + "a.jpg"
    assert len(name) < headers_module.LARGEST_EXTENSION
    path = tmp_path / "x.tar"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(PHOTO)
            tar.addfile(info, io.BytesIO(PHOTO))
        assert scan_shard(str(path)).keys == [name.removesuffix(".jpg")]
