"""Trees of folders, texts and rows that nobody thought of: what is read is what others read, or it is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from arf_plugin.data.prompts import load_prompts
from arf_plugin.errors import ArfError, EvaluationError
from arf_plugin.evaluation.folders import IMAGE_SUFFIXES
from arf_plugin.evaluation.records import by_set, identity, read_records
from arf_plugin.evaluation.sets import find_sets, open_folders, open_list, open_webdataset, read_lines
from arf_plugin.evaluation.tables import summary, table


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, kind)
    return stream.getvalue()


CONTENTS = {
    "JPEG": picture("JPEG"),
    "PNG": picture("PNG"),
    "GIF": picture("GIF"),
    "PPM": picture("PPM"),
    "text": b"no image\n",
    "AppleDouble": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ",
    "nothing": b"",
}
IMAGES = ("JPEG", "PNG", "GIF")
FOLDERS = (
    "a",
    "b",
    "B",
    "a-b",
    "10",
    "9",
    "train",
    "test",
    ".hid",
    "\u00e9",
    "e\u0301",
    "b\udcff",
    "s",
    "x.jpg",
)
FILES = (
    *("0.jpg", "1.JPG", "2.pgm", "3.PnG", "4.gif", "5.webp", "6.avif", "7.jpe", "8", "9.jpg.txt", "._0.jpg"),
    *(".jpg", "Thumbs.db", "b\udcff.png", "c\x1b[31m.png", "nshards.txt", "0.tar", "d.zip", "cls.txt"),
)
FILE = st.tuples(st.just("file"), st.sampled_from(FILES), st.sampled_from(sorted(CONTENTS)))
OTHER = st.tuples(
    st.sampled_from(("empty folder", "link", "loop", "dangling", "fifo")),
    st.sampled_from((*FOLDERS, "0.jpg", "l")),
    st.sampled_from(("..", "../..", "../a", ".", "nowhere")),
)
IMAGE = st.tuples(
    st.just("file"), st.sampled_from(("0.jpg", "1.png", "2.JPEG")), st.sampled_from(("JPEG", "PNG"))
)
ENTRY = st.integers(0, 29).flatmap(lambda number: OTHER if number == 0 else FILE if number < 4 else IMAGE)
ENTRIES = st.lists(
    st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=3).map(tuple), ENTRY), min_size=1, max_size=14
)


@contextlib.contextmanager
def tree(entries) -> Iterator[Path]:
    """Makes the folders, files and links, as far as they do not exclude each other."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "1", "2", "set")
        root.mkdir(parents=True)
        for parents, (kind, name, what) in entries:
            with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError, OSError):
                place = root.joinpath(*parents)
                place.mkdir(parents=True, exist_ok=True)
                path = place / name
                if kind == "file" and not path.is_fifo():
                    path.write_bytes(CONTENTS[what])
                elif kind == "empty folder":
                    path.mkdir()
                elif kind == "fifo":
                    os.mkfifo(path)
                else:
                    path.symlink_to({"loop": name, "dangling": "nowhere"}.get(kind, what))
        yield root


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*arguments)


def test_suffixes_are_torchvisions_and_gif():
    assert set(IMAGE_SUFFIXES) == {*IMG_EXTENSIONS, ".gif"}


@given(ENTRIES)
@example([(("a",), ("file", "0.jpg", "JPEG")), (("b", "s"), ("file", "0.jpg", "JPEG"))])
@example([(("a", "s"), ("file", "0.jpg", "JPEG")), (("a", "s-t"), ("file", "1.png", "JPEG"))])
def test_folders_are_read_as_imagefolder_reads_them(entries):
    with tree(entries) as root:
        try:
            found = quietly(open_folders, root, "set")
        except EvaluationError:
            return
        for hidden in root.glob(".*"):  # of those alone it is said that they are no classes
            if hidden.is_symlink():
                hidden.unlink()
            elif hidden.is_dir():
                assert not any(
                    str(path).lower().endswith(IMAGE_SUFFIXES) for path in hidden.rglob("*") if path.is_file()
                )
                shutil.rmtree(hidden)
        theirs = ImageFolder(str(root), is_valid_file=lambda path: path.lower().endswith(IMAGE_SUFFIXES))
        assert [(place.file, place.cls) for place in found.samples.places] == theirs.samples
        assert list(found.classnames) == [name.replace("_", " ") for name in theirs.classes]
        listed = {os.path.relpath(place.file, root) for place in found.samples.places}
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                inner = str(path.relative_to(root))
                passed = path.parent == root or (name.startswith(".") and not path.suffix)
                if path.is_file() and path.read_bytes() in map(CONTENTS.get, IMAGES) and not passed:
                    assert inner in listed, "an image vanished"


