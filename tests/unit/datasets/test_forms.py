"""Images in every usual form: the same images give the same shards; what is wrong gets one sentence."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from arf_plugin.datasets.remote import fetched
from arf_plugin.datasets.stage import DataStage
from arf_plugin.errors import ArfError
from arf_plugin.evaluation.sets import find_sets
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.runner import run_stage

CLASSES = ["green_frog", "red fox", "zebra"]
FORMATS = ["JPEG", "PNG", "WEBP", "BMP"]


def image(seed: int, kind: str = "PNG") -> bytes:
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind)
    return stream.getvalue()


# (class, suffix as people write it, bytes): thirty images, ten a class
IMAGES = [
    (CLASSES[n % 3], [".jpg", ".png", ".WEBP", ".BMP"][n % 4], image(n, FORMATS[n % 4])) for n in range(30)
]


def class_folders(root, images=IMAGES):
    for n, (label, suffix, data) in enumerate(images):
        path = root / label / f"{n}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def deeper(root):
    class_folders(root / "downloads" / "images")
    (root / "downloads/images/zebra").rename(root / "moved")
    (root / "downloads/images/zebra").mkdir()
    (root / "moved").rename(root / "downloads/images/zebra/from the phone")
    (root / "__MACOSX").mkdir()
    return root


def in_groups(root):
    class_folders(root / "animals", [one for one in IMAGES if one[0] != "zebra"])
    class_folders(root / "others", [one for one in IMAGES if one[0] == "zebra"])
    return root


def files(root):
    root.mkdir(exist_ok=True)
    for n, (_, suffix, data) in enumerate(IMAGES):
        (root / f"{n}{suffix}").write_bytes(data)
    return [(f"{n}{suffix}", label) for n, (label, suffix, _) in enumerate(IMAGES)]


def table(root, header, sign=",", label=lambda name: name):
    rows = [[name, label(kind)] for name, kind in files(root)]
    with (root / "all.csv").open("w", newline="") as stream:
        csv.writer(stream, delimiter=sign).writerows([header, *rows])
    return root / "all.csv"


def csv_of_names(root):
    return table(root, ["filepath", "label"])


def tsv_of_folder(root):
    return table(root, ["File Name", "Class"], "\t").parent


def metadata(root):
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in files(root)]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_parquet(path, images, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"info": {"features": {"label": {"names": CLASSES[::-1], "_type": "ClassLabel"}}}}
    columns = {"image": [{"bytes": data, "path": None} for _, _, data in images]}
    if text is None:
        columns["label"] = [CLASSES[::-1].index(label) for label, _, _ in images]
    else:
        columns["text"] = [text(n) for n in range(len(images))]
    schema = pa.table(columns).replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(schema, path, row_group_size=4)


def parquet(root):
    write_parquet(root / "data" / "part-0.parquet", IMAGES[:17])
    write_parquet(root / "data" / "part-1.parquet", IMAGES[17:])
    return root


def tars(root, images=IMAGES):
    root.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(root / f"{number}.tar", "w") as tar:
            for n, (label, suffix, data) in list(enumerate(images))[number::2]:
                suffix = suffix if suffix != ".BMP" else ".png"
                for name, content in (
                    (f"{n}{suffix}", data),
                    (f"{n}.cls", str(CLASSES.index(label)).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def tars_by_glob(root):
    return tars(root) / "*.tar"


def tars_in_braces(root):
    return tars(root) / "{0..1}.tar"


FORMS = [
    deeper,
    in_groups,
    csv_of_names,
    tsv_of_folder,
    metadata,
    parquet,
    tars,
    tars_by_glob,
    tars_in_braces,
]


def make(source, out, **flags):
    execution = Execution(max_bad_fraction=0.5)
    run_stage(DataStage(out, str(source), **flags), execution)
    kept = [p for p in out.rglob("*") if p.suffix == ".tar" or p.name in ("classnames.txt", "templates.txt")]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    return make(class_folders(root / "in"), root / "out")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_bytes(tmp_path, expected, form):
    assert make(form(tmp_path / "in"), tmp_path / "out") == expected


def test_indices_take_the_names_of_a_file(tmp_path, expected):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES[::-1]) + "\n")
    source = table(tmp_path / "in", ["path", "class"], label=lambda name: CLASSES[::-1].index(name))
    assert make(source, tmp_path / "out", classnames=str(names)) == expected


def test_what_is_written(tmp_path, expected):
    assert expected["classnames.txt"].decode().splitlines() == ["green frog", "red fox", "zebra"]
    assert "a bad photo of the {c}." in expected["templates.txt"].decode()
    members = {}
    for name, data in expected.items():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                members |= {f"{name.split('/')[0]}/{m.name}": tar.extractfile(m).read() for m in tar}
    labels = {key: int(data) for key, data in members.items() if key.endswith(".cls")}
    assert len(labels) == 30
    # Two of ten are for validation, of each class.
    assert [sum(k.startswith("val/") and v == c for k, v in labels.items()) for c in range(3)] == [2, 2, 2]
    kept = {data for _, suffix, data in IMAGES if suffix != ".BMP"}
    assert kept < {data for key, data in members.items() if not key.endswith(".cls")}
    assert {key.rpartition(".")[2] for key in members} == {"jpg", "png", "webp", "cls"}


def test_validation_images_are_an_evaluation_set(tmp_path):
    make(class_folders(tmp_path / "in"), tmp_path / "out")
    (found,) = find_sets(tmp_path / "out" / "val")
    assert found.classnames == ("green frog", "red fox", "zebra") and found.images == 6


def splits_of_folders(root):
    class_folders(root / "train", IMAGES[:21])
    return class_folders(root / "Validation", IMAGES[21:]).parent


def splits_of_a_table(root):
    part = ["train"] * 21 + ["val"] * 9
    rows = [[name, label, said] for (name, label), said in zip(files(root), part, strict=True)]
    with (root / "all.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["image", "label", "split"], *rows])
    return root / "all.csv"


def splits_of_parquet(root):
    write_parquet(root / "data" / "train-00000-of-00001.parquet", IMAGES[:21])
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", IMAGES[21:])
    return root


def test_splits_of_the_source_are_kept(tmp_path):
    made = [
        make(form(tmp_path / form.__name__), tmp_path / f"{form.__name__}-out")
        for form in (splits_of_folders, splits_of_a_table, splits_of_parquet)
    ]
    assert made[0] == made[1] == made[2]
    assert len((tmp_path / "splits_of_folders-out/sources.tsv").read_text().splitlines()) == 30
    sources = (tmp_path / "splits_of_folders-out/sources.tsv").read_text()
    assert all(("/Validation/" in line) == line.startswith("val/") for line in sources.splitlines())


def numbered_tars(root):
    """Validation images as tars with class indices and no names of their own: they have the source's."""
    tars(root)
    (root / "classnames.txt").unlink()
    return root


