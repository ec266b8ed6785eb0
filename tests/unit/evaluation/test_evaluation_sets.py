"""Sets: every layout, what suites say of them, and what is wrong with those that are malformed."""

from __future__ import annotations

import gzip
import io
import json
import shutil

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


def test_content_of_a_builders_data_counts(suite, tmp_path):
    folder = write_dtd(tmp_path / "dtd")
    made = suite("{sources: [{builder: dtd}]}")
    before = find_suite(made, tmp_path).sets[0].samples.digest
    assert find_suite(made, tmp_path).sets[0].samples.digest == before
    path = folder / "images" / "dotted" / "dotted_0.jpg"
    path.write_bytes(path.read_bytes()[::-1])
    assert find_suite(made, tmp_path).sets[0].samples.digest != before
