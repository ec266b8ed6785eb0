"""IconNet's names, concepts, split and texts, and the grids of both benchmarks; without network."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from arf_plugin.ablation.reader import load_grid
from arf_plugin.evaluation.suites import load_suite

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import grid, icons, sources  # noqa: E402
from benchmarks.download import DownloadError, member  # noqa: E402
from iconnet import build, concepts, split, texts  # noqa: E402
from iconnet.names import LOOKS, STYLES, Concepts, Drawing, read_drawings, strip_style  # noqa: E402
from iconnet.sources import ICON_SETS  # noqa: E402

LISTED = Concepts(concepts.load(), concepts.other_meanings())


@pytest.mark.parametrize(
    ("set_name", "icon", "found"),
    [
        ("tabler", "bell-plus-filled", ("bell-plus", "solid", "")),
        ("lucide", "bell", ("bell", "line", "")),
        ("ph", "bell-ringing-bold", ("bell-ringing", "bold", "")),
        ("ph", "bell-light", ("bell", None, "")),
        ("solar", "bell-bold", ("bell", "solid", "")),
        ("solar", "bell-bold-duotone", ("bell", "bold-duotone", "")),
        ("material-symbols", "wifi-outline-rounded", ("wifi-outline", None, "")),
        ("mdi", "bell-outline", ("bell", "line", "")),
        ("fluent", "clock-alarm-24-filled", ("clock-alarm", "solid", "24")),
        ("heroicons", "bell-20-solid", ("bell-20", None, "")),
    ],
)
def test_a_sets_suffixes_of_style_are_taken_off(set_name, icon, found):
    name, style, size = strip_style(set_name, icon)
    assert style == found[1] and size == found[2]
    if style is not None:
        assert name == found[0]


@pytest.mark.parametrize(
    ("set_name", "name", "found"),
    [
        ("tabler", "bell", ("bell", "")),
        ("mdi", "notification-add", ("bell", "plus")),
        ("tabler", "bell-x", ("bell", "cross")),
        ("lucide", "book-open-2", ("book", "")),
        ("tabler", "home-off", ("house", "off")),
        ("tabler", "arrow-left", ("", "")),
        ("tabler", "battery-car", ("", "")),
        ("tabler", "filter", ("funnel", "")),
        ("ion", "filter", ("", "")),  # three lines there
        ("solar", "cup", ("", "")),  # a trophy there
    ],
)
def test_a_name_is_a_concept_with_a_variant_or_none(set_name, name, found):
    assert LISTED.of(set_name, name) == found


def test_a_longer_name_of_a_concept_goes_before_a_shorter_one():
    assert LISTED.of("tabler", "shopping-bag-check") == ("shopping bag", "check mark")
    assert LISTED.of("tabler", "cloud-rain") == ("cloud rain", "")
    assert LISTED.mentioned("home-battery-heart") == {"house", "battery", "heart"}


def test_of_several_sizes_one_drawing_is_taken():
    drawn = read_drawings(
        "fluent", ["bell-16-filled", "bell-24-filled", "bell-32-regular", "bell-24-light"], LISTED
    )
    assert {d.icon for d in drawn} == {"bell-24-filled", "bell-32-regular"}


def test_every_name_is_of_one_concept_and_groups_are_of_listed_concepts():
    listed = concepts.load()
    assert max(Counter(name for names in listed.values() for name in names).values()) == 1
    grouped = [concept for group in concepts.GROUPS for concept in group]
    assert set(grouped) <= listed.keys() and len(set(grouped)) == len(grouped)
    known = {name for names in listed.values() for name in names}
    assert all(set_name in STYLES and name in known for set_name, name in concepts.other_meanings())


def world() -> list[Drawing]:
    """Every listed concept, plain and with a plus, in every set and style; the rarer half in few sets; other icons."""
    drawings = []
    for number, concept in enumerate(sorted(concepts.load())):
        for set_name in list(STYLES)[: 14 if number % 4 else 6]:
            for style in dict.fromkeys(style for style in STYLES[set_name].values() if style):
                for variant in ("", "plus"):
                    name = f"{concept.replace(' ', '-')}-{variant}".strip("-")
                    drawings.append(Drawing(set_name, f"{name}-{style}", style, name, concept, variant))
    drawings += [Drawing(s, f"other-{n}", "line", f"other-{n}") for s in ("tabler", "mdi") for n in range(20)]
    drawings += [Drawing(s, "home-battery", "line", "home-battery") for s in STYLES]
    return drawings


@pytest.fixture(scope="module")
def drawings():
    return world()


@pytest.fixture(scope="module")
def classes(drawings):
    return split.choose_classes(drawings)


@pytest.fixture(scope="module")
def places(drawings, classes):
    return split.split(drawings, LISTED, classes)


def test_word_groups_stay_together(classes):
    parts = {c: part for part, members in vars(classes).items() for c in members}
    assert len(parts) == sum(map(len, vars(classes).values()))
    assert 0.36 < len(classes.held_out) / len(classes.held_out + classes.fine_tuned) < 0.45
    for group in concepts.GROUPS:
        assert "fine_tuned" not in (found := {parts[c] for c in group if c in parts}) or len(found) == 1


def test_the_task_is_two_line_sets_one_of_them_for_each_class(places, classes):
    train, other = defaultdict(set), defaultdict(set)
    for drawing, place in places.items():
        if place == "task/train" or place.endswith("/id"):
            assert drawing.set in split.TASK_SETS and drawing.style == "line"
            assert drawing.concept in classes.fine_tuned
            (train if place == "task/train" else other)[drawing.concept].add(drawing.set)
        elif drawing.concept in classes.fine_tuned:
            assert drawing.set not in split.TASK_SETS or drawing.style != "line"
    assert train.keys() == set(classes.fine_tuned)
    assert all(
        len(found) == 1 and other[concept] == {*split.TASK_SETS} - found for concept, found in train.items()
    )
    assert {name for found in train.values() for name in found} == {*split.TASK_SETS}


def test_a_family_draws_a_concept_for_the_pool_or_for_a_test(places):
    sides = defaultdict(set)
    for drawing, place in places.items():
        if drawing.concept and place != "task/train" and not place.endswith("/id"):
            sides[split.family(drawing), drawing.concept].add(place)
    assert all(len(found) == 1 for found in sides.values())
    assert {place for found in sides.values() for place in found} == {
        "pool", "test/shift", "validation/shift", "test/zero_shot", "validation/zero_shot",
    }  # fmt: skip


def test_validation_is_of_other_concepts_than_the_test(places):
    concepts_of = defaultdict(set)
    for drawing, place in places.items():
        concepts_of[place].add(drawing.concept)
    for kind in ("id", "shift", "zero_shot"):
        assert not concepts_of[f"validation/{kind}"] & concepts_of[f"test/{kind}"]
    assert not concepts_of["validation/id"] & concepts_of["test/shift"]


def test_what_mentions_a_tested_concept_is_not_in_the_pool(places, drawings):
    def in_pool(drawing: Drawing, concept: str) -> bool:
        same = [
            p for d, p in places.items() if d.concept == concept and split.family(d) == split.family(drawing)
        ]
        return all(place == "pool" for place in same)

    mentioning = [drawing for drawing in drawings if drawing.name == "home-battery"]
    for drawing in mentioning:
        assert (drawing in places) == all(in_pool(drawing, concept) for concept in ("house", "battery"))
    assert all(places[d] == "pool" for d in drawings if d.name.startswith("other"))


def test_a_new_set_moves_nothing(drawings, classes, places):
    fewer = split.split([d for d in drawings if d.set != "mingcute"], LISTED, classes)
    assert fewer.items() <= places.items()


def test_a_concept_with_many_drawings_has_few_variants():
    many = [Drawing("mdi", f"bell-{n}", "solid", f"bell-{n}", "bell", "plus") for n in range(40)]
    plain = Drawing("mdi", "bell", "solid", "bell", "bell")
    kept = split.few_variants([*many, plain])
    assert len(kept) == split.MAX_VARIANTS and plain in kept


def test_equal_images_are_left_out_of_the_pool_first():
    task, test, pool, empty = (
        Drawing(s, "bell", "line", "bell", "bell") for s in ("tabler", "ph", "bi", "bx")
    )
    found = {pool: "pool", test: "test/shift", task: "task/train", empty: "pool"}
    pngs = dict.fromkeys((task.key, test.key, pool.key), b"same") | {empty.key: b""}
    assert build.without_copies(found, pngs) == {task: "task/train"}


def test_captions_are_a_function_of_the_drawing_and_tell_words_style_or_category():
    bell = Drawing("ph", "bell-duotone", "duotone", "bell-slash", "bell", "off")
    captions = [texts.caption(bell, {"bell-slash": "alerts"}, variant) for variant in range(60)]
    assert captions == [texts.caption(bell, {"bell-slash": "alerts"}, variant) for variant in range(60)]
    assert sum("bell off" in text for text in captions) > 40
    assert any("alerts" in text and "bell" not in text for text in captions)
    assert any("duotone" in text or "two-tone" in text for text in captions)
    assert texts.label(Drawing("mdi", "car-wash", "solid", "car-wash")) == "car wash"


def test_the_licence_is_that_of_the_package(tmp_path):
    source = sources.Source("@iconify-json/set", "1.0.0", "", "MIT", "someone", "https://example.org")
    info = member(tmp_path, source, "info.json")
    info.parent.mkdir(parents=True)
    info.write_text(json.dumps({"license": {"spdx": "MIT"}}))
    icons.check_license(tmp_path, source)
    info.write_text(json.dumps({"license": {"spdx": "CC-BY-NC-4.0"}}))
    with pytest.raises(DownloadError, match=r"'CC-BY-NC-4\.0', expected 'MIT'"):
        icons.check_license(tmp_path, source)


def test_attribution_names_every_package_and_is_up_to_date():
    committed = (ROOT / "scripts" / "iconnet" / "ATTRIBUTION.md").read_text()
    assert committed == build.attribution()
    assert all(source.package in committed and source.version in committed for source in ICON_SETS)
    assert {source.name for source in ICON_SETS} == STYLES.keys()


def test_the_suite_has_a_set_for_every_set_and_style():
    suite = load_suite(ROOT / "scripts" / "iconnet" / "iconnet.yaml")
    domains = {
        f"{s}-{style}": LOOKS[style] for s, styles in STYLES.items() for style in styles.values() if style
    }
    task = {f"{name}-line" for name in split.TASK_SETS}
    assert set(suite.averages["shift"].of) == {f"shift/{domain}" for domain in domains if domain not in task}
    for look in ("line", "solid", "duotone"):
        wanted = {f"shift/{domain}" for domain, its in domains.items() if its == look and domain not in task}
        assert set(suite.averages[look].of) == wanted


@pytest.mark.parametrize("name", ["emojinet", "iconnet"])
def test_the_grids_give_every_arm_three_learning_rates(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = load_grid(f"scripts/benchmarks/grids/{name}.yaml", tmp_path)
    assert {arm.name for arm in found.arms} >= set(grid.MAIN)
    assert found.model == f"local-dir:runs/{name}/resnet-0/clip"
    for arm in found.arms[1:]:
        rates = {flags["lr"] for flags in arm.choice.over}
        assert rates == {("5e-4",), ("1e-3",), ("2e-3",)}
        assert arm.choice.by == "ID + shift + zero-shot + zero-shot fine"
        assert len(arm.choice.over) == (6 if arm.kind == "arf" or arm.anchors else 3)
    rates = load_grid(f"scripts/benchmarks/grids/{name}-lr.yaml", tmp_path)
    assert len(rates.arms) == 10 and all(arm.choice is None for arm in rates.arms)


def test_choices_are_taken_over_but_for_alphas_and_what_is_chosen_already(tmp_path):
    first, second = tmp_path / "resnet-0", tmp_path / "resnet-1"
    first.mkdir()
    (first / "choices.json").write_text(json.dumps({"arms": {"flyp": 1, "arf": 2}, "wise": {"flyp": 0.5}}))
    grid.take_over(first, second)
    assert json.loads((second / "choices.json").read_text()) == {"arms": {"flyp": 1, "arf": 2}, "wise": {}}
    (second / "choices.json").write_text(json.dumps({"arms": {"flyp": 7}, "wise": {"flyp": 0.25}}))
    grid.take_over(first, second)
    known = json.loads((second / "choices.json").read_text())
    assert known == {"arms": {"flyp": 7, "arf": 2}, "wise": {"flyp": 0.25}}
