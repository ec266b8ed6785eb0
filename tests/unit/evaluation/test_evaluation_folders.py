"""Folders that are not as they should be: what is in them is read as ImageFolder reads it, or it is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image
from support import building
from support.evaluation import NAMES, write_set, write_texts
from support.tars import write_tar

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.sets import find_sets, open_list


@pytest.fixture
def images(tmp_path):
    """A set of two tars of drawings with six classes."""
    return write_set(tmp_path / "sets" / "shapes")


def colours(root, *names):
    """A folder with an image for each name."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(building.drawing(number, "PNG"))
    return root


def test_images_deeper_upper_case_or_behind_links_are_read(tmp_path):
    root = colours(tmp_path / "set", "a", "b")
    (root / "b" / "deeper").mkdir()
    Image.new("L", (8, 8)).save(root / "b" / "deeper" / "1.PGM", "PPM")
    elsewhere = colours(tmp_path / "elsewhere", "c")
    (root / "c").symlink_to(elsewhere / "c")
    [found] = find_sets(root)
    assert found.classnames == ("a", "b", "c")
    files = [os.path.relpath(place.file, root) for place in found.samples.places]
    assert files == ["a/0.png", "b/0.png", "b/deeper/1.PGM", "c/0.png"]
    [found.samples[n] for n in range(4)]


def test_classes_whose_images_all_lie_deeper(tmp_path):
    """As in Tiny ImageNet: CLASS/images/NAME.JPEG."""
    root = colours(tmp_path / "set", "n1/images", "n2/images")
    assert find_sets(root)[0].classnames == ("n1", "n2")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "c").mkdir(), r"folders without images: c\. Every folder is a class here"),
        (lambda root: (root / "b" / "0.png").rename(root / "b" / "0.txt"), r"passes over .*: b/0\.txt"),
        (lambda root: Image.new("L", (2, 2)).save(root / "b" / "x.jpe", "JPEG"), r"passes over .*: b/x\.jpe"),
        (lambda root: Image.new("L", (2, 2)).save(root / "b" / "x.ico"), r"passes over .*: b/x\.ico"),
        (lambda root: (root / "b" / "x.heic").write_bytes(b"?"), r"passes over .*: b/x\.heic"),
        (lambda root: (root / "c").symlink_to("nowhere"), r"c is a link to nowhere, which is not there"),
        (lambda root: (root / "b" / "x.jpg").symlink_to("nowhere"), r"x\.jpg is a link to nowhere"),
        (lambda root: (root / "b" / "again").symlink_to(root), r"again leads to the set itself"),
        (lambda root: (root / "b" / "again").symlink_to("."), r"again leads to .*/b, so images"),
        (lambda root: os.mkfifo(root / "b" / "x.jpg"), r"x\.jpg is a pipe, a socket or a device"),
        (lambda root: colours(root, ".c"), r"hidden folders with images: \.c"),
        (lambda root: (root / "b" / "._0.png").write_bytes(b"\0\5\x16\7\0"), r"_0\.png is no image but what macOS"),
        (lambda root: colours(root / "train", "a", "b"), r"has train/a: is train a class, or a split"),
        (lambda root: colours(root / "val", "kitten"), r"has val/kitten: is val a class, or a split"),
        (lambda root: colours(root / "other", "a", "b"), r"has other/a: is other a class, or a split or a set"),
        (lambda root: write_set(root / "wds"), r"folders of images \(a, b\), and a set in WebDataset layout is at"),
        (lambda root: write_set(root), r"folders of images \(a, b\), and a set in WebDataset layout is at"),
        (lambda root: colours(root, os.fsdecode(b"b\xe9")), r"class folder 'b\\xe9', whose name is no text of UTF-8"),
        (lambda root: (root / "classnames.txt").symlink_to("nowhere"), r"classnames\.txt is a link to nowhere"),
        (lambda root: os.mkfifo(root / "classnames.txt"), r"classnames\.txt is a pipe, a socket or a device"),
        (lambda root: (root / "classnames.txt").write_text("b\na\n"), r"line 1 is 'b', but class 0 is the folder 'a'"),
        (lambda root: (root / "classnames.txt").write_text("a b c\n"), r"names 1 classes, but there are images of 2"),
        (lambda root: (root / "classnames.txt").write_bytes("a\nb\n".encode("utf-16")), r"as UTF-8 text: .* UTF-16"),
        (lambda root: (root / "classnames.txt").write_bytes(b"a\0\nb\n"), r"as UTF-8 text: .* UTF-16"),
        (lambda root: (root / "classnames.txt").write_bytes(b"a\nb\xe9\n"), r"line 2 has the byte 0xe9"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named(tmp_path, spoil, message):
    root = colours(tmp_path / "set", "a", "b")
    spoil(root)
    with pytest.raises(EvaluationError, match=message) as error:
        find_sets(root)
    assert "\n" not in str(error.value)


def test_splits_and_sets_are_not_taken_for_classes(tmp_path):
    colours(tmp_path / "set", "train/a", "train/b", "test/a", "test/b")
    with pytest.raises(EvaluationError, match="has test/a: is test a class"):
        find_sets(tmp_path / "set")
    colours(tmp_path / "sets", "one/cat", "one/dog", "two/x", "two/y")
    with pytest.raises(EvaluationError, match=r"has one/cat: is one a class.*classnames.txt"):
        find_sets(tmp_path / "sets")
    (tmp_path / "sets" / "classnames.txt").write_text("first\nsecond\n")
    [found] = find_sets(tmp_path / "sets")
    assert (found.classnames, found.images) == (("first", "second"), 4)
    vehicles = colours(tmp_path / "vehicles", "bus", "train")  # as in VisDA
    assert find_sets(vehicles)[0].classnames == ("bus", "train")


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda root: (root / ".git").mkdir(), r"hidden folders in .* are no classes here.*: \.git"),
        (
            lambda root: (root / "loose.jpg").write_bytes(b"?"),
            r"images beside the folders of its classes.*: loose\.jpg",
        ),
        (lambda root: (root / "c.tar").write_bytes(b"?"), r"archives, which are not looked into: c\.tar"),
        (lambda root: colours(root, "A"), r"'A' and 'a', which differ by case"),
        (lambda root: colours(root, "\u00e9", "e\u0301"), r"differ by case or by how"),
        (lambda root: colours(root, "c d", "c_d"), r"'c d' names classes 3 and 4"),
        (
            lambda root: (root / "classnames.txt").write_text("x\nx\n"),
            r"classnames\.txt: 'x' names classes 1 and 2",
        ),
        (lambda root: (root / "classnames.txt").write_text("b\nx\n"), r"line 1 calls the folder 'a' 'b'"),
    ],
)
def test_what_is_passed_over_is_said(tmp_path, add, message):
    root = colours(tmp_path / "set", "a", "b")
    add(root)
    with pytest.warns(UserWarning, match=message):
        find_sets(root)


