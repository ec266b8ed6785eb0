"""`arf ablate` on tiny data, through the real trainer under torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import data, forks, grids

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from benchmarks import summary

from arf_plugin.evaluation.records import read_records

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}


class Ablate:
    """The command in a fork, with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "grid"
        self.environment = {**ENVIRONMENT, "ARF_CACHE_DIR": str(folder / "cache")}

    def __call__(self, config: Path, *more: object, status: int = 0) -> subprocess.CompletedProcess:
        argv = ("ablate", config, "--out", self.out, *more)
        done = forks.run("arf_plugin.cli.main", *argv, env=self.environment)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def start(self, config: Path) -> subprocess.Popen:
        """In a process of its own, which a signal reaches as a user's does."""
        command = [sys.executable, "-m", "arf_plugin.cli.main", "ablate", str(config), "--out", str(self.out)]
        environment = {**os.environ, **self.environment}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def json(self, name: str) -> dict:
        return json.loads((self.out / name).read_text())

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]


@pytest.fixture
def ablate(tmp_path) -> Ablate:
    return Ablate(tmp_path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> grids.World:
    return grids.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world) -> tuple[Ablate, Path, str]:
    """A finished grid, its file, and what it printed."""
    ablate, config = Ablate(tmp_path_factory.mktemp("finished")), world.config()
    return ablate, config, ablate(config).stdout


def test_a_grid_ends_with_its_table(finished):
    ablate, _, printed = finished
    assert re.search(r"^FLYP +\d+\.\d +\d+\.\d +48 \(1x\)$", printed, re.MULTILINE)
    assert re.search(r"^ARF \+ WiSE-FT 0\.5 ", printed, re.MULTILINE)
    results = ablate.json("results.json")
    assert [(row["arm"], row["alpha"]) for row in results["rows"]] == [
        ("before", None),
        ("flyp", None),
        ("flyp", 0.5),
        ("arf", None),
        ("arf", 0.5),
    ]
    table = (ablate.out / "table.md").read_text().splitlines()
    assert (
        table[2].startswith("| before |") and table[6].startswith("| ARF + WiSE-FT 0.5 |") and table[7] == ""
    )
    assert results["cost"]["arf"] == {"steps": 6, "images": 96, "relative": 2.0}
    difference = results["against_reference"]["arf"]["ID"]["per_seed"][0]
    means = {row["arm"]: row["mean"]["ID"] for row in results["rows"] if row["alpha"] is None}
    assert difference == pytest.approx(means["arf"] - means["flyp"], abs=2e-3)
    lines = [(entry["arm"], entry["alpha"], entry["against_alpha"]) for entry in results["verdicts"]]
    assert len(lines) == 2 * 4 and ("arf", None, None) in lines and ("arf", 0.5, 0.5) in lines
    paired = results["verdicts"][lines.index(("arf", None, None))]["averages"]
    assert set(paired) == {"ID", "shift", "mean"} and paired["ID"]["difference"] == pytest.approx(
        difference, abs=2e-3
    )
    assert re.search(r"^less FLYP +ID +shift +mean$", printed, re.MULTILINE)
    assert any(line.startswith("| less FLYP + WiSE-FT 0.5 | ID | shift | mean |") for line in table)


def test_figures_are_those_of_arf_evaluate(finished, world, run_arf, tmp_path):
    ablate, _, _ = finished
    out = tmp_path / "rows.jsonl"
    run_arf(
        *(
            "evaluate",
            ablate.out / "runs" / "arf-0" / "weights.pt",
            "--model",
            f"local-dir:{world.folder}/clip",
        ),
        *("--suite", world.folder / "drawings.yaml", "--data-root", world.folder / "sets", "--out", out),
    )
    direct = {row["set"]: row["metrics"] for row in map(json.loads, out.read_text().splitlines())}
    rows = ablate.rows("results.jsonl")
    own = {
        r["set"]: r["metrics"]
        for r in rows
        if r["checkpoint"] == "runs/arf-0/weights.pt" and r["alpha"] is None
    }
    assert own == direct and set(own) == {"id", "shift"}


