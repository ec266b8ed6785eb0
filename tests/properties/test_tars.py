"""Tars of others: whatever their bytes are, a scan ends, and lists what open_clip's reader gives; names are bytes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train.data import SharedEpoch, filter_no_caption_or_no_image, tarfile_to_samples_nothrow
from support.data import image
from support.tars import members_of

from arf_plugin.anchors.ids import sample_id
from arf_plugin.anchors.images import IMAGE_EXTENSIONS
from arf_plugin.anchors.scan import scan_shard
from arf_plugin.anchors.tars import scan_samples
from arf_plugin.data.pairs import pair_loader
from arf_plugin.errors import AnchorSetError, ArfError, TaskDataError
from arf_plugin.untrusted import utf8

PHOTO = image(1)
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property, each of which overwrites the last one's files."""
    return tmp_path_factory.mktemp("examples")


def tar_of(members: list[tuple[bytes, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


WHOLE = tar_of([(b"a/0.jpg", PHOTO), (b"a/0.txt", b"text"), (b"n" * 150 + b".cls", b"3"), (b"1.png", b"x")])
HOLED = tar_of([(b"p" * 120 + "ü".encode() + b".jpg", PHOTO), (b"q.txt", b"text")], tarfile.PAX_FORMAT)


def scan_everything(path: Path) -> None:
    """All ways to look at a tar; only the family of our errors may come."""
    for look in (
        lambda: scan_shard(str(path), texts=True),
        lambda: scan_shard(str(path), texts=True, decode=True),
        lambda: list(members_of(str(path), read=("txt", "cls", *IMAGE_EXTENSIONS))),
        lambda: list(scan_samples(f"pipe:cat '{path}'", images=True)),
    ):
        try:
            look()
        except ArfError as error:
            assert isinstance(error, TaskDataError)
            assert str(path) in str(error)


@given(st.binary(max_size=3000))
def test_random_bytes(folder: Path, content: bytes):
    path = folder / "random.tar"
    path.write_bytes(content)
    scan_everything(path)


@given(
    whole=st.sampled_from([WHOLE, HOLED]),
    changes=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 511), st.binary(min_size=1, max_size=12)),
        min_size=1,
        max_size=4,
    ),
    type_=st.sampled_from([b"", *(bytes([b]) for b in b"01234567LKSxgXMVND\0")]),
    size=st.sampled_from(
        [b"", b"77777777777\0", b"-0000000001\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12, b"\0" * 12]
    ),
    mend=st.booleans(),
    cut=st.integers(0, 12_000),
)
def test_changed_tars(folder, whole, changes, type_, size, mend, cut):
    content = bytearray(whole)
    for block, place, written in changes:
        start = min(block * 512 + place, len(content) - len(written))
        content[start : start + len(written)] = written
    if type_:
        content[156:157] = type_
    if size:
        content[124:136] = size
    if mend:  # a checksum that fits lets the header through to what reads it
        for start in range(0, len(content) - 511, 512):
            block = content[start : start + 512]
            if block[257:262] == b"ustar":
                total = sum(block[:148]) + 8 * 32 + sum(block[156:])
                content[start + 148 : start + 156] = b"%06o\0 " % total
    path = folder / "changed.tar"
    path.write_bytes(content[: cut or None])
    scan_everything(path)


EXTENSIONS = ["jpg", "JPG", "png", "jpeg", "webp", "txt", "cls", "json", "seg.png", "pyd", "ds_store"]
NAMES = st.one_of(
    st.tuples(st.sampled_from(["a", "b", "d/a", "d/b", "d.e/a"]), st.sampled_from(EXTENSIONS)).map(
        lambda parts: f"{parts[0]}.{parts[1]}".encode()
    ),
    st.sampled_from(
        [
            *(
                b"._a.jpg",
                b"d/._a.jpg",
                b"d/._b.txt",
                b"__MACOSX/._a.jpg",
                b"__MACOSX/d/._a.jpg",
                b".DS_Store",
            ),
            *(
                b"d/.DS_Store",
                b"Thumbs.db",
                b"desktop.ini",
                b"README",
                b"README.md",
                b"README.txt",
                b"__x__/a.jpg",
            ),
            *(b"__index__", b"a\xdf.jpg", b"a\xdf.txt", b"a\nb.jpg", b"./a.jpg", b"./._a.jpg", b"a.jpg\n"),
        ]
    ),
    st.binary(min_size=1, max_size=20).filter(
        lambda name: b"\0" not in name and not name.startswith((b"/", b"\xfd7zXZ", b"\x1f\x8b"))
    ),
)


@given(
    members=st.lists(st.tuples(NAMES, st.sampled_from([b"", b"3", PHOTO])), max_size=14),
    form=st.sampled_from(FORMATS),
)
def test_samples_are_those_of_open_clip(folder, members, form):
    """The same groups with the same members, ids and data, in the same order, by seeking and as a stream."""
    path = folder / "members.tar"
    path.write_bytes(tar_of(members, form))
    stock = [
        (
            sample_id(sample["__url__"], sample["__key__"]),
            {name: content for name, content in sample.items() if not name.startswith("__")},
        )
        for sample in tarfile_to_samples_nothrow(iter([{"url": str(path)}]))
    ]
    extensions = {name for _, sample in stock for name in sample}
    try:
        for url in (str(path), f"pipe:cat '{path}'"):
            ours = [
                (sample_id(str(path), s.key), {name: member.data for name, member in s.members.items()})
                for s in scan_samples(url, read=extensions)
            ]
            assert ours == stock
    except TaskDataError as refused:  # more than stock refuses, on purpose
        assert "leaves the folder" in str(refused) or "keeps for itself" in str(refused)
        return
    trained = [identity for identity, sample in stock if filter_no_caption_or_no_image(sample)]
    scan = scan_shard(str(path))
    assert len(scan.keys) - scan.without_text == len(trained)
    with_image = [i for i, sample in stock if not set(sample).isdisjoint(IMAGE_EXTENSIONS)]
    assert [f"members/{key}" for key in scan.keys] == with_image
    json.dumps(scan.keys, ensure_ascii=False).encode()


@given(st.binary(min_size=1, max_size=60))
def test_names_of_random_bytes(folder: Path, name: bytes):
    # A name that begins like a compressed file is one to webdataset, too.
    name = b"n" + name.replace(b"\0", b"").replace(b"/", b"").replace(b".", b"")
    path = folder / "names.tar"
    path.write_bytes(tar_of([(name + b".jpg", PHOTO), (name + b".txt", b"text")]))
    scan = scan_shard(str(path))
    assert len(scan.keys) == 1
    assert scan_shard(str(path)) == scan, "the cache answers otherwise"
    for key in scan.keys:
        key.encode("utf-8")
        assert key == utf8(name.decode("utf-8", "surrogateescape"))
        assert sample_id(str(path), name.decode("utf-8", "surrogateescape")) == f"names/{key}"


class Marks(Exception):
    """Unpickling this would tell."""

    ran = False

    def __reduce__(self):
        return (_mark, ())


def _mark() -> None:
    Marks.ran = True


def _pickled() -> bytes:
    import pickle

    return pickle.dumps(Marks())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["pyd", "pickle", "pth", "npy", "json", "cls", "id", "ten", "mp", "cbor", "txt.gz", "gif"]
            ),
            st.one_of(st.binary(max_size=30), st.just(_pickled())),
        ),
        max_size=5,
        unique_by=lambda member: member[0],
    )
)
def test_pairs_are_image_and_text_whatever_else_lies_beside_them(
    folder: Path, others: list[tuple[str, bytes]]
):
    path = folder / "pairs.tar"
    members = [
        (b"0.jpg", PHOTO),
        *((f"0.{ext}".encode(), content) for ext, content in others),
        (b"0.txt", b"7"),
    ]
    path.write_bytes(tar_of(members))
    loader = pair_loader(
        [f"file://{path}"],
        preprocess=lambda picture: picture.size[0],
        tokenize=lambda text: [int(text)],
        batch_size=2,
        num_batches=1,
        workers=0,
        seed=0,
        epoch=SharedEpoch(),
    )
    (batch,) = list(loader)
    assert batch["pair_text"].tolist() == [7, 7] and len(batch["pair_image"]) == 2
    assert not Marks.ran


@given(st.lists(st.tuples(st.sampled_from(["jpg", "txt", "pyd"]), st.binary(max_size=40)), max_size=4))
def test_pairs_that_cannot_be_decoded_end_the_run(folder: Path, members: list[tuple[str, bytes]]):
    path = folder / "bad.tar"
    path.write_bytes(tar_of([(f"{n}.{ext}".encode(), content) for n, (ext, content) in enumerate(members)]))
    loader = pair_loader(
        [str(path)],
        preprocess=lambda picture: picture.size[0],
        tokenize=lambda text: [int(text)],
        batch_size=2,
        num_batches=1,
        workers=0,
        seed=0,
        epoch=SharedEpoch(),
    )
    with pytest.raises(AnchorSetError, match="whole pass"):
        list(loader)
