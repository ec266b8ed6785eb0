"""Suites: those that come along, their averages, and mistakes in own files."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.suites import average, known_suites, load_suite

SCRIPTS = Path(__file__).parents[3] / "scripts"

SMALL = """\
description: two sets
sets:
  seen:
    sources: [{webdataset: "{set}", images: 3}]
  unseen:
    metric: mean_per_class
    sources: [{folders: "{set}/{split}"}]
averages:
  S: {kind: class-split, of: [seen]}
  U: {kind: class-split, of: [unseen]}
  H: {kind: class-split, harmonic: [S, U]}
"""


@pytest.fixture
def own(tmp_path):
    """Writes an own suite file; `replace` changes it."""

    def write(*replace: str) -> Path:
        path = tmp_path / "own.yaml"
        assert not replace or replace[0] in SMALL
        path.write_text(SMALL.replace(*replace) if replace else SMALL)
        return path

    return write


def test_the_suites_that_come_along():
    assert known_suites() == ["domainnet", "emojinet", "imagenet-shifts", "zero-shot-transfer"]
    shifts = load_suite("imagenet-shifts")
    assert list(shifts.averages["4 shifts"].of) == [
        "imagenetv2",
        "imagenet-r",
        "imagenet-a",
        "imagenet-sketch",
    ]
    assert set(shifts.averages["5 shifts"].of) - set(shifts.averages["4 shifts"].of) == {"objectnet"}
    assert shifts.sets["objectnet"].classes == 113
    transfer = load_suite("zero-shot-transfer")
    per_class = {name for name, entry in transfer.sets.items() if entry.metric == "mean_per_class"}
    assert per_class == {"caltech101", "pets", "flowers", "aircraft"}
    assert len(transfer.averages["mean"].of) == 10
    assert len(load_suite("domainnet").sets) == 6


def test_averages_of_the_imagenet_suite():
    suite = load_suite("imagenet-shifts")
    # ARF's scores in the paper, whose averages over four and five shifts follow.
    scores = {
        "imagenet": 82.7, "imagenetv2": 72.8, "imagenet-r": 75.6, "imagenet-a": 50.3, "imagenet-sketch": 51.8,
    }  # fmt: skip
    assert average(suite, scores) == {
        "ID": 82.7,
        "4 shifts": pytest.approx(62.625),
    }  # no ObjectNet: no average
    assert average(suite, {**scores, "objectnet": 55.8})["5 shifts"] == pytest.approx(61.26)


def test_emojinet_is_averaged_as_the_quickstart_averages_it(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from emojinet import report

    suite = load_suite("emojinet")
    scores = {name: 7.0 * number % 50 for number, name in enumerate(suite.sets)}
    ours, theirs = average(suite, scores), report.metrics(scores)
    names = {
        "ID": "id",
        "shift": "shift",
        "mono": "mono",
        "zero-shot": "zero_shot",
        "zero-shot fine": "zero_shot_fine",
    }
    assert {names[name]: ours[name] for name in names} == pytest.approx(theirs)
    seen = statistics.fmean(
        value for name, value in scores.items() if name == "id" or name.startswith("shift/")
    )
    unseen = scores["zero_shot"]
    assert ours["harmonic mean"] == pytest.approx(2 * seen * unseen / (seen + unseen))


def test_an_own_suite(own):
    suite = load_suite(own())
    assert suite.name == "own"
    assert suite.sets["unseen"].sources[0].place == "unseen/{split}"
    assert average(suite, {"seen": 60.0, "unseen": 30.0}) == {"S": 60.0, "U": 30.0, "H": pytest.approx(40.0)}
    assert average(suite, {"seen": 60.0}) == {"S": 60.0}


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("metric: mean", "metrc: mean", 6, "metrc: unknown key.*Did you mean 'metric'"),
        ("mean_per_class", "f1", 6, "metric: found 'f1', expected one of: top1"),
        ("images: 3", "images: many", 4, "images: found 'many', expected a whole number"),
        ("webdataset:", "wds:", 4, "wds: unknown key"),
        ("sources: [{folders", "source: [{folders", 7, "source: unknown key.*Did you mean 'sources'"),
        ("of: [unseen]", "of: [unsen]", 10, "'unsen' matches no set.*Did you mean 'unseen'"),
        ("harmonic: [S, U]", "harmonic: [S, V]", 11, "expected two of the averages above"),
        (
            "kind: class-split, of: [seen]",
            "kind: ood, of: [seen]",
            9,
            "kind: found 'ood', expected one of: id",
        ),
        ("kind: class-split, of: [seen]", "of: [seen]", 9, "'kind' is missing"),
        ("  unseen:\n", "  seen:\n", 5, "sets.seen: this key stands on line 3, too"),
        ('"{set}/{split}"', "../elsewhere", 7, "leaves the data root"),
        (
            "description: two sets",
            "description: two sets\nsts: 1",
            2,
            "sts: unknown key.*Did you mean 'sets'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(own, old, new, line, message):
    path = own(old, new)
    with pytest.raises(EvaluationError, match=message) as error:
        load_suite(path)
    assert str(error.value).startswith((f"{path}, line {line}: ", f"{path}, line {line}, "))


def test_a_file_that_is_no_yaml(own):
    path = own("sets:", "sets: [")
    with pytest.raises(EvaluationError, match="cannot be read as YAML"):
        load_suite(path)


def test_yaml_tags_run_no_code(own, tmp_path):
    path = own("description: two sets", f"description: !!python/object/apply:os.mkdir [{tmp_path}/made]")
    with pytest.raises(EvaluationError, match="cannot be read as YAML"):
        load_suite(path)
    assert not (tmp_path / "made").exists()


def test_an_unknown_suite_lists_the_known_ones(tmp_path):
    with pytest.raises(
        EvaluationError, match=r"Did you mean 'imagenet-shifts'.*domainnet, emojinet"
    ) as error:
        load_suite("imagenet-shift")
    assert "zero-shot-transfer" in str(error.value)
    with pytest.raises(EvaluationError, match="There is no suite file at"):
        load_suite(tmp_path / "none.yaml")
