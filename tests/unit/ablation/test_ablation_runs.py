"""Launching, following, choosing and summing up, each by itself; `arf ablate` as a whole is in tests/integration."""

from __future__ import annotations

import fcntl
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from arf_plugin.ablation import table
from arf_plugin.ablation.choose import Choices
from arf_plugin.ablation.launch import (
    RunProgress,
    Step,
    last_lines,
    parse_step,
    remove_truncated_checkpoints,
    run_logged,
)
from arf_plugin.ablation.plan import Run, final_runs
from arf_plugin.ablation.reader import load_grid
from arf_plugin.ablation.runs import places
from arf_plugin.errors import GridError
from arf_plugin.evaluation.records import append_record, packed, read_records
from arf_plugin.evaluation.verdicts import as_cell

GRID = """\
name: small
model: ViT-B-32
task: {data: 'task/{000..003}.tar', samples: 64}
trainer: {epochs: 2, batch-size: 8, workers: 1}
seeds: [0, 1]
evaluation: {suite: emojinet, test: sets, validation: sets}
wise: {alphas: [0.25, 0.75], by: ID}
reference: flyp
arms:
  - {name: before, kind: before}
  - {name: flyp, label: FLYP, kind: baseline}
  - {name: tuned, kind: baseline, choose: {over: [{lr: 1}, {lr: 2}, {lr: 3}], by: shift}}
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return load_grid(str(path), tmp_path)


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (
            b"2026-01-01 | INFO | Train Epoch: 14 [ 64/448 (14%)] Data (t): 0.127 Batch (t): 0.808, 79.2499/s, "
            b"79.2499/s/gpu LR: 0.000007 Logit Scale: 15.878 Contrastive_loss: 1.9188 (1.9188) Loss: 1.9188 (1.9188)\n",
            Step(14, 64, 448, 1.9188),
        ),
        (
            b"x | Train Epoch: 0 [128/896 (14%)] Data (t): 0.6 Batch (t): 2.6, 24.4/s, 24.4/s/gpu LR: 0.00005 Scale: "
            b"15.933 Contrastive_loss: 3.5 (3.5) Pair_anchor_loss: 2.7 (2.7) Loss: 10.032 (10.032)",
            Step(0, 128, 896, 10.032),
        ),
        (b"2026-01-01,11:52:49 | INFO | Start epoch 14\n", None),
        (b"\xff\xfe no text at all", None),
    ],
)
def test_progress_is_read_from_the_trainers_log(line, step):
    assert parse_step(line) == step


def test_a_loss_that_is_no_number_is_shown_as_such():
    step = parse_step(b"Train Epoch: 1 [8/8 (100%)] LR: 0.1 Contrastive_loss: nan (nan) Loss: nan (nan)")
    assert step is not None and math.isnan(step.loss)


def test_progress_ends_at_all_images_as_the_trainer_counts_them():
    """Of steps without anchors it counts more than pass the model."""
    progress = RunProgress("every2-0", 3)
    progress.advance(Step(1, 400, 560, 2.5))
    assert progress.text().startswith("every2-0: 960 of 1680 images, ")
    progress.advance(Step(2, 560, 560, 2.0))
    assert progress.text().startswith("every2-0: 1680 of 1680 images, ")


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_output_goes_to_the_log_and_line_by_line_to_the_caller(tmp_path):
    log, lines = tmp_path / "run" / "console.log", []
    code = "import os; print('first'); print(os.environ['PLACE']); raise SystemExit(3)"
    assert run_logged(python(code), log, lines.append, {"PLACE": "here"}) == 3
    assert lines == [b"first\n", b"here\n"] and last_lines(log) == "first\nhere"
    assert run_logged(python("print('again')"), log) == 0
    assert (log.read_bytes(), log.with_name("console.log.1").read_bytes()) == (b"again\n", b"first\nhere\n")
    assert run_logged(python("print('once more')"), log, left=lambda: False) == 0
    assert log.read_bytes() == b"again\n"


def test_the_last_lines_are_the_trainers_own(tmp_path):
    log = tmp_path / "console.log"
    log.write_text(
        "2026 | INFO | looking\narf-plugin: error: no captions\n"
        "I1122 12:41:16.2 3749 .venv/torch/_dynamo/utils.py:925] TorchDynamo compilation metrics:\n"
        "E1122 12:41:19.4 3738 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)\n"
        "Traceback (most recent call last):\n  File torchrun\n"
    )
    assert last_lines(log, 1) == "arf-plugin: error: no captions"


@pytest.mark.process
def test_a_process_that_was_left_behind_is_followed_to_its_end(tmp_path):
    log, lines = tmp_path / "console.log", []
    with (tmp_path / ".lock").open("a") as lock, log.open("wb") as stream:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = "import time; print('one'); time.sleep(1.5); print('two')"
        left_behind = subprocess.Popen(python(code), stdout=stream, pass_fds=(lock.fileno(),))
    ended = []

    def left() -> bool:
        ended.append(left_behind.poll() is not None or lines[-1:] == [b"two\n"])
        return True

    assert run_logged(python("print('three')"), log, lines.append, left=left) == 0
    assert lines == [b"one\n", b"two\n", b"three\n"] and ended == [True]
    left_behind.wait(10)


def test_a_checkpoint_that_was_being_written_is_removed(tmp_path):
    for epoch in (1, 2):
        with zipfile.ZipFile(tmp_path / f"epoch_{epoch}.pt", "w") as whole:
            whole.writestr("archive/data.pkl", b"x" * 1000)
    content = (tmp_path / "epoch_2.pt").read_bytes()
    (tmp_path / "epoch_3.pt").write_bytes(content[: len(content) // 2])
    assert remove_truncated_checkpoints(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1.pt", "epoch_2.pt"]
    assert remove_truncated_checkpoints(tmp_path / "nothing") is None


def test_cores_are_divided_among_runs(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert len(places(None, 1, True)) == 8
    assert [e["OMP_NUM_THREADS"] for e in places(2, 2, True)] == ["2", "2"]


def test_gpus_are_divided_among_runs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    devices = [e["CUDA_VISIBLE_DEVICES"] for e in places(None, 2, False)]
    assert devices == ["4,5", "6,7"]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in places(1, 3, False)] == ["4,5,6"]
    with pytest.raises(
        GridError, match=r"3 runs side by side with 2 processes each need 6 GPUs; there are 4"
    ):
        places(3, 2, False)


def test_the_best_candidate_on_validation_is_chosen_and_written_down(grid, tmp_path):
    arm = grid.arm("tuned")
    values = [{"ID": 50.0, "shift": 30.0}, {"ID": 40.0, "shift": 31.0}, {"ID": 60.0, "shift": 31.0}]
    assert Choices(tmp_path).decide(arm, 0, values) == 1  # the first of two equal ones
    entry = json.loads((tmp_path / "choices.json").read_text())["arms"]["tuned"]
    assert (entry["chosen"], entry["by"], entry["seed"]) == (1, "shift", 0)
    assert [c["validation"]["shift"] for c in entry["candidates"]] == [30.0, 31.0, 31.0]
    again = Choices(tmp_path)
    assert again.chosen(arm) == 1 and arm.with_candidate(1).flags["lr"] == ("2",)
    again.forget(arm)
    assert Choices(tmp_path).chosen(arm) is None


def test_a_choice_may_be_by_the_mean_of_several_averages(grid, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text(GRID.replace("by: shift", "by: ID + shift"))
    arm = load_grid(str(path), tmp_path).arm("tuned")
    values = [{"ID": 50.0, "shift": 30.0}, {"ID": 40.0, "shift": 31.0}, {"ID": 60.0, "shift": 25.0}]
    assert Choices(tmp_path).decide(arm, 0, values) == 2
    with pytest.raises(GridError, match=r"'ID \+ shift', which is no average .* Expected one of: ID"):
        Choices(tmp_path).decide(arm, 0, [{"ID": 1.0}] * 3)


def test_a_choice_among_other_candidates_is_not_taken_over(grid, tmp_path):
    Choices(tmp_path).decide(grid.arm("tuned"), 0, [{"shift": 1.0}] * 3)
    path = tmp_path / "other.yaml"
    path.write_text(GRID.replace("{lr: 3}", "{lr: 4}"))
    other = load_grid(str(path), tmp_path)
    with pytest.raises(GridError, match="Choose again with: --restart tuned"):
        Choices(tmp_path).chosen(other.arm("tuned"))


def test_a_choice_by_an_unknown_average_names_those_there_are(grid, tmp_path):
    with pytest.raises(GridError, match=r"'shift', which is no average .* Expected one of: ID, mono"):
        Choices(tmp_path).decide(grid.arm("tuned"), 0, [{"ID": 1.0, "mono": 2.0}] * 3)


def test_results_are_means_with_sample_deviation_and_differences_paired_by_seed(grid, tmp_path):
    measured = [
        ("before", 0, None, {"ID": 30.0}),
        ("flyp", 0, None, {"ID": 40.0}),
        ("flyp", 0, 0.25, {"ID": 44.0}),
        ("flyp", 1, None, {"ID": 42.0}),
        ("flyp", 1, 0.25, {"ID": 45.0}),
        ("tuned", 0, None, {"ID": 43.0}),
        ("tuned", 1, None, {"ID": 41.0}),
    ]
    runs = list(final_runs(grid, tmp_path, ["flyp", "tuned"], [0, 1], 1))
    test = table.scores_table(measured, ["ID", "shift"])
    result = table.summarize(grid, [*runs, Run(grid, tmp_path, grid.before, 0)], test, {"flyp": 0.25})
    rows = {(row["arm"], row["alpha"]): row for row in result["rows"]}
    assert rows["flyp", None]["mean"] == {"ID": 41.0}
    assert rows["flyp", None]["std"]["ID"] == pytest.approx(math.sqrt(2), abs=1e-3)
    assert rows["flyp", 0.25]["mean"] == {"ID": 44.5}
    assert rows["before", None]["std"] is None
    assert result["against_reference"]["tuned"]["ID"] == {"mean": 1.0, "per_seed": [3.0, -1.0]}
    assert (
        "before" not in result["against_reference"]
        or result["against_reference"]["before"]["ID"]["mean"] == -10.0
    )
    text = table.as_text(result)
    assert "FLYP + WiSE-FT 0.25" in text and "41.0 ± 1.4" in text
    table.write(tmp_path, result)
    written = (tmp_path / "table.md").read_text().splitlines()
    assert written[0] == "| % | ID | images forwarded |" and written[3] == "| FLYP | 41.0 ± 1.4 | 128 (1x) |"


def test_arms_are_compared_by_image_with_the_reference(grid, tmp_path):
    """As fine-tuned and at the chosen alpha; the model before, which has no seed, with every seed."""
    generator = np.random.default_rng(0)
    hard = {name: generator.normal(size=200) for name in ("id", "zero_shot")}
    runs = [Run(grid, tmp_path, grid.before, 0), *final_runs(grid, tmp_path, ["flyp", "tuned"], [0, 1], 1)]
    measured = []
    for run in runs:
        for alpha in (None, 0.25) if run.arm.is_trained else (None,):
            gain = {"before": 0.0, "flyp": 0.1, "tuned": 0.6}[run.arm.name]
            averages = {}
            for name, images in hard.items():
                right = images + gain * (1 if alpha is None else 0.5) + 0.2 * generator.normal(size=200) > 0
                averages[{"id": "ID", "zero_shot": "zero-shot"}[name]] = 100 * right.mean()
                append_record(
                    tmp_path / "results.jsonl",
                    {
                        **{
                            "format": 1,
                            "set": name,
                            "checkpoint": f"runs/{run.name}/weights.pt",
                            "alpha": alpha,
                        },
                        **{"metrics": {"top1": 100 * right.mean()}, "headline": "top1", "images": 200},
                        **{"data": name, "right": packed(right)},
                    },
                )
            measured.append((run.arm.name, run.seed, alpha, averages))
    result = table.summarize(grid, runs, table.scores_table(measured, ["ID", "zero-shot"]), {"flyp": 0.25})
    found = table.verdicts(grid, runs, tmp_path / "results.jsonl", result["rows"])
    assert [(entry["label"], entry["against_label"]) for entry in found] == [
        ("before", "FLYP"),
        ("FLYP + WiSE-FT 0.25", "FLYP"),
        ("tuned", "FLYP"),
        ("before", "FLYP + WiSE-FT 0.25"),
        ("FLYP", "FLYP + WiSE-FT 0.25"),
        ("tuned", "FLYP + WiSE-FT 0.25"),
    ]
    tuned, mean = found[2]["averages"], {row["label"]: row["mean"] for row in result["rows"]}
    assert set(tuned) == {"ID", "zero-shot", "unseen"}  # no mean: the other averages are not measured
    assert tuned["ID"]["difference"] == pytest.approx(mean["tuned"]["ID"] - mean["FLYP"]["ID"], abs=2e-3)
    assert (tuned["ID"]["verdict"], tuned["ID"]["seeds"], found[0]["averages"]["ID"]["seeds"]) == (
        "ahead",
        2,
        2,
    )
    result["verdicts"] = found
    assert re.search(r"^less FLYP +ID +zero-shot", table.as_text(result), re.MULTILINE)
    table.write(tmp_path, result)
    written = (tmp_path / "table.md").read_text()
    assert written.startswith(table.as_markdown(result)) and f"| tuned | {as_cell(tuned['ID'])} |" in written
    # What earlier versions have measured is left without a verdict.
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps({**r, "right": None}) + "\n" for r in read_records(path)))
    old = table.verdicts(grid, runs, path, result["rows"])
    assert all(not entry["averages"] and "earlier version" in entry["unpaired"]["ID"] for entry in old)
    assert "less" not in table.as_text({**result, "verdicts": old})


def test_alphas_are_chosen_by_the_mean_over_seeds_of_validation(grid, tmp_path):
    measured = [
        *(("flyp", seed, None, {"ID": 9.0}) for seed in (0, 1)),
        *(("flyp", 0, alpha, {"ID": score}) for alpha, score in ((0.25, 5.0), (0.75, 8.0))),
        *(("flyp", 1, alpha, {"ID": score}) for alpha, score in ((0.25, 6.0), (0.75, 1.0))),
    ]
    validation = table.scores_table(measured, ["ID"])
    chosen = table.choose_alphas(grid, Choices(tmp_path), [grid.arm("flyp")], validation)
    assert chosen == {"flyp": 0.25}
    found = json.loads((tmp_path / "choices.json").read_text())["wise"]["flyp"]
    assert found == {"by": "ID", "chosen": 0.25, "validation": {"0.25": 5.5, "0.75": 4.5}}


def test_rows_of_restarted_arms_are_dropped_and_no_others(tmp_path):
    rows = [
        {"format": 1, "set": "id", "checkpoint": f"runs/{name}/weights.pt", "metrics": {}, "headline": "top1"}
        for name in ("arf-0", "arf-random-0", "arf-1")
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.drop_records(path, re.compile(r"(runs|candidates)/(arf)(\.\d+)?-\d+/"))
    kept = [Path(json.loads(line)["checkpoint"]).parent.name for line in path.read_text().splitlines()]
    assert kept == ["arf-random-0"]
