"""Sets: every layout, what suites say of them, and what is wrong with those that are malformed."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from support import building
from support.evaluation import NAMES, TEMPLATES, write_folders, write_set, write_texts
from support.tars import write_tar

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.sets import find_sets, open_folders, open_list, open_webdataset
from arf_plugin.evaluation.sources import find_suite, missing_text
from arf_plugin.evaluation.suites import load_suite


@pytest.fixture
def images(tmp_path):
    """A set of two tars of drawings with six classes."""
    return write_set(tmp_path / "sets" / "shapes")


@pytest.fixture
def suite(tmp_path):
    """Makes a suite of one set from the YAML of its entry."""

    def make(entry: str):
        path = tmp_path / "own.yaml"
        path.write_text(f"sets: {{shapes: {entry}}}\n")
        return load_suite(path)

    return make


def pixels(image) -> bytes:
    return image.convert("RGB").tobytes()


def test_a_webdataset_folder(images):
    [found] = find_sets(images.parent)
    assert (found.name, found.images, found.split) == ("shapes", 18, "test")
    assert found.classnames == tuple(NAMES)
    assert found.templates == tuple(TEMPLATES)
    read = [found.samples[n] for n in (17, 0, 9)]
    assert [number for _, number in read] == [5, 0, 3]
    assert pixels(read[0][0]) == pixels(Image.open(io.BytesIO(building.drawing(17))))


def test_compressed_tars_are_read(images):
    expected = pixels(open_webdataset(images, "plain").samples[4][0])
    tar = images / "test" / "0.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    packed = open_webdataset(images, "packed")
    assert [n for _, n in map(packed.samples.__getitem__, range(18))] == [n % 6 for n in range(18)]
    assert pixels(packed.samples[4][0]) == expected


def test_folders_of_images(tmp_path):
    root = write_folders(tmp_path / "colours")
    [found] = find_sets(root)
    assert found.classnames == (
        "black thing",
        "blue thing",
        "green thing",
        "orange thing",
        "purple thing",
        "red thing",
    )
    assert [found.samples[n][1] for n in range(12)] == [n // 2 for n in range(12)]
    assert pixels(found.samples[0][0]) == pixels(Image.open(io.BytesIO(building.drawing(5, "PNG"))))
    assert len(found.templates) == 80  # ImageNet's
    write_texts(root, sorted(NAMES))
    assert open_folders(root, "colours").templates == tuple(TEMPLATES)


def test_a_list_of_images(tmp_path):
    write_folders(tmp_path)
    lines = [f"{building.COLOURS[n % 6]}_thing/{n:03d}.png {n % 6}" for n in (8, 7, 0, 9, 10, 11)]
    (tmp_path / "test.txt").write_text("\n".join(lines) + "\n")
    found = open_list(tmp_path / "test.txt", "listed")
    assert [found.samples[n][1] for n in range(6)] == [2, 1, 0, 3, 4, 5]
    assert found.classnames == tuple(NAMES)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["red_thing/000.png"], "line 1: .* expected `path class-number`"),
        (["red_thing/000.png 0", "../secret.png 1"], "line 2: '../secret.png' leaves the folder"),
        (["/etc/passwd 0"], "leaves the folder"),
        (["red_thing/000.png 0", "green_thing/001.png 2"], "has no image of class 1, but some of class 2"),
        (["red_thing/000.png 0", "red_thing/099.png 0"], "099.png cannot be read: No such file"),
    ],
)
def test_a_malformed_list(tmp_path, lines, message):
    write_folders(tmp_path)
    (tmp_path / "test.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(EvaluationError, match=message):
        open_list(tmp_path / "test.txt", "listed")


def test_equal_data_have_equal_digests(images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "copy")
    before = open_webdataset(images, "a")
    assert open_webdataset(copy, "b").samples.digest == before.samples.digest
    assert open_webdataset(copy, "b").prompts == before.prompts
    write_set(copy, images=16)
    write_texts(copy, [*NAMES[:5], "black things"])
    assert open_webdataset(copy, "b").samples.digest != before.samples.digest
    assert open_webdataset(copy, "b").prompts != before.prompts


def test_a_suite_finds_sets_under_the_names_of_clip_benchmarks_exports(images, suite, tmp_path):
    made = suite("{sources: [{webdataset: vtab/shapes, images: 18}], metric: macro_f1}")
    for name in ("vtab/shapes", "vtab-shapes", "wds_vtab-shapes", "wds/vtab/shapes"):
        root = tmp_path / name.replace("/", "_")
        shutil.copytree(images, root / name)
        [found] = find_suite(made, root).sets
        assert (found.name, found.metric, found.images, found.truncated()) == ("shapes", "macro_f1", 18, None)


def test_splits(images, suite, tmp_path):
    shutil.copytree(images, tmp_path / "root" / "validation" / "shapes")
    made = suite('{sources: [{webdataset: "{split}/{set}"}]}')
    [found] = find_suite(made, tmp_path / "root", "validation").sets
    assert (found.split, found.images) == ("validation", 18)
    write_set(tmp_path / "root" / "shapes", split="validation", images=6)
    plain = suite("{sources: [{webdataset: shapes}]}")
    [found] = find_suite(plain, tmp_path / "root", "validation").sets
    assert (found.split, found.images) == ("validation", 6)


def test_the_first_source_that_is_there_is_taken(suite, tmp_path):
    made = suite("{sources: [{webdataset: a}, {list: b/test.txt}, {folders: c, images: 12}]}")
    found = find_suite(made, tmp_path)
    assert found.sets == []
    assert missing_text(made, found) == (
        "1 of the sets of 'own' are not there:\n"
        f"  shapes: no {tmp_path}/a/test/nshards.txt and no {tmp_path}/b/test.txt and no {tmp_path}/c/"
    )
    write_folders(tmp_path / "c")
    [opened] = find_suite(made, tmp_path).sets
    assert (opened.images, opened.expected_images) == (12, 12)


def test_a_builder_of_clip_benchmark(suite, tmp_path):
    folder = write_dtd(tmp_path / "dtd")
    [found] = find_suite(suite("{sources: [{builder: dtd}], metric: top1}"), tmp_path).sets
    assert found.classnames == ("dotted", "striped")
    assert len(found.templates) == 8  # CLIP_benchmark's for DTD
    assert [found.samples[n][1] for n in range(4)] == [0, 0, 1, 1]
    (folder / "images" / "dotted" / "dotted_0.jpg").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match="Image 0 of dtd cannot be read"):
        found.samples[0]


def write_dtd(root):
    """The Describable Textures in torchvision's layout, with two classes; returns the inner folder."""
    folder = root / "dtd" / "dtd"
    listed = [f"{name}/{name}_{n}.jpg" for name in ("dotted", "striped") for n in range(2)]
    for number, path in enumerate(listed):
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / path).write_bytes(building.drawing(number))
    (folder / "labels").mkdir()
    (folder / "labels" / "test1.txt").write_text("\n".join(listed) + "\n")
    return folder