@given(ENTRIES)
def test_any_tree_is_sets_or_an_error(entries):
    with tree(entries) as root:
        try:
            sets = quietly(find_sets, root)
        except EvaluationError as error:
            assert str(error).count("\n") <= 1
            return
        assert sets and all(one.images for one in sets)
        for one in sets:
            json.dumps([one.name, one.place], ensure_ascii=False).encode()


NAME = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\n"), max_size=12)


@given(
    st.lists(NAME, min_size=1, max_size=8),
    st.sampled_from(("\n", "\r\n", "\r")),
    st.booleans(),
    st.booleans(),
)
@example(["cat\u2028s", "d\u0085og"], "\n", True, True)
def test_lines_are_those_of_editors(names, newline, mark, ended):
    expected = [name.strip().strip("\ufeff").strip() for name in names]
    text = newline.join(names) + newline * ended
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "classnames.txt")
        path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
        templates = Path(folder, "templates.txt")
        templates.write_bytes("\ufeffa {c}\r\n".encode())
        while expected and not expected[-1]:
            expected.pop()
        if not expected or "" in expected:
            with pytest.raises(EvaluationError, match=r"is empty|is blank"):
                read_lines(path)
            return
        assert read_lines(path) == expected
        prompts = quietly(load_prompts, str(path), str(templates))
        assert (prompts.classnames, prompts.templates) == (expected, ["a {c}"])


@given(
    st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda text: text.encode("utf-8", "ignore")))
)
@example(b"4000000000")
@example("\u0663".encode())
@example(b"9" * 5000)
@example("\ufeff1\r\n".encode("utf-16"))
def test_any_text_files_are_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "set")
        (root / "test").mkdir(parents=True)
        for name in (
            "classnames.txt",
            "zeroshot_classification_templates.txt",
            "test/nshards.txt",
            "list.txt",
        ):
            (root / name).write_bytes(data)
        for call in (lambda: open_webdataset(root, "s"), lambda: open_list(root / "list.txt", "s")):
            with pytest.raises(ArfError) as error:  # there is neither a tar nor an image
                quietly(call)
            assert "\n" not in str(error.value)[:-1].replace("\\n", "") or len(str(error.value)) < 2000


ROW = {
    **{"format": 1, "suite": None, "set": "id", "split": "test", "checkpoint": "a.pt", "digest": "d"},
    **{
        "original": None,
        "original_digest": None,
        "alpha": None,
        "model": "m",
        "images": 3,
        "headline": "top1",
    },
    **{"metrics": {"top1": 40.0, "ece": 3.0}, "prompts": "p", "data": "x", "precision": "fp32"},
}
VALUE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.just(10**400),
        st.just("\ud800"),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from([*ROW, "metrics.top1", "epoch", "start"]), VALUE),
            st.binary(max_size=30),
            st.integers(0, 300),
        ),
        max_size=4,
    )
)
@example([("metrics.top1", float("nan"))])
@example([("digest", ["unhashable"])])
@example([b"[" * 100_000])
@example([b'{"format": 1, "set": "\\ud800"}'])
def test_any_file_of_rows_is_rows_or_one_error(changes):
    lines = []
    for change in changes:
        row = {**ROW, "metrics": dict(ROW["metrics"])}
        if isinstance(change, bytes):
            lines.append(change)
        elif isinstance(change, int):
            lines.append(json.dumps(row).encode()[:change])
        else:
            name, value = change
            (row["metrics"] if "." in name else row)[name.rpartition(".")[2]] = value
            lines.append(json.dumps(row).encode())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.jsonl")
        path.write_bytes(b"\n".join(lines))
        try:
            rows = quietly(read_records, path)
        except EvaluationError as error:
            assert str(error).startswith(f"{path}, line ") and "\x1b" not in str(error)
            return
    {identity(row) for row in rows}
    for row in rows:
        by_set([row])
        if "alpha" in row and "images" in row:
            assert table([row], None) and summary([row], None)


@given(st.permutations(["cat", "hot_dog", "ICE-cream", "\u00e9t\u00e9"]))
def test_names_of_folders_stand_in_the_folders_order(order):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "set")
        for name in order:
            (root / name).mkdir(parents=True)
            (root / name / "0.png").write_bytes(CONTENTS["PNG"])
        written = [unicodedata.normalize("NFD", name).replace("_", " ").lower() for name in order]
        (root / "classnames.txt").write_text("\n".join(written), encoding="utf-8")
        if list(order) == sorted(order):
            assert quietly(open_folders, root, "set").classnames == tuple(written)
        else:
            first = next(n for n, (a, b) in enumerate(zip(order, sorted(order), strict=True)) if a != b)
            with pytest.raises(EvaluationError, match=f"line {first + 1} is .*class {first} is the folder"):
                quietly(open_folders, root, "set")