def test_runs_and_rows_say_where_they_come_from(finished, world):
    ablate, _, _ = finished
    run = ablate.json("runs/arf-0/run.json")
    assert (run["arm"], run["seed"], run["steps"], run["checkpoint"]) == ("arf", 0, 6, "weights.pt")
    assert run["anchors"] == f"{world.folder}/anchors" and run["seconds"] > 0
    assert "Pair_anchor_loss" in (ablate.out / "runs" / "arf-0" / "out.log").read_text()
    assert "Pair_anchor_loss" not in (ablate.out / "runs" / "flyp-0" / "out.log").read_text()
    assert not (ablate.out / "runs" / "arf-0" / "checkpoints").exists()
    grid = ablate.json("grid.json")
    assert [arm["name"] for arm in grid["arms"]] == ["before", "flyp", "arf"]
    assert (grid["seeds"], grid["reference"], grid["wise"]) == ([0], "flyp", [0.5])
    test, validation = ablate.rows("results.jsonl"), ablate.rows("validation.jsonl")
    assert {row["split"] for row in test} == {"test"} and {row["split"] for row in validation} == {
        "validation"
    }
    assert len(test) == len(validation) == 5 * 2
    mixed = [row for row in test if row["alpha"] is not None]
    assert {row["original"] for row in mixed} == {"runs/before-0/weights.pt"}
    wise = ablate.json("choices.json")["wise"]["arf"]
    assert wise["chosen"] == 0.5 and set(wise["validation"]) == {"0.5"}


def test_a_second_start_does_nothing_again(finished):
    ablate, config, printed = finished
    files = {path: path.stat().st_mtime_ns for path in ablate.out.glob("runs/*/*")}
    rows = (ablate.out / "results.jsonl").read_bytes()
    again = ablate(config)
    assert again.stdout == printed
    assert {path: path.stat().st_mtime_ns for path in ablate.out.glob("runs/*/*")} == files
    assert (ablate.out / "results.jsonl").read_bytes() == rows


def test_several_pretrained_models_are_summed_up(finished, tmp_path):
    ablate, _, _ = finished
    results = ablate.json("results.json")
    results["suite"] = str(tmp_path / "drawings.yaml")
    (tmp_path / "drawings.yaml").write_text(grids.SUITE)
    for number in range(2):  # the second is the first once more, with the two arms exchanged
        folder = tmp_path / "runs" / f"tiny-{number}" / "all"
        folder.mkdir(parents=True)
        text = (ablate.out / "results.jsonl").read_text()
        if number:
            text = text.replace("runs/arf-0/", "runs/x-0/").replace("runs/flyp-0/", "runs/arf-0/")
            text = text.replace("runs/x-0/", "runs/flyp-0/")
        (folder / "results.jsonl").write_text(text)
        (folder / "results.json").write_text(json.dumps(results))
    models = [summary.Model(tmp_path / "runs" / f"tiny-{number}" / "all") for number in range(2)]
    found = summary.summarize(models, "arf")
    assert set(found["lines"]) == {"before", "flyp", "flyp+WiSE-FT", "arf", "arf+WiSE-FT"}
    assert set(found["against"]) == {"arf", "arf+WiSE-FT"}
    means = {row["arm"]: row["mean"]["ID"] for row in results["rows"] if row["alpha"] is None}
    line = found["lines"]["arf"]
    assert [model["ID"] for model in line["per_model"]] == pytest.approx(
        [means["arf"], means["flyp"]], abs=2e-3
    )
    entry = found["against"]["arf"]["flyp"]
    assert (
        entry["averages"]["mean"]["difference"] == pytest.approx(0.0)
        and entry["averages"]["mean"]["seeds"] == 2
    )
    assert entry["models_ahead"] == int(means["arf"] != means["flyp"])
    scores, *differences = summary.as_tables(found)
    assert "FLYP + WiSE-FT" in [label for label, *_ in scores[1]]
    assert [head[0] for head, _ in differences] == ["ARF less", "ARF + WiSE-FT less"]


def test_a_finished_grid_is_kept_without_its_checkpoints(finished, tmp_path, monkeypatch):
    """What is kept gives the same summary, and is found beside models that are here."""
    ablate, _, _ = finished
    results = ablate.json("results.json")
    (tmp_path / "drawings.yaml").write_text(grids.SUITE)
    here = tmp_path / "runs" / "tiny-0" / "all"
    here.mkdir(parents=True)
    (here / "results.json").write_text(json.dumps({**results, "suite": str(tmp_path / "drawings.yaml")}))
    (here / "choices.json").write_text("{}")
    measured = (ablate.out / "results.jsonl").read_text()
    other = json.loads(measured.splitlines()[-1]) | {
        "alpha": 0.125,
        "original_digest": "0",
    }  # no line of a table
    (here / "results.jsonl").write_text(measured + json.dumps(other) + "\n")
    monkeypatch.setattr(summary, "KEPT", tmp_path / "kept")
    summary.keep(here, tmp_path / "kept" / "emojinet" / "tiny-1" / "all")
    folders = summary.finished("emojinet", "all", tmp_path / "runs")
    assert folders == [here, tmp_path / "kept" / "emojinet" / "tiny-1" / "all"]
    models = [summary.Model(folder) for folder in folders]
    one, kept = ({**summary.summarize([model], "arf"), "models": ["tiny"]} for model in models)
    for line in (*one["lines"].values(), *kept["lines"].values()):
        line["alphas"] = line["alphas"] and list(line["alphas"].values())
    assert one == kept and one["against"]
    assert 0.125 not in [record["alpha"] for record in read_records(folders[1] / "results.jsonl")]


