"""`arf interpolate` on real models and sets: the sweep's records, the choice, the files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from support import forks
from support.evaluation import save_checkpoint, save_config, select, write_set

from arf_plugin.cli.main import main
from arf_plugin.evaluation.merging import Merge
from arf_plugin.evaluation.records import read_records
from arf_plugin.evaluation.sweep import Scores, choose

SUITE = """\
description: drawings
sets:
  plain: &set
    sources: [{webdataset: "{split}/{set}"}]
  other: *set
averages:
  ID: {kind: id, of: [plain]}
  both: {kind: shift, of: [plain, other]}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Four checkpoints of a tiny CLIP, and two test and two validation sets with a suite over them."""
    folder = tmp_path_factory.mktemp("world")
    clip = save_config(folder / "clip")
    for seed, name in enumerate(("original", "tuned", "second", "third")):
        save_checkpoint(clip, folder / f"{name}.pt", seed)
    for split, images in (("test", 24), ("validation", 36)):
        for number, name in enumerate(("plain", "other")):
            write_set(folder / "data" / split / name, images=images - 6 * number)
    (folder / "drawings.yaml").write_text(SUITE)
    return folder


@pytest.fixture
def arf(world, tmp_path, monkeypatch, capsys):
    """Runs `arf interpolate` in this process; returns its status, output and errors."""
    monkeypatch.chdir(world)

    def run(*argv: object) -> tuple[int, str, str]:
        status = main(["interpolate", *map(str, argv)])
        return (status, *capsys.readouterr())

    return run


MODEL = ("--model", "local-dir:clip", "--workers", 0)
ON_SUITE = (*MODEL, "--suite", "drawings.yaml", "--data-root", "data")


def evaluated(capsys, *argv: object) -> dict:
    """What `arf evaluate` measures."""
    assert main(["evaluate", *map(str, argv)]) == 0
    capsys.readouterr()
    return json.loads(Path(argv[-1]).read_text())


def test_a_sweep_writes_records_whose_ends_are_the_ends(arf, tmp_path, capsys):
    results, out = tmp_path / "results.jsonl", tmp_path / "sweep.json"
    sweep = ("original.pt", "tuned.pt", "--alphas", 0, 0.3, 1, *ON_SUITE, "--results", results, "--json", out)
    status, said, _ = arf(*sweep)
    assert status == 0
    records = read_records(results)
    assert [(record["alpha"], record["set"]) for record in records if record["set"] == "plain"] == [
        (0.0, "plain"), (0.3, "plain"), (1.0, "plain"),
    ]  # fmt: skip
    assert {
        (record["checkpoint"], record["original"], record["suite"], record["split"]) for record in records
    } == {("tuned.pt", "original.pt", "drawings", "test")}
    ends = evaluated(
        capsys, "original.pt", "tuned.pt", *MODEL, "--data", "data/test", "--json", tmp_path / "ends.json"
    )
    for alpha, name in ((0.0, "original.pt"), (1.0, "tuned.pt")):
        found = {record["set"]: record["metrics"] for record in select(records, alpha=alpha)}
        assert found == ends["metrics"][name]
    assert ends["metrics"]["original.pt"] != ends["metrics"]["tuned.pt"]
    scores = json.loads(out.read_text())
    assert scores["alphas"] == [0, 0.3, 1]
    both = scores["test"]["0.3"]
    assert both["averages"]["both"] == pytest.approx(sum(both["sets"].values()) / 2)
    assert f"{both['averages']['both']:.2f}" in said

    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:-2]) + lines[-2][:40])  # killed while it wrote
    assert arf(*sweep)[0] == 0
    assert [{**record, "time": None} for record in read_records(results)] == [
        {**record, "time": None} for record in records
    ]


def test_validation_chooses_and_test_data_are_reported(arf, tmp_path):
    results, checked = tmp_path / "results.jsonl", tmp_path / "validation.jsonl"
    status, said, errors = arf(
        *("original.pt", "tuned.pt", "--alphas", *ON_SUITE, "--validation", "--choose-by", "both"),
        *("--results", results, "--validation-results", checked, "--only-chosen"),
        *("--out", tmp_path / "wise.pt", "--json", tmp_path / "sweep.json"),
    )
    assert status == 0, errors
    records = read_records(checked)
    assert {record["split"] for record in records} == {"validation"}
    mean = {}
    for alpha in {record["alpha"] for record in records}:
        mean[alpha] = sum(record["metrics"]["top1"] for record in select(records, alpha=alpha)) / 2
    assert sorted(mean) == [number / 10 for number in range(11)]
    best = [alpha for alpha in mean if mean[alpha] == max(mean.values())]
    best.sort(key=lambda alpha: (round(abs(alpha - 0.5), 6), alpha))
    chosen = json.loads((tmp_path / "sweep.json").read_text())["chosen"]
    assert (chosen["alpha"], sorted(chosen["tied"])) == (best[0], sorted(best[1:]))
    assert chosen["value"] == pytest.approx(max(mean.values()))
    assert len(set(mean.values())) > 1  # else any choice would do
    tested = read_records(results)
    assert {(record["alpha"], record["split"]) for record in tested} == {(best[0], "test")}
    assert f"test at alpha {best[0]:g}" in said

    status, *_ = arf("original.pt", "tuned.pt", "--alpha", best[0], "--out", tmp_path / "same.pt")
    assert (tmp_path / "same.pt").read_bytes() == (tmp_path / "wise.pt").read_bytes()


def test_folders_of_validation_sets_choose_for_sets_without_a_suite(arf, tmp_path):
    status, said, errors = arf(
        *("original.pt", "tuned.pt", "--alphas", 0.2, 0.8, *MODEL, "--data", "data/test/plain"),
        *("--validation", "data/validation", "--choose-by", "other", "--json", tmp_path / "sweep.json"),
    )
    assert status == 0, errors
    summary = json.loads((tmp_path / "sweep.json").read_text())
    by_other = {alpha: scores["sets"]["other"] for alpha, scores in summary["validation"].items()}
    assert by_other[f"{summary['chosen']['alpha']:g}"] == max(by_other.values())
    assert list(summary["test"]) == ["0.2", "0.8"]
    assert "chosen by other" in said


def test_several_checkpoints_are_written_at_once(arf, tmp_path):
    status, said, _ = arf(
        *("original.pt", "tuned.pt", "--alphas", "--out-folder", tmp_path / "wise", "--format", "safetensors")
    )
    assert status == 0
    files = sorted((tmp_path / "wise").iterdir())
    assert [path.name for path in files] == sorted(f"alpha-{n / 10:g}.safetensors" for n in range(11))
    assert said.split() == [str(tmp_path / "wise" / f"alpha-{n / 10:g}.safetensors") for n in range(11)]
    model = open_clip.create_model("local-dir:clip")
    open_clip.load_checkpoint(model, str(tmp_path / "wise" / "alpha-0.safetensors"))
    original = torch.load("original.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


def test_the_original_may_be_named_as_open_clip_names_it(arf, world, model_configs, tmp_path):
    open_clip.add_model_config(model_configs)
    for out in ("named.pt", "again.pt"):  # open_clip takes a file in a tag's place
        status, _, errors = arf("tiny-vit@original.pt", "tuned.pt", "--alpha", 0.4, "--out", tmp_path / out)
        assert status == 0, errors
    arf("original.pt", "tuned.pt", "--alpha", 0.4, "--out", tmp_path / "file.pt")
    named, again, file = (
        torch.load(tmp_path / out, weights_only=True)["state_dict"]
        for out in ("named.pt", "again.pt", "file.pt")
    )
    assert named.keys() == file.keys()
    assert all(torch.equal(named[key], file[key]) and torch.equal(again[key], file[key]) for key in file)
    assert len(list((tmp_path / "cache" / "originals").iterdir())) == 1
    for name, message in (
        ("tiny-vit@nowhere", "open_clip cannot load tiny-vit@nowhere"),
        ("local-dir:clip@openai", "models have no tag"),
        ("local-dir:clip", "Expected a .pt or .safetensors file, or MODEL@PRETRAINED"),
    ):
        status, _, errors = arf(name, "tuned.pt", "--out", tmp_path / "x.pt")
        assert (status, message in errors) == (1, True), errors


def test_a_dry_run_says_what_would_be_done(arf, tmp_path):
    status, said, _ = arf(
        *("original.pt", "tuned.pt", "--alphas", *ON_SUITE, "--validation", "--out", tmp_path / "out.pt"),
        "--dry-run",
    )
    assert status == 0
    assert "2 sets, 66 images" in said  # validation
    assert "2 sets, 42 images" in said  # test
    assert "ID" in said
    assert not (tmp_path / "out.pt").exists()


def test_processes_share_a_sweep(arf, tmp_path):
    """Two of torchrun's say and measure what one does."""
    argv = ["original.pt", "tuned.pt", "--alphas", 0, 0.5, *ON_SUITE, "--validation", "--batch-size", 5]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    status, said, _ = arf(*argv, "--json", one)
    assert status == 0 and said.count("chosen by ID") == 1
    done = forks.run("arf_plugin.cli.main", "interpolate", *argv, "--json", two, nproc=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == said and json.loads(one.read_text()) == json.loads(two.read_text())


RUNS = ("original.pt", "tuned.pt", "second.pt", "third.pt")


def loaded(path) -> dict:
    """A checkpoint's weights, as open_clip itself loads them."""
    model = open_clip.create_model("local-dir:clip")
    open_clip.load_checkpoint(model, str(path))
    return model.state_dict()


def test_merged_checkpoints_are_their_formulas(arf, tmp_path):
    start, *runs = map(loaded, RUNS)
    assert arf(*RUNS, "--method", "soup", "--out", tmp_path / "soup.pt")[0] == 0
    assert arf(*RUNS, "--method", "stock", "--out", tmp_path / "stock.safetensors")[0] == 0
    assert arf(*RUNS[:2], "--method", "lines", "--lines", 0, 1, "--out", tmp_path / "lines.pt")[0] == 0
    soup, stock, lines = (loaded(tmp_path / name) for name in ("soup.pt", "stock.safetensors", "lines.pt"))
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    mean = torch.stack([run[name].double() for run in runs]).mean(0)
    torch.testing.assert_close(soup[name], mean.float(), rtol=0, atol=1e-7)
    updates = [(run[name].double() - start[name].double()).flatten() for run in runs]
    cosine = (
        sum(torch.cosine_similarity(updates[i], updates[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    )
    share = 3 * cosine / (1 + 2 * cosine)
    assert 0.2 < share < 0.9
    torch.testing.assert_close(
        stock[name], (share * mean + (1 - share) * start[name]).float(), rtol=0, atol=1e-6
    )
    assert torch.equal(lines[name], start[name])  # the first of two blocks
    last = name.replace("resblocks.0", "resblocks.1")
    assert torch.equal(lines[last], runs[0][last])
    assert torch.equal(lines["visual.conv1.weight"], start["visual.conv1.weight"])


def test_a_merge_is_measured_as_its_file_is(arf, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    argv = (*RUNS, "--method", "stock", *ON_SUITE, "--results", results)
    status, said, errors = arf(*argv, "--out", tmp_path / "stock.pt", "--json", tmp_path / "stock.json")
    assert status == 0, errors
    file = tmp_path / "stock.pt"
    expected = evaluated(capsys, file, *MODEL, "--data", "data/test", "--json", tmp_path / "file.json")
    records = read_records(results)
    assert {record["set"]: record["metrics"] for record in records} == expected["metrics"][str(file)]
    (merged,) = {
        (record["checkpoint"], record["merge"], record["original"], record["alpha"]) for record in records
    }
    assert merged == ("stock of tuned.pt, second.pt, third.pt", "stock", "original.pt", None)
    summary = json.loads((tmp_path / "stock.json").read_text())
    assert (summary["method"], summary["tuned"]) == ("stock", list(RUNS[1:]))
    assert f"{summary['test']['stock']['averages']['both']:.2f}" in said
    before = results.read_bytes()
    assert arf(*argv)[0] == 0
    assert results.read_bytes() == before


def test_validation_makes_a_greedy_soup(arf, tmp_path, capsys):
    status, said, errors = arf(
        *(*RUNS, "--method", "soup", "--greedy", *ON_SUITE, "--validation", "--choose-by", "both"),
        *(
            "--out",
            tmp_path / "soup.pt",
            "--json",
            tmp_path / "soup.json",
            "--results",
            tmp_path / "results.jsonl",
        ),
    )
    assert status == 0, errors

    def score(*paths) -> float:
        """Of the soup, through files of its own."""
        if len(paths) == 1:
            path = Path(paths[0])
        else:
            path = tmp_path / f"{'-'.join(Path(one).stem for one in paths)}.pt"
            assert arf("original.pt", *paths, "--method", "soup", "--out", path)[0] == 0
        argv = (path, *MODEL, "--data", "data/validation", "--json", tmp_path / "score.json")
        metrics = evaluated(capsys, *argv)["metrics"][str(path)]
        return sum(one["top1"] for one in metrics.values()) / 2

    alone = {path: score(path) for path in RUNS[1:]}
    order = sorted(alone, key=lambda path: -alone[path])
    kept, best = [order[0]], alone[order[0]]
    for path in order[1:]:
        if (value := score(*kept, path)) >= best - 1e-9:
            kept, best = [*kept, path], value
    summary = json.loads((tmp_path / "soup.json").read_text())
    chosen = summary["chosen"]
    assert chosen["runs"] == kept and chosen["value"] == pytest.approx(best)
    assert [step["run"] for step in chosen["steps"]] == order
    assert {
        path: scores["averages"]["both"] for path, scores in summary["validation"].items()
    } == pytest.approx(alone)
    assert f"soup of {len(kept)} by both" in said
    assert {record["split"] for record in read_records(tmp_path / "results.jsonl")} == {"test"}
    soup, runs = loaded(tmp_path / "soup.pt"), [loaded(path) for path in kept]
    for name, tensor in soup.items():
        mean = torch.stack([run[name].double() for run in runs]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)


def test_validation_chooses_how_lines_scales(arf, tmp_path):
    status, said, errors = arf(
        *("original.pt", "tuned.pt", "--method", "lines", *ON_SUITE, "--validation", "--choose-by", "both"),
        *("--out", tmp_path / "lines.pt", "--json", tmp_path / "lines.json", "--only-chosen"),
    )
    assert status == 0, errors
    summary = json.loads((tmp_path / "lines.json").read_text())
    values = {point: scores["averages"]["both"] for point, scores in summary["validation"].items()}
    assert list(values) == ["0 1", "0.25 0.75", "0.5 0.5", "0.75 0.25", "1 0"]
    a, b = summary["chosen"]["lines"]
    best = f"{a:g} {b:g}"
    assert values[best] == max(values.values())
    assert (
        next(point for point in values if values[point] == max(values.values())) == best
    )  # of equals the smaller a
    assert list(summary["test"]) == [best] and f"test at lines {best}" in said
    assert (
        arf("original.pt", "tuned.pt", "--method", "lines", "--lines", a, b, "--out", tmp_path / "same.pt")[0]
        == 0
    )
    assert (tmp_path / "same.pt").read_bytes() == (tmp_path / "lines.pt").read_bytes()


def test_a_dry_run_of_a_merge_says_what_would_be_done(arf, tmp_path):
    argv = (*RUNS, "--method", "soup", "--greedy", *ON_SUITE, "--validation", "--out", tmp_path / "soup.pt")
    status, said, _ = arf(*argv, "--dry-run")
    assert status == 0 and "greedy soup of 3 checkpoints" in said and "2 sets, 66 images" in said
    assert not (tmp_path / "soup.pt").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("tuned.pt", "second.pt"),
            "WiSE-FT mixes one fine-tuned checkpoint with the original, 2 were given",
        ),
        (
            ("tuned.pt", "--method", "stock"),
            "--method stock merges two fine-tuned checkpoints or more; 1 given",
        ),
        (
            ("tuned.pt", "second.pt", "--method", "lines"),
            "lines takes one fine-tuned checkpoint, 2 were given",
        ),
        (("tuned.pt", "tuned.pt", "--method", "soup"), "tuned.pt is given twice"),
        (("tuned.pt", "copy.pt", "--method", "soup"), "tuned.pt and copy.pt hold the same weights"),
        (
            ("tuned.pt", "second.pt", "--method", "soup", "--alpha", 0),
            "--alpha is for --method wise, not for soup",
        ),
        (("tuned.pt", "--lines", 0, 1), "--lines is for --method lines, not for wise"),
        (
            ("tuned.pt", "--method", "lines", "--lines", 0.5, 0.6),
            "by 1.1 in the last layer. Expected both from 0",
        ),
        (
            ("tuned.pt", "--method", "lines", "--lines", 0, 1, "--lines", 1, 0),
            "--out takes one pair of a and b, 2",
        ),
        (
            ("tuned.pt", "second.pt", "--method", "soup", "--greedy"),
            "A greedy soup is made by validation data",
        ),
        (
            ("tuned.pt", "second.pt", "--method", "soup", *ON_SUITE, "--validation"),
            "nothing to choose with --method soup. A soup's runs are chosen with --greedy",
        ),
    ],
)
def test_merges_that_cannot_work_are_refused(arf, world, tmp_path, argv, message):
    (world / "copy.pt").write_bytes((world / "tuned.pt").read_bytes())
    status, _, errors = arf("original.pt", *argv, "--out", tmp_path / "x.pt")
    assert status == 1 and message in errors and "Traceback" not in errors, errors
    assert not (tmp_path / "x.pt").exists()


def test_a_run_that_has_not_moved_is_said(arf, tmp_path):
    status, _, errors = arf(
        "original.pt", "original.pt", "tuned.pt", "--method", "soup", "--out", tmp_path / "x.pt"
    )
    assert status == 0
    assert "warning: original.pt holds the weights of original.pt: it has not been fine-tuned" in errors


def test_merging_from_python(world, tmp_path, monkeypatch):
    import arf_plugin

    monkeypatch.chdir(world)
    out = arf_plugin.merge("original.pt", ["tuned.pt", "second.pt"], tmp_path / "soup.pt", "soup")
    one, other, found = loaded("tuned.pt"), loaded("second.pt"), loaded(out)
    assert torch.equal(
        found["visual.proj"], ((one["visual.proj"].double() + other["visual.proj"]) / 2).float()
    )
    arf_plugin.merge("original.pt", "tuned.pt", tmp_path / "lines.pt", "lines", lines=(1.0, 0.0))
    assert all(tensor.equal(one[name]) for name, tensor in loaded(tmp_path / "lines.pt").items())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "Nothing to do"),
        (("--alpha", 1.2, "--out", "x.pt"), "alpha is 1.2. Expected a number from 0"),
        (("--alphas", 0.1, 0.2, "--out", "x.pt"), "--out takes one alpha, 2 were given"),
        (("--data", "data/test"), "Measuring needs --model"),
        ((*MODEL, "--suite", "drawings.yaml"), "--data-root"),
        ((*MODEL, "--validation"), "means the suite's validation split"),
        ((*MODEL, "--data", "data/test", "--choose-by", "plain"), "--choose-by needs --validation"),
        ((*MODEL, "--data", "nowhere"), "There is no folder nowhere"),
        ((*MODEL, "--validation", "data/validation"), "Name one with --choose-by: other, plain"),
        ((*ON_SUITE, "--validation", "--choose-by", "id"), "Did you mean 'ID'?"),
        ((*ON_SUITE[:-1], "clip", "--validation"), "2 of the sets of 'drawings' are not there"),
    ],
)
def test_flags_that_cannot_work_are_refused(arf, argv, message):
    status, _, errors = arf("original.pt", "tuned.pt", *argv)
    assert status == 1
    assert message in errors
    assert "Traceback" not in errors
    assert not Path("x.pt").exists()


def test_checkpoints_that_cannot_be_mixed_are_refused(arf, tmp_path):
    status, _, errors = arf("nowhere.pt", "tuned.pt", "--out", tmp_path / "x.pt")
    assert (status, "There is no checkpoint at nowhere.pt" in errors) == (1, True)
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "other.pt")
    status, _, errors = arf("original.pt", tmp_path / "other.pt", "--out", tmp_path / "x.pt")
    assert (status, "are of different architectures" in errors) == (1, True)


@pytest.mark.parametrize(
    ("scores", "alpha", "tied"),
    [
        ({0.0: 50.0, 0.5: 50.0, 1.0: 50.0}, 0.5, (0.0, 1.0)),
        ({0.4: 60.0, 0.6: 60.0, 0.5: 10.0}, 0.4, (0.6,)),
        ({0.1: 60.0, 0.7: 60.0}, 0.7, (0.1,)),
        ({0.5: 60.0, 0.9: 60.1}, 0.9, ()),
    ],
)
def test_the_rule_for_ties(scores, alpha, tied):
    of = {Merge("wise", (a,)): Scores({"set": value}, {}) for a, value in scores.items()}
    assert choose(of, "set") == [Merge("wise", (a,)) for a in (alpha, *tied)]
