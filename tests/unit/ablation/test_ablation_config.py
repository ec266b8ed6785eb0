"""Grids: what a file says, what is wrong with it and where, what it costs."""

from __future__ import annotations

import json
import math

import pytest
from support import data, grids

from arf_plugin.ablation.plan import Run, candidate_runs, final_runs, merged
from arf_plugin.ablation.reader import load_grid, ready
from arf_plugin.errors import GridError

CONFIG = """\
name: small
variables: {data: here, teacher: null}
model: ViT-B-32
pretrained: laion2b
task: {data: '${data}/{000..003}.tar', samples: 415, classnames: names.txt}
trainer: {epochs: 15, batch-size: 64, lr: 5e-4, workers: 1}
seeds: [0, 1]
evaluation: {suite: emojinet, test: sets, validation: sets}
wise: [0.5, 0.25]
anchors:
  own: ANCHORS
  random:
    captions: own
    build:
      - retrieve --random --queries Q --pool P --out ${out}/hits
      - [pack, --retrieved, "${out}/hits", --out, "${out}"]
arms:
  - {name: before, kind: before}
  - name: flyp
    kind: baseline
  - {name: arf, kind: arf, anchors: own, flags: {wd: 0.2, workers: null}}
"""


def write(tmp_path, text: str, name: str = "grid.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def load(tmp_path, text: str = CONFIG, **settings: str):
    return load_grid(str(write(tmp_path, text)), tmp_path / "out", settings)


def test_a_file_becomes_a_grid(tmp_path):
    grid = load(tmp_path, data="there")
    assert grid.task.data == "there/{000..003}.tar"
    assert (grid.seeds, grid.wise.alphas, grid.wise.by, grid.processes) == ((0, 1), (0.25, 0.5), None, 1)
    assert grid.arm("flyp").flags == {
        "epochs": ("15",),
        "batch-size": ("64",),
        "lr": ("5e-4",),
        "workers": ("1",),
    }
    assert grid.arm("arf").flags == {
        "epochs": ("15",),
        "batch-size": ("64",),
        "lr": ("5e-4",),
        "wd": ("0.2",),
    }
    random = grid.anchors["random"]
    assert random.path == tmp_path / "out" / "anchors" / "random"
    assert random.build[1] == ("pack", "--retrieved", f"{random.path}/hits", "--out", str(random.path))


def test_what_is_merged_are_all_seeds_of_trained_arms(tmp_path):
    text = CONFIG.replace("wise:", "merge: [stock, soup]\nwise:")
    grid = load(tmp_path, text + "  - {name: probe, kind: baseline, probe: true}\n")
    runs = [Run(grid, tmp_path, arm, seed) for arm in grid.arms for seed in grid.seeds]
    assert [one.listed for one in merged(grid, runs)] == [
        f"merged/{arm}+{method}/0-1" for arm in ("flyp", "arf") for method in ("stock", "soup")
    ]
    assert merged(grid, [run for run in runs if run.seed == 0]) == []
    assert merged(load(tmp_path), runs) == []
    with pytest.raises(
        GridError, match=r"merge: the arm 'flyp\+soup' has the name of another one's merged seeds"
    ):
        load(tmp_path, text + "  - {name: flyp+soup, kind: baseline}\n")


def test_a_grid_that_extends_another_takes_its_arms_by_name(tmp_path):
    base = write(tmp_path, CONFIG, "base.yaml")
    grid = load(
        tmp_path,
        f"name: more\nextends: {base}\ntrainer: {{lr: 1e-3}}\nseeds: [7]\n"
        "arms: [before, arf, {name: arf-2, kind: arf, anchors: own, flags: {lr: 2e-3}}]\n",
    )
    assert [arm.name for arm in grid.arms] == ["before", "arf", "arf-2"]
    assert grid.seeds == (7,) and grid.model == "ViT-B-32"
    assert [grid.arm(name).flags["lr"] for name in ("arf", "arf-2")] == [("1e-3",), ("2e-3",)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "seeds: [0, 0]", "line 7, seeds: found [0, 0], expected one seed or more"),
        ("wise: [0.5, 0.25]", "merge: [slerp]", "line 9, merge[0]"),
        ("seeds: [0, 1]", "merge: [soup]\nseeds: [0]", "line 7, merge: an arm's seeds are merged, but 'seeds' has one"),
        ("lr: 5e-4", "lr: 5e-4, model: RN50", "line 6, trainer.model: --model is set by the grid"),
        ("lr: 5e-4", "lr: 5e-4, --wd: 1", "line 6, trainer.--wd: found the flag '--wd'"),
        ("lr: 5e-4", "lr: 5e-4, lr: 1", "line 6, trainer.lr: this key stands on line 6, too"),
        ("name: small", "nmae: small", "line 1, nmae: unknown key. Expected one of: name, extends"),
        ("kind: baseline", "kind: basline", "arms[1].kind: found 'basline', expected one of: before, baseline"),
        ("kind: baseline", "what: x", "line 19, arms[1]: 'kind' is missing (found: name, what)"),
        ("anchors: own,", "anchors: mine,", "arms[2].anchors: found 'mine', expected one of: own, random"),
        ("kind: before", "kind: control", "found 0 arms of kind 'before', expected exactly one"),
        ("name: flyp", "name: arf", "another arm is called 'arf'"),
        ("name: flyp", "name: ../flyp", "arms[1].name: found '../flyp', expected a name for folders"),
        ("kind: baseline", "kind: baseline\n    head: arf", "head 'arf' is no probe arm of this grid"),
        ("kind: baseline", "kind: baseline\n    mix: 0.5", "arms[1].mix: mixing needs pairs"),
        ("kind: baseline", "kind: baseline\n    mix: 2\n    anchors: own", "mix: found 2, expected a number, at most"),
        ("samples: 415", "samples: many", "task.samples: found 'many', expected a whole number"),
        ("samples: 415", "samples: '${size}'", "${size} is not a variable (known: grid, data, teacher)"),
        ("samples: 415", "samples: '${teacher}'", "${teacher} has no value. Give one with: --set teacher=VALUE"),
        ("wise: [0.5, 0.25]", "wise: [1.5]", "wise.alphas[0]: found 1.5, expected a number, at most 1"),
        ("retrieve --random", "evaluate --random", "anchors.random.build[0]: found 'evaluate', expected a command"),
        (", validation: sets}", "}\nchoose: {over: [{lr: 1}, {lr: 2}], by: ID}", "line 9, choose: a choice is made on"),
        ("wise:", "choose: {over: [{lr: 1}], by: ID}\nwise:", "choose.over: a choice needs at least two candidates"),
        ("name: small", "name: [small", "this is not YAML"),
        ("name: small", "name: !!python/name:os.system small", "line 1: the tag tag:yaml.org,2002:python/name"),
        ("name: small", "name: small\nextends: grid-that-is-not.yaml", "There is no grid 'grid-that-is-not.yaml'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path, old, new, message):
    assert old in CONFIG
    with pytest.raises(GridError) as caught:
        load(tmp_path, CONFIG.replace(old, new, 1))
    assert message in str(caught.value)


def test_a_setting_of_no_variable_is_refused(tmp_path):
    with pytest.raises(GridError, match=r"--set dta=...: .* no such variable \(known: data, teacher\)"):
        load(tmp_path, dta="x")


def test_a_file_that_extends_itself_is_refused(tmp_path):
    with pytest.raises(GridError, match="is there a circle"):
        load(tmp_path, CONFIG + f"extends: {tmp_path}/grid.yaml\n")


def test_steps_and_images_are_those_of_the_trainer(tmp_path):
    every = "  - {name: every, kind: arf, anchors: own, flags: {workers: null, arf-every: 4}}\n"
    grid = load(tmp_path, CONFIG + every)
    runs = {run.arm.name: run for run in final_runs(grid, tmp_path, ["flyp", "arf", "every"], [0], 1)}
    assert runs["flyp"].steps() == math.ceil(415 / 64) * 15 == 105
    assert runs["flyp"].images() == 105 * 64
    # arf has open_clip's 4 workers: two load task data, and each of them rounds its share of 7 batches up.
    assert runs["arf"].steps() == 8 * 15
    assert runs["arf"].images() == 8 * 15 * 128
    assert runs["every"].images() == 8 * 15 * 64 + 30 * 64  # pairs on every fourth of 120 steps
    with_four = Run(grid, tmp_path, grid.arm("flyp"), 0, processes=4)
    assert with_four.steps() == math.ceil(415 / 256) * 15
    assert with_four.images() == 2 * 15 * 64 * 4


def test_mixed_data_have_the_wanted_share_of_pairs(tmp_path):
    task = data.write_task(tmp_path / "task", shards=4, per_shard=8)
    data.write_pairs(tmp_path / "anchors", shards=3, per_shard=20)
    text = CONFIG.replace("'${data}/{000..003}.tar', samples: 415", f"'{task.urls}'")
    text = text.replace("ANCHORS", str(tmp_path / "anchors"))
    text += "  - {name: mixed, kind: baseline, anchors: own, mix: 0.25}\n"
    grid = load(tmp_path, text)
    command = Run(grid, tmp_path, grid.arm("mixed"), 0).command()
    given = {flag: command[command.index(flag) + 1] for flag in command if flag.startswith("--t")}
    factors = [float(word) for word in given["--train-data-upsampling-factors"].split("::")]
    # open_clip draws a shard by its factor and takes all of it.
    drawn = {"task": 4 * factors[0] * 8, "pairs": sum(factors[1:]) * 20}
    assert drawn["pairs"] / sum(drawn.values()) == pytest.approx(0.25, rel=1e-3)
    assert len(given["--train-data"].split("::")) == len(factors) == 4
    assert "--dataset-resampled" in command and "--arf-anchors" not in command
    assert int(given["--train-num-samples"]) == round(32 / 0.75)


def test_candidates_are_every_value_with_the_first_seed(tmp_path):
    choice = "choose: {over: [{lr: 1e-4}, {lr: 2e-4}, {wd: false}], by: ID}\n"
    grid = load(tmp_path, CONFIG + choice)
    runs = list(candidate_runs(grid, tmp_path, ["arf"], 1))
    assert [run.name for run in runs] == ["arf.0-0", "arf.1-0", "arf.2-0"]
    assert [run.arm.flags.get("lr") for run in runs] == [("1e-4",), ("2e-4",), ("5e-4",)]
    assert [run.arm.flags.get("wd") for run in runs] == [("0.2",), ("0.2",), None]


def plan(run_arf, *argv: object) -> dict:
    return json.loads(run_arf("ablate", *argv, "--dry-run", "--json").stdout)


@pytest.mark.parametrize("name", sorted(ready()))
def test_every_ready_grid_plans_with_paths_that_do_not_exist(tmp_path, run_arf, name):
    grid = plan(run_arf, name, "--out", tmp_path / "grid")
    names = {run["run"] for run in grid["runs"]}
    assert len(names) == len(grid["runs"]) > 2
    assert not (tmp_path / "grid").exists()


def test_emojinets_grid_has_the_arms_of_the_comparison(tmp_path):
    grid = load_grid("emojinet", tmp_path)
    names = [arm.name for arm in grid.arms]
    assert names[:5] == ["before", "linear-probe", "lp-ft", "flyp", "flyp-2x"]
    assert names[5:] == ["l2sp", "distill", "mixed", "caption", "pair", "arf", "arf-random"]
    grid = load_grid(str(write(tmp_path, "extends: emojinet\ntask: {samples: 415}\n")), tmp_path)
    images = {name: Run(grid, tmp_path, grid.arm(name), 0).images() for name in ("flyp", "flyp-2x", "arf")}
    assert images["flyp-2x"] == images["arf"] == 2 * images["flyp"]


def test_a_plan_shows_commands_and_cost_and_what_is_missing(tmp_path, run_arf):
    world = grids.write_world(tmp_path / "world")
    config = world.config()
    shown = run_arf("ablate", config, "--out", tmp_path / "grid", "--dry-run").stdout
    assert "# arf-0: 6 steps, 96 images (2 x the reference)" in shown
    assert "# in all: 2 runs, 0 of them finished; 144 images to forward" in shown
    assert f"--arf-anchors {world.folder}/anchors" in shown and "not there" not in shown
    (world.folder / "templates.txt").unlink()
    assert (
        f"# not there yet: {world.folder}/templates.txt"
        in run_arf("ablate", config, "--out", tmp_path / "grid", "--dry-run").stdout
    )
    refused = run_arf("ablate", config, "--out", tmp_path / "grid", check=False)
    assert refused.returncode == 1 and "needs files that are not there" in refused.stderr


def test_a_choice_by_an_average_that_the_suite_does_not_have(tmp_path, run_arf):
    config = write(tmp_path, CONFIG.replace("wise: [0.5, 0.25]", "wise: {alphas: [0.5], by: OOD}"))
    refused = run_arf("ablate", config, "--out", tmp_path / "grid", "--dry-run", check=False)
    assert "'wise' is by 'OOD', which is no average of the suite 'emojinet'" in refused.stderr
    assert "Expected one of: ID, shift, mono" in refused.stderr


def test_subsets(tmp_path, run_arf):
    config = write(tmp_path, CONFIG)
    runs = plan(run_arf, config, "--out", tmp_path, "--arms", "arf", "--seeds", "1")["runs"]
    assert [run["run"] for run in runs] == ["arf-1"]
    refused = run_arf("ablate", config, "--out", tmp_path, "--dry-run", "--arms", "arff", check=False)
    assert "--arms arff: not in this grid. Expected some of: before, flyp, arf." in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("epcohs: 3", "unrecognized arguments: --epcohs 3"),
        ("lr: high", "argument --lr: invalid float value: 'high'"),
        ("arf-pair-weight: -1", "argument --arf-pair-weight"),
        ("batch: 3", "one of its flags is short for --batch-size; write 'batch-size'"),
        ("dataset-resampled: true, arf-freeze-bn: true, use-bn-sync: true", "contradict each other"),
    ],
)
def test_flags_that_the_trainer_would_refuse_are_found_before_anything_runs(
    tmp_path, run_arf, flags, message
):
    text = CONFIG.replace("wd: 0.2, workers: null", flags)
    refused = run_arf("ablate", write(tmp_path, text), "--out", tmp_path / "grid", "--dry-run", check=False)
    assert refused.returncode == 1
    assert "grid.yaml, line 21, arms[2]: arm 'arf' cannot run" in refused.stderr and message in refused.stderr