def test_validation_images_may_be_a_source_of_their_own(tmp_path):
    root = splits_of_folders(tmp_path / "in")
    expected = make(root, tmp_path / "expected")
    assert make(root / "train", tmp_path / "out", val=str(root / "Validation")) == expected
    others = [(label, ".png", image(100 + n)) for n, (label, _, _) in enumerate(IMAGES)]
    source = tars(tmp_path / "others", others)
    made = [
        make(source, tmp_path / own.__name__, val=str(own(tmp_path / "val" / own.__name__)))
        for own in (tars, numbered_tars)
    ]
    assert made[0] == made[1] and "val/test/0.tar" in made[0]

    (root / "Validation" / "zebra").rename(root / "Validation" / "unicorn")
    with pytest.raises(ArfError, match="has the class 'unicorn'"):
        make(root / "train", tmp_path / "other", val=str(root / "Validation"))
    with pytest.raises(ArfError, match="validation images of its own"):
        make(root, tmp_path / "twice", val=str(root / "Validation"))


def test_own_prompts_take_the_place_of_the_seven(tmp_path):
    templates = tmp_path / "templates.txt"
    templates.write_text("a satellite photo of {}.\n")
    made = make(class_folders(tmp_path / "in"), tmp_path / "out", templates=str(templates))
    assert made["templates.txt"] == b"a satellite photo of {c}.\n"
    assert find_sets(tmp_path / "out" / "val")[0].templates == ("a satellite photo of {c}.",)


def test_an_image_of_two_splits_is_no_training_image(tmp_path):
    root = splits_of_folders(tmp_path / "in")
    expected = make(root, tmp_path / "expected")
    label, suffix, data = IMAGES[-1]
    (root / "train" / label / f"copy{suffix}").write_bytes(data)
    assert make(root, tmp_path / "out") == expected
    assert "1 images are in several splits" in (tmp_path / "out/data.json").read_text()


def test_what_cannot_be_used_is_set_aside_by_its_own_path(tmp_path, expected):
    root = class_folders(tmp_path / "in")
    (root / "zebra" / "cut.jpg").write_bytes(image(50, "JPEG")[:-40])
    (root / "zebra" / "empty.png").touch()
    (root / "zebra" / "again.png").write_bytes(IMAGES[2][2])  # a zebra
    (root / "zebra" / "notes.txt").write_text("not an image")
    (root / "zebra" / "claimed.png").write_bytes(image(60))
    (root / "red fox" / "claimed.png").write_bytes(image(60))
    (root / "unicorn").mkdir()
    assert make(root, tmp_path / "out") == expected
    rejected = dict(line.split("\t") for line in (tmp_path / "out/rejected.tsv").read_text().splitlines())
    assert len(rejected) == 4
    assert "cannot be decoded" in rejected[str(root / "zebra/cut.jpg")]
    assert "empty" in rejected[str(root / "zebra/empty.png")]
    for name in ("red fox", "zebra"):
        assert "red fox and as zebra" in rejected[str(root / name / "claimed.png")]
    notes = " ".join(json.loads((tmp_path / "out/data.json").read_text())["notes"])
    for said in ("1 .txt", "1 images are there again", "'green_frog' -> 'green frog'", "no classes: unicorn"):
        assert said in notes


