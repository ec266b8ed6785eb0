"""Scans of real tars: what they list, and each kind of damage they must name."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from support.tars import members_of, write_tar
from webdataset.tariterators import base_plus_ext

from arf_plugin.anchors.headers import SeekableTar, _plain
from arf_plugin.anchors.tars import scan_samples, split_name
from arf_plugin.errors import PoolError, TaskDataError


def image_bytes(kind: str = "JPEG", size: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 60).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = []
    for index in range(3):
        members += [
            (f"a/{index:03d}.JPG", image_bytes()),
            (f"a/{index:03d}.txt", f"caption {index}".encode()),
        ]
    members += [("__index__", b"skipped"), ("__meta__/x.txt", b"skipped"), ("README", b"no extension")]
    return write_tar(tmp_path / "000.tar", members)


def test_members_offsets_and_data(shard: Path):
    members = list(members_of(str(shard), read=("txt",)))
    assert [(m.key, m.ext) for m in members] == [(f"a/{i:03d}", e) for i in range(3) for e in ("jpg", "txt")]
    raw = shard.read_bytes()
    for member in members:
        data = raw[member.offset : member.offset + member.size]
        assert data == member.data if member.ext == "txt" else data.startswith(b"\xff\xd8")


def test_file_url_and_compressed_and_pipe_list_the_same(shard: Path):
    packed = shard.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    expected = [(m.name, m.size) for m in members_of(str(shard))]
    for url in (f"file:{shard}", f"file://{shard}", str(packed), f"pipe:cat {shard}"):
        found = list(members_of(url, images=True))
        assert [(m.name, m.size) for m in found] == expected
        assert all(m.problem is None for m in found)
        assert all((m.offset >= 0) == url.startswith("file:") for m in found)


@pytest.mark.parametrize(
    "name", ["a.jpg", "a/b.c/d.seg.png", "./x.txt", "noext", ".hidden", "a/.hidden", "x/y.T", "a.b/c"]
)
def test_names_are_split_as_webdataset_splits_them(name: str):
    base, ext = base_plus_ext(name)
    assert split_name(name) == (None if base is None else (base, ext.lower()))


def test_samples_group_neighbours(tmp_path: Path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("1.txt", b"a"),
            ("1.webp", image_bytes("WEBP")),
            ("2.png", image_bytes("PNG")),
            ("2.png", image_bytes("PNG")),
        ],
    )
    samples = list(scan_samples(str(path), images=True))
    assert [(s.key, sorted(s.members)) for s in samples] == [
        ("1", ["txt", "webp"]),
        ("2", ["png"]),
        ("2", ["png"]),
    ]
    assert samples[0].image is not None and samples[0].image.problem is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_found_and_padded_ones_pass(tmp_path: Path, kind: str):
    ext = kind.lower()
    whole = image_bytes(kind, 64)
    path = write_tar(
        tmp_path / "x.tar",
        [
            (f"cut.{ext}", whole[: len(whole) // 2]),
            (f"padded.{ext}", whole + b"\0" * 7),
            (f"whole.{ext}", whole),
        ],
    )
    problems = {m.key: m.problem for m in members_of(str(path), images=True)}
    assert problems["cut"] is not None and "decoded" in problems["cut"]
    assert problems["padded"] is None and problems["whole"] is None


def test_other_unreadable_images(tmp_path: Path):
    path = write_tar(
        tmp_path / "x.tar", [("empty.jpg", b""), ("html.jpg", b"<html>404</html>"), ("tiny.png", b"x")]
    )
    problems = {m.key: m.problem for m in members_of(str(path), images=True)}
    assert problems == {
        "empty": "is empty (0 bytes)",
        "html": "is not an image that PIL can read",
        "tiny": "is not an image that PIL can read",
    }


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "..\\x.jpg"])
def test_path_escapes_are_refused(tmp_path: Path, name: str):
    path = write_tar(tmp_path / "x.tar", [("ok.jpg", b"1"), (name, b"2")])
    with pytest.raises(PoolError, match="leaves the folder"):
        list(members_of(str(path), PoolError))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "b.jpg"
        tar.addfile(info)
    with pytest.raises(TaskDataError, match=r"not a regular file: 'a\.jpg'"):
        list(members_of(str(path)))


def test_directories_are_skipped(tmp_path: Path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.dir")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    assert list(members_of(str(path))) == []


def test_cut_off_tars_name_the_last_whole_member(shard: Path):
    raw = shard.read_bytes()
    members = list(members_of(str(shard)))
    inside_data = members[2].offset + 5
    inside_header = members[2].offset - 300
    for cut in (inside_data, inside_header):
        shard.write_bytes(raw[:cut])
        for url in (str(shard), f"pipe:cat {shard}"):
            with pytest.raises(TaskDataError, match=r"000\.tar is cut off or corrupt after member 'a/00"):
                list(members_of(url))


def test_damaged_header_in_the_middle_is_not_taken_for_the_end(shard: Path):
    raw = bytearray(shard.read_bytes())
    third = list(members_of(str(shard)))[2]
    raw[third.offset - 512 + 150] ^= 0xFF  # the checksum field
    shard.write_bytes(raw)
    with pytest.raises(TaskDataError, match=r"after member 'a/000\.txt'.*damaged"):
        list(members_of(str(shard)))


def test_missing_empty_and_foreign_files(tmp_path: Path):
    with pytest.raises(TaskDataError, match="does not exist"):
        list(members_of(str(tmp_path / "absent.tar")))
    (tmp_path / "zero.tar").touch()
    with pytest.raises(TaskDataError, match=r"after the start: .*empty"):
        list(members_of(str(tmp_path / "zero.tar")))
    (tmp_path / "text.tar").write_text("hello " * 1000)
    with pytest.raises(TaskDataError, match="corrupt"):
        list(members_of(str(tmp_path / "text.tar")))
    with pytest.raises(TaskDataError, match="cannot be opened"):
        list(members_of(str(tmp_path)))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_quick_headers_agree_with_tarfile(tmp_path: Path, form: int):
    """Long names, directories, prefixes, names in other scripts, empty files."""
    path = tmp_path / "x.tar"
    names = [
        "a.jpg",
        "d/e.f.txt",
        "x" * 98 + ".a",
        "y" * 60 + "/" + "z" * 60 + ".b",
        "ünïcode/æ.txt",
        " odd name .c",
    ]
    if form != tarfile.USTAR_FORMAT:
        names += ["long/" * 40 + "w" * 120 + ".txt"]
    with tarfile.open(path, "w", format=form) as tar:
        directory = tarfile.TarInfo("d/")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid = number * 300, number * 10**8, number * 10**5
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    with path.open("rb") as file:
        found = list(SeekableTar(file))
    with tarfile.open(path) as tar:
        expected = [(info.name, info.type, info.offset_data, info.size) for info in tar]
    assert [tuple(header) for header in found] == expected
    with path.open("rb") as file:
        file.seek(found[1].offset - 512)
        assert _plain(file.read(512), found[1].offset - 512) == found[1], "the quick way is not taken"


def test_a_failing_command_is_reported(tmp_path: Path):
    with pytest.raises(TaskDataError, match="is cut off or corrupt after the start"):
        list(members_of("pipe:cat /nowhere/x.tar"))
