"""What records of others cannot make a report or a grid do: open files of their choice, or end in a traceback."""

from __future__ import annotations

import io
import json
import os

import pytest
from PIL import Image
from support import data
from support import report as made

from arf_plugin.ablation.anchors import build
from arf_plugin.ablation.config import AnchorSet
from arf_plugin.ablation.plan import count_samples
from arf_plugin.errors import GridError, ReportError, TaskDataError
from arf_plugin.report.images import thumbnail
from arf_plugin.report.provenance import anchors_folder, class_names, manifest_rows, task_data
from arf_plugin.report.report import Options, gather
from arf_plugin.report.sources import collect, finite, is_below


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that a user was sent, and a project folder to look at it from; says where a place leads to."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    folder = tmp_path / "sent" / "arf-0"
    folder.mkdir(parents=True)

    def write(**info):
        record = {"arm": "arf", "seed": 0, "command": [], **info}
        (folder / "run.json").write_text(json.dumps(record))
        return collect([folder])

    return write


def test_no_text_outside_is_shown_on_the_word_of_a_record(run, tmp_path):
    outside = tmp_path / "private"
    outside.mkdir()
    (outside / "names.txt").write_text("secret\n")
    (tmp_path / "sent" / "link").symlink_to(outside)
    os.mkfifo(tmp_path / "sent" / "pipe")
    for place in (outside, "../private", tmp_path / "sent" / "link", tmp_path / "sent" / ".." / "private"):
        assert class_names(run(command=["--arf-classnames", f"{place}/names.txt"]), None) is None
    assert class_names(run(command=["--arf-classnames", str(tmp_path / "sent" / "pipe")]), None) is None


@pytest.mark.parametrize(
    "place",
    ["pipe:touch {}/ran", "https://127.0.0.1:1/{}", "memory://{}", "{}/pipe", "simplecache::file://{}", "\0"],
)
def test_nothing_is_fetched_or_run_on_the_word_of_a_record(run, tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    place = place.format(tmp_path)
    found = run(
        anchors=place, command=["--arf-anchors", place, "--train-data", place, "--arf-classnames", place]
    )
    assert (anchors_folder(found), task_data(found), class_names(found, None)) == (None, None, None)
    assert not (tmp_path / "ran").exists()
    assert task_data(run(command=["--train-data", "{0..999999999999}.tar"])) is None


@pytest.mark.parametrize("place", ["sent", "project"])
def test_what_lies_beside_the_run_or_here_is_shown(run, tmp_path, place):
    folder = tmp_path / place
    data.write_captions(folder / "anchors", {"a/1": "shown"})
    (folder / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\xe2\x80\xa8dog\r\n")
    (folder / "0.tar").write_bytes(b"")
    found = run(
        anchors=f"{folder}/anchors",
        command=["--train-data", f"{folder}/0.tar", "--arf-classnames", f"{folder}/names.txt"],
    )
    assert anchors_folder(found) == folder / "anchors" and task_data(found) == f"{folder}/0.tar"
    assert class_names(found, None)[:2] == ["cat", "dog\u2028dog"]


def test_suites_are_opened_by_their_user_alone(tmp_path):
    evil = tmp_path / "evil.yaml"
    os.mkfifo(evil)  # whoever opens it waits for ever
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(made.row("arf-0/w.pt", "id", 1) | {"suite": str(evil)}) + "\n")
    with pytest.raises(ReportError, match="which is no name"):
        gather([rows], Options())


def test_places():
    from pathlib import Path

    roots = [Path("/data/here")]
    assert is_below("/data/here/x/y", roots) and is_below("/data/here", roots)
    for name in (
        "/data/herex",
        "/data/here/../x",
        "/data/here/.git/config",
        "s3://data/here",
        "pipe:cat /data/here",
        "\0",
    ):
        assert not is_below(name, roots), name


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 10**400, [1]])
def test_what_is_no_number(value):
    assert finite(value) is None and finite(2) == 2.0


@pytest.mark.parametrize(
    "change",
    [
        *({"set": ["x"]}, {"checkpoint": 5}, {"checkpoint": "a\0b"}, {"digest": []}, {"original_digest": {}}),
        *(
            {"alpha": float("nan")},
            {"alpha": True},
            {"alpha": 10**400},
            {"images": "3"},
            {"headline": []},
            {"suite": 1},
        ),
    ],
)
def test_a_row_of_other_types_is_named(tmp_path, change):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(made.row("arf-0/w.pt", "id", 1) | change) + "\n")
    with pytest.raises(ReportError, match=r"results\.jsonl, row 1.*Measure it again"):
        collect([path])


def test_an_image_of_too_many_pixels_is_not_decoded():
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    assert len(file.getvalue()) < 100_000
    assert thumbnail(file.getvalue()).problem == "has 10000 x 10000 pixels, too many to be shown"
    assert thumbnail(b"").problem and thumbnail(b"no image").problem


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 10_000, b"[]", b"\xff", b'{"a": ' + b"9" * 5000 + b"}", None]
)
def test_records_of_a_grid_that_are_no_json(tmp_path, content):
    def place(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if content is None else path.write_bytes(content)
        return path

    marker = place("own/built.json")
    with pytest.raises(GridError, match=r"built\.json"):
        build(None, AnchorSet(name="own", path=marker.parent, build=(("caption",),)), print)
    place("sizes.json")
    if content is not None:  # a pipe is no file, so the tars are counted
        with pytest.raises(TaskDataError, match=r"sizes\.json"):
            count_samples(str(tmp_path / "0.tar"))


def test_sizes_that_are_no_numbers(tmp_path):
    for size, count in ((64, 64), ("64", 64), (-1, None), (True, None), (1.5, None), ("many", None)):
        (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": size}))
        if count is not None:
            assert count_samples(str(tmp_path / "0.tar")) == count
            continue
        with pytest.raises(TaskDataError, match=r"sizes\.json: '0\.tar' is .*expected a number"):
            count_samples(str(tmp_path / "0.tar"))


def test_the_manifest_of_a_set_with_features_says_whose_they_are(tmp_path):
    entry = {"model": "ViT-B-16", "weights_sha256": "0" * 64, "dim": 512, "pairs": 1200, "captions": None}
    (tmp_path / "anchors.json").write_text(json.dumps({"format_version": 1, "features": entry}))
    sentences, rows = manifest_rows(tmp_path)
    assert sentences == [
        "Features of an unknown number of captions and 1,200 pairs, by ViT-B-16 before fine-tuning."
    ]
    assert ("model", "ViT-B-16") in rows["features"] and "features" not in dict(rows["set"])