def test_numbers_count_as_text(tmp_path):
    root = colours(tmp_path / "set", *map(str, range(11)))
    names = [f"name {number}" for number in range(11)]
    write_texts(root, names)
    with pytest.warns(UserWarning, match=r"line 3 of classnames\.txt, 'name 2', is the folder '10'"):
        find_sets(root)


def test_other_files_are_no_images(tmp_path):
    root = colours(tmp_path / "set", "a", "b")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "list.txt", "boxes.npy", "._list.txt"):
        (root / "b" / name).write_bytes(b"\xd0\xcf\x11\xe0 of no image")
    os.mkfifo(root / "b" / "pipe")
    assert find_sets(root)[0].images == 2


def test_images_whose_names_are_bytes(tmp_path):
    root = colours(tmp_path / os.fsdecode(b"s\xe9t"), os.fsdecode(b"\xe9"), "b")
    (root / "classnames.txt").write_text("x\ny\n")
    (root / "b" / "0.png").rename(root / "b" / os.fsdecode(b"\xff.png"))
    [found] = find_sets(root)
    assert found.classnames == ("x", "y") and found.name == "s\\xe9t"
    json.dumps([found.name, found.place], ensure_ascii=False).encode()
    assert [found.samples[n][1] for n in range(2)] == [0, 1]
    (root / "list.txt").write_bytes(b"b/\xff.png 0\n\xe9/0.png 1\n")
    assert open_list(root / "list.txt", "listed").images == 2


