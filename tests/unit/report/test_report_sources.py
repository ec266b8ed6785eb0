"""What arf report takes, and what it says of things that it cannot take."""

from __future__ import annotations

import json

import pytest
from support import report as made

from arf_plugin.errors import ReportError
from arf_plugin.report.report import Options, gather
from arf_plugin.report.sources import arm_and_seed, collect


def test_names_of_runs():
    assert arm_and_seed("caption-only-2") == ("caption-only", 2)
    assert arm_and_seed("arf_seed1") == ("arf", 1)
    assert arm_and_seed("flyp-2x") == ("flyp-2x", None)
    assert arm_and_seed("clip") == ("clip", None)


def test_a_grid(tmp_path):
    grid = made.Made(tmp_path).usual()
    grid.add_run("arf", 0, made.step(0, 64, contrastive_loss=2.0))
    grid.add_run("before", 0)
    found = collect([grid.write()])
    assert list(found.arms) == ["before", "flyp", "arf"]
    assert (found.before, found.reference, found.subject) == ("before", "before", "arf")
    assert found.baseline == "flyp"
    assert {(run.arm, run.seed, len(run.logs)) for run in found.runs} == {("arf", 0, 1), ("before", None, 0)}
    assert {(m.arm, m.seed) for m in found.test} == {("before", None)} | {
        (a, s) for a in ("flyp", "arf") for s in range(3)
    }


def test_rows_by_themselves_are_named_by_their_folders(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        made.row("/elsewhere/clip/model.pt", "id", 40, digest="start"),
        made.row("logs/flyp-0/checkpoints/epoch_10.pt", "id", 50),
        made.row("logs/arf-3/checkpoints/epoch_10.pt", "id", 60),
        made.row("logs/arf-3/checkpoints/epoch_10.pt", "id", 55, alpha=0.5, original_digest="start"),
        made.row("mine.pt", "id", 60),
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = collect([path])
    assert [(m.arm, m.seed, m.alpha) for m in found.test] == [
        ("before", None, None), ("flyp", 0, None), ("arf", 3, None), ("arf", 3, 0.5), ("mine", None, None),
    ]  # fmt: skip
    assert (found.reference, found.baseline) == ("before", "flyp") and next(iter(found.arms)) == "before"


def test_run_folders_beside_rows(tmp_path):
    """A run's folder says whose a row is, by its run.json and not by its name."""
    run = tmp_path / "logs" / "experiment"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"arm": "arf", "seed": 7, "command": []}))
    rows = tmp_path / "results.jsonl"
    rows.write_text(json.dumps(made.row("logs/experiment/weights.pt", "id", 60)) + "\n")
    [measured] = collect([run, rows]).test
    assert (measured.arm, measured.seed) == ("arf", 7)


def test_rejected_candidates_are_arms_of_no_table(tmp_path):
    grid = made.Made(tmp_path).usual()
    grid.rows.append(made.row("candidates/arf.1-0/weights.pt", "id", 50, split="validation"))
    assert list(collect([grid.write()]).arms) == ["before", "flyp", "arf"]


def test_there_is_no_such_folder(tmp_path):
    with pytest.raises(ReportError, match=r"nowhere does not exist\. Expected a grid folder"):
        collect([tmp_path / "nowhere"])


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(
        ReportError, match=r"is no run: found holiday\.jpg\. Expected a grid folder of `arf ablate`"
    ):
        collect([tmp_path])


def test_an_empty_file_of_rows(tmp_path):
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(ReportError, match="no rows and no runs"):
        collect([tmp_path / "results.jsonl"])


def test_a_grid_that_has_not_run(tmp_path):
    made.Made(tmp_path)
    with pytest.raises(ReportError, match="a grid without runs and without rows yet"):
        collect([tmp_path])


def test_a_damaged_line_is_named(tmp_path):
    grid = made.Made(tmp_path).usual()
    path = grid.write() / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n")
    with pytest.raises(ReportError, match=r"results\.jsonl, line 2 is no JSON"):
        collect([tmp_path])


@pytest.mark.parametrize("metrics", [{}, {"top1": "high"}, [1], {"top1": None}])
def test_a_row_without_its_figure(tmp_path, metrics):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(made.row("a-0/w.pt", "id", 1) | {"metrics": metrics}) + "\n")
    with pytest.raises(
        ReportError, match=r"results\.jsonl, row 1(: metrics has no number 'top1'|, metrics: )"
    ):
        collect([path])


def test_a_figure_that_is_not_a_number(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(made.row("a-0/w.pt", "id", float("nan"))) + "\n")
    with pytest.raises(ReportError, match=r"row 1: metrics has no number 'top1'"):
        collect([path])


def test_two_checkpoints_of_one_seed(tmp_path):
    path = tmp_path / "results.jsonl"
    rows = [made.row(f"logs/arf-0/checkpoints/epoch_{epoch}.pt", "id", 50) for epoch in (5, 10)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(ReportError, match=r"two checkpoints .* 'id': .*epoch_5\.pt and .*epoch_10\.pt"):
        collect([path])


@pytest.mark.parametrize("content", ["{", "[1]", '{"arms": [3]}'])
def test_a_damaged_grid(tmp_path, content):
    (tmp_path / "grid.json").write_text(content)
    with pytest.raises(ReportError, match=r"grid\.json"):
        collect([tmp_path])


def test_a_reference_that_is_not_there(tmp_path):
    with pytest.raises(ReportError, match=r"no arm 'flip' to compare with \(found: before, flyp, arf\)"):
        collect([made.Made(tmp_path).usual().write()], "flip")


def test_a_suite_that_nobody_knows(tmp_path):
    grid = made.Made(tmp_path, suite=None)
    grid.measure("flyp", 0, id=5)
    with pytest.raises(ReportError, match=r"'made-up', whose averages are needed(.|\n)*--suite FILE\.yaml"):
        gather([grid.write()], Options())


def test_an_anchor_set_that_is_gone(tmp_path):
    folder = made.Made(tmp_path / "grid").usual().write()
    with pytest.raises(
        ReportError, match=r"gone does not exist\. Expected an anchor set; name its folder with --anchors"
    ):
        gather([folder], Options(anchors=tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="empty is no anchor set"):
        gather([folder], Options(anchors=tmp_path / "empty"))


def test_what_is_missing_is_said_in_a_line_each(tmp_path):
    path = tmp_path / "results.jsonl"
    row = made.row("logs/flyp-0/w.pt", "id", 50, suite=None)
    del row["metrics"]["ece"]
    path.write_text(json.dumps(row) + "\n")
    report = gather([path], Options())
    assert set(report.missing) == {"curves", "calibration", "training", "anchors"}
    assert "arf interpolate" in report.missing["curves"] and "--anchors" in report.missing["anchors"]
    run = tmp_path / "arf-0"
    run.mkdir()
    (run / "out.log").write_text(made.step(0, 64, contrastive_loss=1.0))
    without_rows = gather([run], Options())
    assert "arf evaluate" in without_rows.missing["results"] and "training" in without_rows.groups
