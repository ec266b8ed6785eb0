"""Rows: what is written is read, unfinished lines are cut off, mistakes are named."""

from __future__ import annotations

import json

import pytest

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.rows import Results, append_row, by_set, read_rows, select


def row(name: str = "id", **fields) -> dict:
    return {
        "format": 1, "suite": None, "set": name, "checkpoint": "a.pt", "digest": "d", "original": None, "alpha": None,
        "metrics": {"top1": 40.0, "ece": 3.0}, "headline": "top1", **fields,
    }  # fmt: skip


def test_rows_that_were_appended_are_read(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    rows = [row("id"), row("shift/a", checkpoint="ä.pt"), row("id", alpha=0.5)]
    for each in rows:
        append_row(path, each)
    assert read_rows(path) == rows
    assert select(rows, set="id", alpha=None) == rows[:1]


def test_an_unfinished_last_line_is_passed_over_and_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    append_row(path, row("id"))
    with path.open("a") as file:
        file.write(json.dumps(row("torn"))[:40])
    with pytest.warns(UserWarning, match="unfinished"):
        assert [each["set"] for each in read_rows(path)] == ["id"]
    append_row(path, row("next"))
    assert [each["set"] for each in read_rows(path)] == ["id", "next"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2: format is"),
        ('{"format": 2}', "line 2: format is 2, expected a row of format 1"),
        ('{"format": 1, "set": "id"}', "line 2: checkpoint, metrics, headline missing"),
    ],
)
def test_a_line_that_is_no_row(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    append_row(path, row())
    with path.open("a") as file:
        file.write(f"{line}\n")
    append_row(path, row())
    with pytest.raises(EvaluationError, match=message):
        read_rows(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")
    assert Results.read(tmp_path / "none.jsonl") == []


def test_figures_by_set():
    rows = [row("id"), row("shift", metrics={"top1": 1.0, "mean_per_class": 2.0}, headline="mean_per_class")]
    assert by_set(rows) == {"id": 40.0, "shift": 2.0}
    assert by_set(rows, "top1") == {"id": 40.0, "shift": 1.0}
    with pytest.raises(EvaluationError, match="no metric 'ece'"):
        by_set(rows, "ece")
    with pytest.raises(EvaluationError, match="several checkpoints"):
        by_set([row("id"), row("id", alpha=0.5)])


def test_a_copy_of_a_checkpoint_is_listed_under_its_own_name(tmp_path):
    path = tmp_path / "results.jsonl"
    append_row(path, row())
    results = Results(path, read_rows(path))
    copy = row(checkpoint="copy.pt", metrics=None)
    assert results.has(copy)
    assert results.take(copy)["metrics"]["top1"] == 40.0
    results.take(copy)
    assert [each["checkpoint"] for each in read_rows(path)] == ["a.pt", "copy.pt"]
    assert not results.has(row(digest="other"))
    assert not results.has(row(alpha=0.5))