def test_objectnet_is_its_113_classes(suite, tmp_path):
    """ObjectNet's own mapping says which of its folders overlap with ImageNet; the others are left out."""
    root = tmp_path / "objectnet"
    for folder in ("armchair", "air_freshener", "banana"):
        (root / "objectnet-1.0" / "images" / folder).mkdir(parents=True)
        (root / "objectnet-1.0" / "images" / folder / "a.png").write_bytes(building.drawing(1, "PNG"))
    mapping = {"Armchair": "rocking chair, rocker", "Banana": "banana"}
    names = {"armchair": "Armchair", "air_freshener": "Air freshener", "banana": "Banana"}
    ids = {"0": 0, "1": 1}
    (root / "objectnet_to_imagenet_1k.json").write_text(json.dumps(mapping))
    (root / "folder_to_objectnet_label.json").write_text(json.dumps(names))
    (root / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(ids))
    (root / "imagenet_to_label_2012_v2").write_text("rocking chair, rocker\nbanana\n")
    [found] = find_suite(suite("{sources: [{builder: objectnet}]}"), tmp_path).sets
    assert found.classnames == ("armchair", "banana")
    assert [found.samples[n][1] for n in range(found.images)] == [0, 1]


def test_nothing_is_downloaded(suite, tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", None)
    (tmp_path / "imagenetv2").mkdir()
    with pytest.raises(EvaluationError, match=r"has 0 images, expected 10,000\. Extract"):
        find_suite(suite("{sources: [{builder: imagenetv2}]}"), tmp_path)
    (tmp_path / "pets").mkdir()
    with pytest.raises(EvaluationError, match="builder 'pets' cannot read"):
        find_suite(suite("{sources: [{builder: pets}]}"), tmp_path)
    (tmp_path / "imagenet-r").mkdir()
    write_folders(tmp_path / "imagenet-r")
    with pytest.raises(EvaluationError, match="has 6 folders, expected one for each of 200 classes"):
        find_suite(suite("{sources: [{builder: imagenet-r}]}"), tmp_path)
    with pytest.raises(EvaluationError, match="builder 'vtab/pets' cannot be used here"):
        find_suite(suite("{sources: [{builder: vtab/pets, at: pets}]}"), tmp_path)


def test_a_truncated_copy_is_noticed(images, suite, tmp_path):
    made = suite("{sources: [{webdataset: shapes, images: 20}]}")
    [found] = find_suite(made, images.parent).sets
    assert "has 18 images, a whole copy has 20: is it incomplete?" in found.truncated()


def test_another_number_of_classes_than_the_suite_says(images, suite):
    with pytest.raises(EvaluationError, match=r"shapes has 6 classes, expected 7\. Is it another data set"):
        find_suite(suite("{classes: 7, sources: [{webdataset: shapes}]}"), images.parent)
    with pytest.raises(EvaluationError, match="'classnames' has 2 classes, expected 6"):
        find_suite(suite("{classnames: [a, b], sources: [{webdataset: shapes}]}"), images.parent)


def test_own_names_and_prompts(images, suite):
    entry = "{classnames: [r, g, b, o, p, k], templates: ['the {c}'], sources: [{webdataset: shapes}]}"
    [found] = find_suite(suite(entry), images.parent).sets
    assert (found.classnames, found.templates) == (tuple("rgbopk"), ("the {c}",))


@pytest.mark.parametrize(
    ("subset", "names", "numbers"),
    [
        ("first-half", NAMES[:3], [0, 1, 2] * 3),
        ("second-half", NAMES[3:], [0, 1, 2] * 3),
        ("[blue thing, red thing]", [NAMES[2], NAMES[0]], [1, 0] * 3),
    ],
)
def test_some_of_the_classes(images, suite, subset, names, numbers):
    made = suite(f"{{subset: {subset}, sources: [{{webdataset: shapes, images: 18}}]}}")
    [found] = find_suite(made, images.parent).sets
    assert list(found.classnames) == names
    assert [found.samples[n][1] for n in range(found.images)] == numbers
    assert found.truncated() is None


def test_sets_that_are_not_there(tmp_path, suite):
    with pytest.raises(EvaluationError, match="no evaluation set in or below"):
        find_sets(tmp_path)
    with pytest.raises(EvaluationError, match="There is no folder"):
        find_sets(tmp_path / "none")
    made = suite("{sources: [{webdataset: shapes}]}")
    with pytest.raises(EvaluationError, match=r"There is no folder .*data root of the suite 'own'"):
        find_suite(made, tmp_path / "none")
    with pytest.raises(EvaluationError, match=r"'shape' is no set of the suite 'own'.*shapes"):
        find_suite(made, tmp_path, only=["shape"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classnames.txt", "", "is empty"),
        ("classnames.txt", "a\n\nb\n", "line 2 is blank"),
        ("zeroshot_classification_templates.txt", "a photo\n", "has no {c}"),
        ("zeroshot_classification_templates.txt", "a {c.__class__}\n", "has another field than {c}"),
        ("zeroshot_classification_templates.txt", "a {c\n", "is no template"),
        ("test/nshards.txt", "many\n", "expected the number of tars"),
        ("test/nshards.txt", "3\n", "2.tar does not exist"),
    ],
)
def test_a_malformed_set_is_named(images, name, content, message):
    (images / name).write_text(content)
    with pytest.raises(EvaluationError, match=message):
        find_sets(images)


def test_a_set_without_images(images):
    for shard in range(2):
        write_tar(images / "test" / f"{shard}.tar", [])
    with pytest.raises(EvaluationError, match=r"set 'shapes' at .* has no images"):
        find_sets(images)


def test_class_numbers_that_classnames_do_not_count(images):
    write_texts(images, NAMES[:4])
    with pytest.raises(EvaluationError, match=r"0\.tar, sample 0004: cls is '4'.* counts 4 classes"):
        find_sets(images)
    root = write_folders(images.parent.parent / "folders")
    write_texts(root, NAMES[:4])
    with pytest.raises(EvaluationError, match="names 4 classes, but there are images of 6"):
        find_sets(root)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", building.drawing(0))], "expected an image and a cls"),
        ([("a.jpg", building.drawing(0)), ("a.cls", b"6")], "expected a number from 0 to 5"),
        ([("a.jpg", building.drawing(0)), ("a.cls", b"-1")], "expected a number from 0 to 5"),
        ([("../a.jpg", building.drawing(0)), ("../a.cls", b"1")], "leaves the folder"),
    ],
)
def test_a_bad_sample_is_named(images, members, message):
    write_tar(images / "test" / "1.tar", members)
    with pytest.raises(EvaluationError, match=message) as error:
        find_sets(images)
    assert "1.tar" in str(error.value)