def pool_of_files(root):
    files(root)
    for n in range(30):
        (root / f"{n}.txt").write_text(f"picture {n}\n")
    return root


def pool_of_a_table(root):
    rows = [
        json.dumps({"file_name": name, "text": f"picture {n}"}) for n, (name, _) in enumerate(files(root))
    ]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    return root


def pool_of_parquet(root):
    write_parquet(root / "a.parquet", IMAGES, text=lambda n: f"picture {n}")
    return root / "a.parquet"


def test_every_form_of_a_pool_gives_the_same_bytes(tmp_path):
    made = [
        make(form(tmp_path / form.__name__), tmp_path / f"{form.__name__}-out", pool=True)
        for form in (pool_of_files, pool_of_a_table, pool_of_parquet)
    ]
    assert made[0] == made[1] == made[2] and set(made[0]) == {f"{n:06d}.tar" for n in range(8)}


def test_a_pool_elsewhere_is_copied_once(tmp_path):
    import fsspec

    pool_of_parquet(tmp_path / "in")
    elsewhere = fsspec.filesystem("memory")
    for path in (tmp_path / "in").rglob("*.parquet"):
        elsewhere.pipe(f"/elsewhere/data/{path.name}", path.read_bytes())
    elsewhere.pipe("/elsewhere/README.md", b"# a card")
    try:
        copy = fetched("memory://elsewhere", tmp_path / "copy")
        files = {path: path.stat().st_mtime_ns for path in copy.rglob("*.*")}
        assert make(copy, tmp_path / "out", pool=True) == make(tmp_path / "in", tmp_path / "here", pool=True)
        assert fetched("memory://elsewhere/data/*.parquet", copy) == copy
        assert fetched("memory://elsewhere", copy) == copy
        assert {path: path.stat().st_mtime_ns for path in files} == files
    finally:
        elsewhere.rm("/elsewhere", recursive=True)
    with pytest.raises(ArfError, match="no file at memory://elsewhere"):
        fetched("memory://elsewhere", copy)
    with pytest.raises(ArfError, match="cannot be fetched"):
        fetched("nosuch://elsewhere", copy)


def image_file(root):
    return class_folders(root) / "zebra" / "2.WEBP"


def loose(root):
    files(root)
    return root


def indices(root):
    return table(root, ["path", "label"], label=CLASSES.index)


def link(root):
    root.mkdir()
    (root / "a.csv").write_text("image,label\nhttps://example.org/1.jpg,a\n")
    return root / "a.csv"


def escape(root):
    (root / "in").mkdir(parents=True)
    (root / "secret.png").write_bytes(image(1))
    (root / "in/metadata.jsonl").write_text('{"file_name": "../secret.png", "label": "a"}\n')
    return root / "in"


def no_column(root):
    return table(root, ["what", "label"])


def a_quote_without_end(root):
    root.mkdir()
    (root / "a.csv").write_text('image,label\n1.jpg,a\n2.jpg,"a\n' + "3.jpg,a\n" * 20_000)
    return root / "a.csv"


def one_class(root):
    return class_folders(root, [one for one in IMAGES if one[0] == "zebra"])


def misspelt(root):
    class_folders(root / "my-images")
    return root / "my-imagse"


def nothing_matches(root):
    return class_folders(root) / "*.tar"


def twins(root):
    return class_folders(root, [*IMAGES, ("green frog", ".png", image(70))])


@pytest.mark.parametrize(
    "form, says",
    [
        (image_file, "is an image, not a set of images"),
        (loose, "no folders of classes"),
        (indices, "--classnames FILE"),
        (link, "arf download"),
        (escape, "leads out of the folder"),
        (no_column, "no column of image paths"),
        (a_quote_without_end, r"a\.csv cannot be read after row 1: .*Is a quote missing"),
        (one_class, "only one class, 'zebra'"),
        (misspelt, "Did you mean"),
        (nothing_matches, "No file matches"),
        (twins, "both called 'green frog'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_not_understood_gets_one_sentence(tmp_path, form, says):
    with pytest.raises(ArfError, match=says):
        make(form(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