def test_a_changed_grid_is_refused_with_the_difference(finished, world):
    ablate, _, _ = finished
    changed = world.config(
        text=grids.CONFIG.replace("anchors: hand-made}}", "anchors: hand-made, flags: {{wd: 0.3}}}}")
    )
    refused = ablate(changed, status=1).stderr
    assert "arf-0: --wd: was (not given), is 0.3" in refused and "flyp" not in refused
    assert "--restart arf" in refused
    other = world.config(text=grids.CONFIG.replace("epochs: 2", "epochs: 3"))
    assert "flyp-0: --epochs: was 2, is 3" in ablate(other, status=1).stderr


@pytest.mark.slow
def test_the_seeds_of_an_arm_are_merged(ablate, world, run_arf, tmp_path):
    text = grids.CONFIG.replace("seeds: [0]", "seeds: [0, 1]\nmerge: [stock, soup]")
    text = text.replace("  - {{name: arf, label: ARF, kind: arf, anchors: hand-made}}\n", "")
    config = world.config(text=text.replace("epochs: 2", "epochs: 1"))
    printed = ablate(config).stdout
    rows = {row["arm"]: row for row in ablate.json("results.json")["rows"] if row["alpha"] is None}
    assert list(rows) == ["before", "flyp", "flyp+stock", "flyp+soup"]
    assert re.search(r"^FLYP \+ Model Stock +\d", printed, re.MULTILINE)
    assert rows["flyp+soup"]["label"] == "FLYP + uniform soup" and rows["flyp+soup"]["per_seed"] == {}
    assert (
        set(rows["flyp"]["per_seed"]) == {"0", "1"}
        and "flyp+stock" not in ablate.json("results.json")["wise"]
    )
    runs = [ablate.out / "runs" / name / "weights.pt" for name in ("before-0", "flyp-0", "flyp-1")]
    for method in ("stock", "soup"):
        out = tmp_path / f"{method}.jsonl"
        run_arf(
            *("interpolate", *runs, "--method", method, "--model", f"local-dir:{world.folder}/clip"),
            *("--suite", world.folder / "drawings.yaml", "--data-root", world.folder / "sets"),
            *("--results", out),
        )
        direct = {row["set"]: row["metrics"] for row in map(json.loads, out.read_text().splitlines())}
        own = [r for r in ablate.rows("results.jsonl") if r["checkpoint"] == f"merged/flyp+{method}/0-1"]
        assert {r["set"]: r["metrics"] for r in own} == direct and set(direct) == {"id", "shift"}
        assert {r["merge"] for r in own} == {method}
        assert rows[f"flyp+{method}"]["mean"]["ID"] == pytest.approx(direct["id"]["top1"], abs=1e-3)
    kept = (ablate.out / "results.jsonl").read_bytes()
    assert ablate(config).stdout == printed and (ablate.out / "results.jsonl").read_bytes() == kept
    run_arf("report", ablate.out, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "FLYP + Model Stock" in page and "has not been measured on every average" not in page
    plain = world.config(text=text.replace("epochs: 2", "epochs: 1").replace("merge: [stock, soup]\n", ""))
    ablate(plain)
    assert not [row for row in ablate.rows("results.jsonl") if "merge" in row]
    assert "merge" not in ablate.json("grid.json")


def slow_grid(world: grids.World) -> Path:
    """One arm beside the model before, with enough epochs to be killed in between."""
    text = grids.CONFIG.replace("epochs: 2", "epochs: 12")
    return world.config(
        text=text.replace("  - {{name: arf, label: ARF, kind: arf, anchors: hand-made}}\n", "")
    )


def wait_for(condition, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_killed_grid_goes_on(ablate, world, how):
    config, run = slow_grid(world), ablate.out / "runs" / "flyp-0"
    first = ablate.start(config)
    try:
        wait_for(lambda: list(run.glob("checkpoints/epoch_[2-9].pt")), "the second epoch")
        first.send_signal(how)
        first.wait(30)
    finally:
        first.kill()
    assert first.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 143)
    assert not (run / "run.json").exists()
    second = ablate(config)
    assert "FLYP" in second.stdout
    record = ablate.json("runs/flyp-0/run.json")
    trained = (run / "out.log").read_text()
    starts = [int(epoch) for epoch in re.findall(r"Start epoch (\d+)", trained)]
    if how == signal.SIGTERM:  # the trainer was ended; it has gone on after its last whole epoch
        assert "resuming checkpoint" in trained and record["resumed_at_epoch"] >= 1
        assert sorted(set(starts)) == list(range(12)) and 12 <= len(starts) <= 13
    else:  # the trainer was left behind and went on; the second start has waited for it
        assert "resuming checkpoint" not in trained and starts == list(range(12))


def test_a_failed_run_lets_the_others_finish(ablate, world, tmp_path):
    data.write_captions(tmp_path / "foreign", {"other/000": "a caption of other data"})
    more = "  - {name: foreign, kind: arf, anchors: foreign}\n"
    text = grids.CONFIG.replace(
        "{{hand-made: {world}/anchors}}", f"{{{{hand-made: {{world}}/anchors, foreign: {tmp_path}/foreign}}}}"
    )
    text = text.replace("  - {{name: arf, label: ARF, kind: arf, anchors: hand-made}}\n", "")
    failed = ablate(world.config(more, text), status=1)
    assert "foreign-0: failed" in failed.stderr
    assert "cover none of the 24 task samples" in failed.stderr  # the end of the trainer's log
    assert "arf ablate: foreign-0 failed: foreign-0 ended with status 1" in failed.stderr
    assert re.search(r"^FLYP ", failed.stdout, re.MULTILINE) and "foreign" not in failed.stdout
    assert ablate.json("results.json")["cost"].keys() == {"before", "flyp"}


ANCHORS = """\
anchors:
  hand-made: {world}/anchors
  random:
    captions: hand-made
    build:
      - embed --task-data '{task}' --model local-dir:{world}/clip --out ${{out}}/work/task
      - embed --pool '{world}/pool/pool-{{00..01}}.tar' --model local-dir:{world}/clip --out ${{out}}/work/pool
      - retrieve --queries ${{out}}/work/task --pool ${{out}}/work/pool --k 2 --random --out ${{out}}/work/hits
      - pack --retrieved ${{out}}/work/hits --out ${{out}}
"""


@pytest.mark.slow
def test_every_kind_of_arm_with_choices_by_validation(ablate, world):
    text = grids.CONFIG.replace("anchors: {{hand-made: {world}/anchors}}\n", ANCHORS)
    distill = f"{{distill-model: 'local-dir:{world.folder}/clip', distill-pretrained: its-own}}"
    more = f"""\
  - {{name: probe, kind: baseline, probe: {{device: cpu}}}}
  - {{name: lp-ft, kind: baseline, head: probe}}
  - name: l2sp
    kind: baseline
    choose: {{over: [{{arf-l2sp: 0.01}}, {{arf-l2sp: 10}}], by: ID}}
  - {{name: distill, kind: baseline, flags: {distill}}}
  - {{name: mixed, kind: baseline, anchors: hand-made, mix: 0.5}}
  - {{name: arf-random, kind: control, anchors: random}}
"""
    config = world.config(more, text)
    done = ablate(config)
    names = ["before", "flyp", "arf", "probe", "lp-ft", "l2sp", "distill", "mixed", "arf-random"]
    assert list(dict.fromkeys(row["arm"] for row in ablate.json("results.json")["rows"])) == names, (
        done.stderr
    )
    choice = ablate.json("choices.json")["arms"]["l2sp"]
    assert [candidate["flags"] for candidate in choice["candidates"]] == [
        {"arf-l2sp": "0.01"},
        {"arf-l2sp": "10"},
    ]
    values = [candidate["validation"]["ID"] for candidate in choice["candidates"]]
    assert choice["chosen"] == values.index(max(values))
    run = ablate.json("runs/l2sp-0/run.json")  # the winner's run has become the arm's
    assert run["command"][run["command"].index("--arf-l2sp") + 1] == ("0.01", "10")[choice["chosen"]]
    assert len(list((ablate.out / "candidates").glob("l2sp.*-0"))) == 1
    console = {name: (ablate.out / "runs" / f"{name}-0" / "console.log").read_text() for name in names[1:]}
    assert "Distill_loss" in console["distill"] and "Pair_anchor_loss" in console["arf-random"]
    assert "Cross_entropy_loss" in console["lp-ft"] and "L2sp_loss" in console["l2sp"]
    assert "Pair_anchor_loss" not in console["mixed"]
    random = ablate.out / "anchors" / "random"
    assert ablate.json("anchors/random/anchors.json")["pairs"]["count"] == 15  # 16, less a duplicate
    assert [path.name for path in (random / "captions").iterdir()] == ["part-00000.parquet"]
    before = {p: p.stat().st_mtime_ns for p in ablate.out.glob("*/*/weights.pt")}
    ablate(config, "--restart", "mixed")
    after = {p: p.stat().st_mtime_ns for p in ablate.out.glob("*/*/weights.pt")}
    assert {p.parent.name for p in before if before[p] != after[p]} == {"mixed-0"}
    checkpoints = [(r["checkpoint"], r["digest"]) for r in ablate.rows("results.jsonl")]
    assert len({digest for name, digest in checkpoints if "mixed" in name}) == 1
