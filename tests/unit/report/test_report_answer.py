"""Did it forget? What the report says first, of grids, fits and single runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import report as made

from arf_plugin.report.output import as_json
from arf_plugin.report.report import Options, gather


def answer(*sources: Path, **options) -> dict:
    return as_json(gather(sources, Options(**options)))["answer"]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_that_forgot_gets_its_alpha_and_a_command(tmp_path):
    grid = made.Made(tmp_path)
    grid.measure("before", 0, id=50, shift_a=40, shift_b=20, unseen=80)
    for seed in range(3):
        grid.measure("arf", seed, id=70 + seed, shift_a=40, shift_b=20, unseen=40 + seed)
        grid.measure("arf", seed, 0.25, id=60 + seed, shift_a=45, shift_b=25, unseen=80)
        grid.measure("arf", seed, 0.75, id=75 + seed, shift_a=40, shift_b=20, unseen=60 + seed)
    found = answer(grid.write())
    assert found["word"] == "yes" and "fell by 19.5 points" in found["headline"]  # shift 0, zero-shot -39
    assert "on your own classes it went from 50.0 to 71.0 %" in found["sentence"]
    assert "At α = 0.25" in found["advice"]
    assert found["command"] == (
        "arf interpolate runs/before-0/weights.pt runs/arf-0/weights.pt --alpha 0.25 --out wise.pt"
    )


def test_without_mixtures_the_command_measures_them(tmp_path):
    rows = [
        made.row(f"logs/{arm}-0/w.pt", name, score, suite=None)
        for arm, own, pets in (("before", 50, 90), ("arf", 80, 30))
        for name, score in (("val", own), ("pets", pets))
    ]
    found = answer(write(tmp_path / "rows.jsonl", rows))
    assert found["word"] == "yes" and "fell by 60.0 points" in found["headline"]
    assert "--alphas 0 0.25 0.5 0.75 1 --model tiny" in found["command"]


def test_a_loss_on_one_ability_is_not_hidden_by_a_gain_on_another(tmp_path):
    rows = []
    for arm, right in (("before", (200, 100, 200)), ("arf", (300, 300, 100))):
        for name, count in zip(("test", "a", "b"), right, strict=True):
            bits = made.bits([n < count for n in range(400)], name)
            rows.append(made.row(f"logs/{arm}-0/w.pt", name, 0.0, suite=None, **bits))
    found = answer(write(tmp_path / "rows.jsonl", rows))
    assert found["word"] == "yes" and "in part: b fell by 25.0 points" in found["headline"]


def test_a_loss_that_other_images_may_not_show_is_told_as_such(tmp_path):
    """One seed, not paired by image: large, but of these images alone."""
    rows = [
        made.row(f"logs/{arm}-0/w.pt", name, score, suite=None)
        for arm, gained, lost in (("before", 20, 80), ("arf", 90, 40))
        for name, score in (("a", gained), ("b", lost))
    ]
    found = answer(write(tmp_path / "rows.jsonl", rows))
    assert found["word"] == "yes" and "seems" in found["headline"] and "b fell by 40.0" in found["headline"]


@pytest.mark.parametrize("anchored", [True, False])
def test_advice_knows_whether_there_were_anchors(tmp_path, anchored):
    run = tmp_path / "logs" / "arf-0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch_2.pt").touch()
    (run / "out.log").write_text(made.step(0, 64, contrastive_loss=1.0))
    (run / "params.txt").write_text(f"model: tiny\narf_anchors: {'anchors' if anchored else None}\n")
    rows = [made.row("logs/before-0/w.pt", "pets", 90, suite=None)]
    rows += [
        made.row(str(run / "checkpoints" / "epoch_2.pt"), "pets", 40 - 10 * (alpha or 0), alpha, suite=None)
        for alpha in (None, 0.5)
    ]
    advice = answer(run, write(tmp_path / "rows.jsonl", rows))["advice"]
    assert ("with --arf-anchors" in advice) == (not anchored) and "Train again" in advice


@pytest.mark.parametrize("after, word", [(90.0, "no"), (80.0, "no"), (79.0, "perhaps")])
def test_what_is_within_chance_is_no_forgetting(tmp_path, after, word):
    scores = {"before": 80.0, "arf": after}
    rows = [made.row(f"logs/{arm}-0/w.pt", "pets", top1, suite=None) for arm, top1 in scores.items()]
    found = answer(write(tmp_path / "rows.jsonl", rows))
    assert found["word"] == word and "have not been measured" in found["sentence"]


def test_a_sweep_tells_its_ends(tmp_path):
    """`arf interpolate --alphas` measures the model before as alpha 0, and the fine-tuned one as alpha 1."""
    rows = [
        made.row("logs/arf-0/w.pt", name, 50 + sign * 40 * alpha, alpha, suite=None)
        for name, sign in (("val", 1), ("pets", -1))
        for alpha in (0.0, 0.5, 1.0)
    ]
    report = gather([write(tmp_path / "rows.jsonl", rows)], Options())
    assert list(report.found.arms) == ["before", "arf"] and report.results.alphas() == [0.5]
    assert report.answer.word == "yes" and report.answer.rows[1].less["kept"].mean == -40


def test_before_has_not_been_measured(tmp_path):
    """A run's own files say how to measure it."""
    run = tmp_path / "logs" / "arf-0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch_2.pt").touch()
    (run / "out.log").write_text(made.step(0, 64, contrastive_loss=1.0))
    (run / "params.txt").write_text("model: ViT-B-16\npretrained: openai\nresume: None\n")
    found = answer(run)
    assert found["word"] == "unknown"
    assert found["command"].startswith(
        f"arf interpolate ViT-B-16@openai {run}/checkpoints/epoch_2.pt --alphas"
    )


def test_what_training_has_watched_answers(tmp_path):
    run = tmp_path / "logs" / "arf-0"
    run.mkdir(parents=True)
    (run / "out.log").write_text(made.step(0, 64, contrastive_loss=1.0))
    rows = []
    for epoch, right in ((0, 300), (1, 250), (1, 240), (2, 100)):  # the first epoch once more after a resume
        bits = made.bits([n < right for n in range(400)], "pets")
        rows.append(made.row(f"epoch_{epoch}", "pets", 0.0, suite=None, epoch=epoch, digest=None, **bits))
    write(run / "arf_watch.jsonl", rows)
    report = gather([run], Options())
    assert report.answer.word == "yes" and report.answer.rows[1].less["kept"].mean == -50
    assert [panel.title for panel in report.groups["training"].panels][-1] == "Accuracy on pets, %"
    # What has been measured since counts more.
    bits = made.bits([n < 300 for n in range(400)], "pets")
    later = made.row("logs/arf-0/checkpoints/epoch_2.pt", "pets", 0.0, suite=None, **bits)
    assert answer(run, write(tmp_path / "rows.jsonl", [later]))["word"] == "no"


def test_places_are_found_from_elsewhere(tmp_path, monkeypatch):
    """Training noted its places as seen from where it was started."""
    from support import data

    run = tmp_path / "project" / "logs" / "arf-0"
    run.mkdir(parents=True)
    (run / "out.log").write_text(made.step(0, 64, contrastive_loss=1.0))
    data.write_captions(tmp_path / "project" / "anchors", {"0/1": "a caption"})
    (run / "params.txt").write_text("arf_anchors: anchors\nmodel: tiny\n")
    monkeypatch.chdir(run)
    report = gather([Path()], Options())
    assert report.anchors == tmp_path / "project" / "anchors" and report.gallery.cards