@pytest.mark.process
def test_a_folder_that_cannot_be_listed():
    # Root lists every folder, so the reader gives its rights up, and pytest's own folder,
    # which is closed to others, cannot be above the set.
    above = Path(tempfile.mkdtemp(prefix="arf-"))
    above.chmod(0o755)
    root = colours(above / "set", "a", "b")
    (root / "b").chmod(0)
    code = (
        "import os, sys, pathlib\n"
        "from arf_plugin.evaluation.sets import find_sets\n"
        "if os.getuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        f"find_sets(pathlib.Path({str(root)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    (root / "b").chmod(0o755)
    shutil.rmtree(above)
    assert "set/b cannot be listed: Permission denied. Its images would be missing" in done.stderr


def test_sets_that_are_links_are_found(images, tmp_path):
    (images.parent / "alias").symlink_to(images)
    (tmp_path / "links").symlink_to(images.parent)
    assert [found.name for found in find_sets(tmp_path / "links")] == ["alias", "shapes"]
    (images.parent / "loop").symlink_to(tmp_path)
    names = [found.name for found in find_sets(images.parent)]
    assert names[:2] == ["alias", "shapes"]


def test_links_without_end_are_refused(tmp_path):
    root = tmp_path / "sets"
    for depth in range(20):
        (root / str(depth)).mkdir(parents=True)
        for link in "ab":
            (root / str(depth) / link).symlink_to(root / str(depth + 1))
    with pytest.raises(EvaluationError, match="lead to the same folders over and over"):
        find_sets(root)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda root: colours(root / "more", "a", "b"), r"images in .*more/a, .*more/b belong to no set"),
        (
            lambda root: write_set(root / "val-only", split="val"),
            r"val-only/val has nshards\.txt, but the split is 'test'",
        ),
        (lambda root: write_tar(root / "new" / "test" / "0.tar", []), r"new/test: tars without nshards\.txt"),
    ],
)
def test_what_looks_like_a_set_beside_others_is_said(images, add, message):
    add(images.parent)
    with pytest.warns(UserWarning, match=message):
        assert [found.name for found in find_sets(images.parent)] == ["shapes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n", r"says 1, which leaves out 1\.tar"),
        ("4000000000\n", r"says 4000000000, but 2\.tar does not exist \(found: 0\.tar, 1\.tar\)"),
        ("9" * 5000, "expected the number of tars"),
        ("0", "expected the number of tars"),
        ("\u0662", "expected the number of tars"),
    ],
)
def test_another_number_of_tars_than_there_are(images, text, message):
    (images / "test" / "nshards.txt").write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=message):
        find_sets(images)


def test_marks_of_windows_are_no_part_of_texts(images):
    (images / "test" / "nshards.txt").write_bytes("\ufeff2\r\n".encode())
    names = ["\ufeffred\u2028thing", *NAMES[1:]]
    (images / "classnames.txt").write_bytes("\r\n".join(names).encode())
    (images / "zeroshot_classification_templates.txt").write_bytes("\ufeffa {c}\r\n".encode())
    [found] = find_sets(images)
    assert found.classnames == ("red\u2028thing", *NAMES[1:]) and found.templates == ("a {c}",)


def test_members_of_no_sample_are_passed_over_and_those_of_half_a_sample_are_not(images):
    whole = [("0.jpg", building.drawing(0)), ("0.cls", b"0")]
    write_tar(images / "test" / "1.tar", [("README.txt", b"?"), *whole, ("LICENSE", b"?")])
    assert find_sets(images)[0].images == 10
    for extra in (("1.gif", b"GIF89a"), ("1.cls", b"1"), ("1.png", building.drawing(1, "PNG"))):
        write_tar(images / "test" / "1.tar", [*whole, extra])
        with pytest.raises(EvaluationError, match=r"sample 1: found .* expected an image and a cls"):
            find_sets(images)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a/0.png 99999999999"], "expected `path class-number`"),
        (["a/0.png " + "9" * 5000], "expected `path class-number`"),
        (["a/0.png 4000000000", "b/0.png 0"], "expected `path class-number`"),
        (["a/0.png 900000000", "b/0.png 0"], "has no image of class 1"),
        (["a/0.png 0", "b/0.png 0"], "line 2: class 0 is called 'b' by its folder, and 'a' above"),
        (["a 0", "b/0.png 1"], "a is a folder, expected a file"),
    ],
)
def test_lists_that_mix_classes_up(tmp_path, lines, message):
    colours(tmp_path, "a", "b")
    (tmp_path / "test.txt").write_text("\n".join(lines))
    with pytest.raises(EvaluationError, match=message):
        open_list(tmp_path / "test.txt", "listed")