def test_a_pickle_in_a_tar_is_left_alone(images):
    """CLIP_benchmark's decoder unpickles members of this kind."""
    evil = b"cos\nmkdir\n(S'" + str(images / "made").encode() + b"'\ntR."
    members = [("a.jpg", building.drawing(0)), ("a.cls", b"1"), ("a.pyd", evil), ("a.pickle", evil)]
    write_tar(images / "test" / "1.tar", members)
    [found] = find_sets(images)
    assert found.samples[9][1] == 1
    assert not (images / "made").exists()


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
    assert [path for path, _ in found.samples.files] == ["a/0.png", "b/0.png", "b/deeper/1.PGM", "c/0.png"]
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


def test_a_folder_that_cannot_be_listed(tmp_path):
    root = colours(tmp_path / "set", "a", "b")
    (root / "b").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    code = (
        "import os, sys, pathlib\n"
        "from arf_plugin.evaluation.sets import find_sets\n"
        "if os.getuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        f"find_sets(pathlib.Path({str(root)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    (root / "b").chmod(0o755)
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


def test_images_of_equal_names_and_sizes_are_other_data(tmp_path, images):
    root = tmp_path / "folders"
    for name in "ab":
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), "red").save(root / name / "0.bmp")
    before, size = find_sets(root)[0], (root / "a" / "0.bmp").stat()
    Image.new("RGB", (4, 4), "blue").save(root / "a" / "0.bmp")
    os.utime(root / "a" / "0.bmp", ns=(size.st_atime_ns, size.st_mtime_ns))
    assert (root / "a" / "0.bmp").stat().st_size == size.st_size
    assert find_sets(root)[0].samples.digest != before.samples.digest
    with pytest.raises(EvaluationError, match=r"a/0\.bmp: the image is not the one that was there"):
        before.samples[0]
    [tars] = find_sets(images)
    members = [(f"{n:04d}.{ext}", data) for n in range(9) for ext, data in sample(n + 1, n % 6)]
    write_tar(images / "test" / "0.tar", members)
    with pytest.raises(EvaluationError, match=r"0\.tar, sample 0000: the image is not the one"):
        tars.samples[0]
    assert find_sets(images)[0].samples.digest != tars.samples.digest


def sample(drawn, cls):
    return ("jpg", building.drawing(drawn)), ("cls", str(cls).encode())


def test_digests_of_large_sets_are_computed_once(tmp_path, monkeypatch):
    """The cache knows them by size, times and inode; what has just been written is not trusted to it."""
    monkeypatch.setenv("ARF_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "set"
    for name in "ab":
        (root / name).mkdir(parents=True)
        Image.new("RGB", (2000, 2000), "red").save(root / name / "0.bmp")
    digest = find_sets(root)[0].samples.digest
    assert not (tmp_path / "cache").exists()
    import time

    time.sleep(2.1)
    assert find_sets(root)[0].samples.digest == digest
    [cached] = (tmp_path / "cache" / "evaluation").iterdir()
    kept = json.loads(cached.read_text())
    cached.write_text(json.dumps(["0" * 64, *kept[1:]]))
    assert find_sets(root)[0].samples.digest != digest  # it was read from there
    cached.write_text("[" * 100_000)
    assert find_sets(root)[0].samples.digest == digest
    with (root / "a" / "0.bmp").open("r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    assert find_sets(root)[0].samples.digest != digest


def test_content_of_a_builders_data_counts(suite, tmp_path):
    folder = write_dtd(tmp_path / "dtd")
    made = suite("{sources: [{builder: dtd}]}")
    before = find_suite(made, tmp_path).sets[0].samples.digest
    assert find_suite(made, tmp_path).sets[0].samples.digest == before
    path = folder / "images" / "dotted" / "dotted_0.jpg"
    path.write_bytes(path.read_bytes()[::-1])
    assert find_suite(made, tmp_path).sets[0].samples.digest != before


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
