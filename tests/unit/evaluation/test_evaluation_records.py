"""Records: what is written is read, unfinished lines are cut off, mistakes are named."""

from __future__ import annotations

import base64
import json
import math
import os

import numpy as np
import pytest

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.records import (
    Results,
    append_record,
    by_set,
    packed,
    read_records,
    right_images,
)
from arf_plugin.evaluation.tables import table


def record(name: str = "id", **fields) -> dict:
    return {
        "format": 1, "suite": None, "set": name, "checkpoint": "a.pt", "digest": "d", "original": None, "alpha": None,
        "metrics": {"top1": 40.0, "ece": 3.0}, "headline": "top1", **fields,
    }  # fmt: skip


def test_records_that_were_appended_are_read(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    records = [record("id"), record("shift/a", checkpoint="ä.pt"), record("id", alpha=0.5)]
    for each in records:
        append_record(path, each)
    assert read_records(path) == records


def test_an_unfinished_last_line_is_passed_over_and_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, record("id"))
    with path.open("a") as file:
        file.write(json.dumps(record("cut"))[:40])
    with pytest.warns(UserWarning, match="unfinished"):
        assert [each["set"] for each in read_records(path)] == ["id"]
    append_record(path, record("next"))
    assert [each["set"] for each in read_records(path)] == ["id", "next"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2: format is"),
        ('{"format": 2}', "line 2: format is 2, expected a record of format 1"),
        ('{"format": 1, "set": "id"}', "line 2: checkpoint, metrics, headline missing"),
    ],
)
def test_a_line_that_is_no_row(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    append_record(path, record())
    with path.open("a") as file:
        file.write(f"{line}\n")
    append_record(path, record())
    with pytest.raises(EvaluationError, match=message):
        read_records(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")
    assert Results.read(tmp_path / "none.jsonl") == []


def test_scores_by_set():
    records = [
        record("id"),
        record("shift", metrics={"top1": 1.0, "mean_per_class": 2.0}, headline="mean_per_class"),
    ]
    assert by_set(records) == {"id": 40.0, "shift": 2.0}
    assert by_set(records, "top1") == {"id": 40.0, "shift": 1.0}
    with pytest.raises(EvaluationError, match="no metric 'ece'"):
        by_set(records, "ece")
    with pytest.raises(EvaluationError, match="several checkpoints"):
        by_set([record("id"), record("id", alpha=0.5)])


def test_a_copy_of_a_checkpoint_is_listed_under_its_own_name(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, record())
    results = Results(path, read_records(path))
    copy = record(checkpoint="copy.pt", metrics=None)
    assert results.has(copy)
    assert results.take(copy)["metrics"]["top1"] == 40.0
    results.take(copy)
    assert [each["checkpoint"] for each in read_records(path)] == ["a.pt", "copy.pt"]
    assert not results.has(record(digest="other"))
    assert not results.has(record(alpha=0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"set": 3}, "'set' is 3, expected a text"),
        ({"digest": ["d"]}, r"'digest' is \['d'\], expected a text or null"),
        ({"alpha": "half"}, "'alpha' is 'half', expected a whole number or a number or null"),
        ({"alpha": float("inf")}, "'alpha' is inf, expected a finite number"),
        ({"images": True}, "'images' is True"),
        ({"metrics": {}}, "'headline' is 'top1', expected one of the metrics"),
        ({"metrics": {"top1": "high"}}, "metrics: 'top1' is 'high', expected a whole number or a number"),
        ({"metrics": {"top1": float("nan")}}, "'top1' is nan, expected a finite number"),
        ({"metrics": {"top1": 10**400}}, "'top1' is 1000000000000000000000000000000000000000, expected"),
        ({"set": "\ud800"}, "is no JSON that can be read"),
    ],
)
def test_a_record_with_other_fields_than_records_have(tmp_path, fields, message):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record(**fields)) + "\n")
    with pytest.raises(EvaluationError, match=f"line 1.*{message}"):
        read_records(path)


@pytest.mark.parametrize("line", [b"[" * 100_000, b"9" * 5000, b"\xff\xfe{}", b"\0\0\0"])
def test_a_line_that_nobody_could_read(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_bytes(json.dumps(record()).encode() + b"\n" + line + b"\n")
    with pytest.raises(EvaluationError, match="line 2") as error:
        read_records(path)
    assert len(str(error.value)) < 500
    path.write_bytes(json.dumps(record()).encode() + b"\n" + line)
    if line != b"9" * 5000:
        with pytest.warns(UserWarning, match="the last line is unfinished"):
            assert len(read_records(path)) == 1


def test_a_calibration_error_of_weights_that_are_no_numbers(tmp_path):
    append_record(tmp_path / "results.jsonl", record(metrics={"top1": 3.0, "ece": float("nan")}))
    assert read_records(tmp_path / "results.jsonl")[0]["metrics"]["top1"] == 3.0


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record("edited")))
    append_record(path, record("next"))
    assert [each["set"] for each in read_records(path)] == ["edited", "next"]


def test_no_file_of_records(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(EvaluationError, match="expected a file"):
            read_records(path)
        with pytest.raises(EvaluationError, match="expected a file"):
            append_record(path, record())
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match=r"The record cannot be written to .*: File exists"):
        append_record(tmp_path / "file" / "results.jsonl", record())


def test_names_that_are_bytes(tmp_path):
    path, name = tmp_path / "results.jsonl", os.fsdecode(b"run\xe9.pt")
    append_record(path, record(checkpoint=name))
    results = Results(path, read_records(path))
    results.take(record(checkpoint=name))
    assert [each["checkpoint"] for each in read_records(path)] == ["run\\xe9.pt"]


def test_records_of_other_data_are_said_once(tmp_path):
    """Such as those of versions that told images apart by name and size."""
    results = Results(tmp_path / "results.jsonl", [record(data="by names"), record("shift", data="by names")])
    with pytest.warns(
        UserWarning, match=r"results\.jsonl: what is there of 'id' was measured on other images"
    ) as said:
        assert not results.has(record(data="by content"))
        assert not results.has(record("shift", data="by content"))
        assert not results.has(record("new", data="by content"))
    assert len(said) == 1


def test_tables_print_nothing_that_moves_the_cursor():
    shown = table([record("set\x1b[2J", checkpoint="a\x07.pt", images=1)], None)
    assert "\\x1b[2J" in shown and "\x1b" not in shown and "\x07" not in shown


def of_bits(right, /, **fields) -> dict:
    share = 100 * float(np.mean(right))
    return record(
        **{"images": len(right), "data": "d", "metrics": {"top1": share}, "right": packed(right), **fields}
    )


@pytest.mark.parametrize("images", [1, 7, 8, 9, 50_000])
def test_which_images_were_right(tmp_path, images):
    right = np.random.default_rng(images).random(images) < 0.4
    append_record(tmp_path / "results.jsonl", of_bits(right))
    [found] = read_records(tmp_path / "results.jsonl")
    assert np.array_equal(right_images(found), right)
    assert len(found["right"]) == 4 * math.ceil(math.ceil(images / 8) / 3)  # 8.3 kB for 50,000 images


def test_the_first_image_is_the_highest_bit():
    assert (
        base64.b64decode(packed(np.array([True, False, False, False, False, False, False, True, True])))
        == b"\x81\x80"
    )


def test_records_of_earlier_versions_have_no_bits(tmp_path):
    for each in (record(), record("null", right=None)):
        append_record(tmp_path / "results.jsonl", each)
    assert [each.get("right") for each in read_records(tmp_path / "results.jsonl")] == [None, None]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"right": 5}, "'right' is 5, expected a text or null"),
        ({"right": "no base64!"}, "'right' is 'no base64!', expected base64"),
        ({"right": "ä"}, "'right' is 'ä', expected base64"),
        ({"right": "\x1b[2J"}, r"'right' is '.*x1b\[2J', expected base64"),
        ({"right": "//8="}, "'right' has 2 bytes, expected 1 for 4 images"),
        ({"images": 10**12}, "'right' has 1 bytes, expected 125000000000 for"),
        ({"images": -8}, "'images', 'data' and the metric 'top1' are expected, too"),
        ({"right": "8A=="}, "'right' has 4 right images of 4, but top1 is 50.0000, expected 100.0000"),
        ({"right": "wQ=="}, "are of different records"),  # bits behind the last image
        (
            {"metrics": {"top1": 75.0}},
            "'right' has 2 right images of 4, but top1 is 75.0000, expected 50.0000",
        ),
        ({"data": None}, "'images', 'data' and the metric 'top1' are expected, too"),
        ({"images": None}, "'images' is None, expected"),
        (
            {"metrics": {"mean_per_class": 50.0}, "headline": "mean_per_class"},
            "the metric 'top1' are expected",
        ),
    ],
)
def test_bits_that_are_not_of_their_record(tmp_path, fields, message):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(of_bits(np.array([True, True, False, False]), **fields)) + "\n")
    with pytest.raises(EvaluationError, match=f"line 1.*{message}") as error:
        read_records(path)
    assert len(str(error.value)) < 400
