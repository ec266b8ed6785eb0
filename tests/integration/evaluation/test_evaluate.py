"""`arf evaluate` as users run it: beside the real `clip_benchmark eval`, on a suite, resumed, and under torchrun."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from support import building, clip_benchmark, forks
from support.evaluation import NAMES, save_checkpoint, save_config, write_folders, write_set, write_texts

from arf_plugin.evaluation.records import append_record, read_records, right_images

SUITE = """\
description: two sets
sets:
  seen:
    classes: 6
    sources: [{webdataset: "{set}", images: 60}]
  unseen:
    metric: mean_per_class
    sources: [{folders: "{set}"}]
  elsewhere:
    sources: [{webdataset: elsewhere}, {builder: dtd, at: elsewhere}]
averages:
  S: {kind: class-split, of: [seen]}
  U: {kind: class-split, of: [unseen]}
  H: {kind: class-split, harmonic: [S, U]}
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return save_config(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def path(clip, tmp_path_factory):
    return save_checkpoint(clip, tmp_path_factory.mktemp("checkpoint") / "a.pt", 1)


@pytest.fixture
def root(tmp_path):
    """A data root with two of the suite's three sets, the first of them cut short."""
    write_set(tmp_path / "root" / "seen", images=58)
    write_folders(tmp_path / "root" / "unseen", images=30)
    write_texts(tmp_path / "root" / "unseen", sorted(NAMES))
    (tmp_path / "own.yaml").write_text(SUITE)
    return tmp_path / "root"


def agrees(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert ours["top1"] == pytest.approx(100 * theirs["acc1"], abs=1e-9)
    assert ours["top5"] == pytest.approx(100 * theirs["acc5"], abs=1e-9)
    assert ours["mean_per_class"] == pytest.approx(100 * theirs["mean_per_class_recall"], abs=1e-9)


@pytest.mark.parametrize(
    ("precision", "flags"), [("fp32", ["--no_amp"]), pytest.param("amp", [], marks=pytest.mark.slow)]
)
def test_agrees_with_clip_benchmark_on_a_webdataset_folder(named, tmp_path, run_arf, precision, flags):
    path = save_checkpoint(named, tmp_path / "named.pt", 1)
    images = write_set(tmp_path / "shapes", images=210, shards=3)
    theirs = clip_benchmark.evaluate(tmp_path, named, path, "wds/shapes", images, "--batch_size", 64, *flags)
    run_arf(
        *("evaluate", path, "--model", named, "--data", images, "--out", tmp_path / "records.jsonl"),
        *("--batch-size", 64, "--precision", precision, "--workers", 2),
    )
    [record] = read_records(tmp_path / "records.jsonl")
    agrees(record["metrics"], theirs)
    assert 0.1 < theirs["acc1"] < 0.9  # neither all right nor all wrong
    assert theirs["acc1"] != theirs["acc5"] != 1


@pytest.mark.slow
def test_agrees_with_clip_benchmark_on_a_torchvision_set(named, tmp_path, run_arf):
    """The Describable Textures' layout with eight classes, class names and templates of CLIP_benchmark."""
    path = save_checkpoint(named, tmp_path / "named.pt", 1)
    root = tmp_path / "data"
    folder = root / "dtd" / "dtd"
    listed = [f"kind{n % 8}/kind{n % 8}_{n}.jpg" for n in range(64)]
    for number, name in enumerate(listed):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(building.drawing(number))
    (folder / "labels").mkdir()
    (folder / "labels" / "test1.txt").write_text("\n".join(listed) + "\n")
    (tmp_path / "own.yaml").write_text("sets: {dtd: {sources: [{builder: dtd, at: .}]}}\n")
    theirs = clip_benchmark.evaluate(tmp_path, named, path, "dtd", root, "--batch_size", 24, "--no_amp")
    run_arf(
        *("evaluate", path, "--model", named, "--suite", tmp_path / "own.yaml", "--data-root", root),
        *("--out", tmp_path / "records.jsonl", "--batch-size", 24, "--workers", 2),
    )
    [record] = read_records(tmp_path / "records.jsonl")
    agrees(record["metrics"], theirs)
    assert record["images"] == 64
    assert len({theirs["acc1"], theirs["acc5"], 1 / 8}) == 3


def test_a_suite(clip, path, root, tmp_path, run_arf):
    out, summary = tmp_path / "records.jsonl", tmp_path / "summary.json"
    common = ["evaluate", path, "--model", clip, "--suite", tmp_path / "own.yaml", "--data-root", root]
    missing = run_arf(*common, check=False)
    assert missing.returncode == 1
    assert f"elsewhere: no {root}/elsewhere/test/nshards.txt and no {root}/elsewhere/" in missing.stderr
    assert "--skip-missing" in missing.stderr

    planned = run_arf(*common, "--dry-run", "--out", out)
    assert "has 58 images, a whole copy has 60" in planned.stdout
    assert "2 sets, 88 images, 1 checkpoints" in planned.stdout
    assert "0/1" in planned.stdout
    assert not out.exists()

    done = run_arf(*common, "--skip-missing", "--out", out, "--json", summary, "--workers", 1)
    assert "warning: the set 'seen'" in done.stderr
    assert "images/s" in done.stderr
    records = {record["set"]: record for record in read_records(out)}
    assert {name: record["headline"] for name, record in records.items()} == {
        "seen": "top1",
        "unseen": "mean_per_class",
    }
    assert {record["suite"] for record in records.values()} == {"own"}
    assert (records["seen"]["images"], records["seen"]["expected_images"]) == (58, 60)
    written = json.loads(summary.read_text())
    s, u = records["seen"]["metrics"]["top1"], records["unseen"]["metrics"]["mean_per_class"]
    assert written["averages"][str(path)] == pytest.approx({"S": s, "U": u, "H": 2 * s * u / (s + u)})
    assert written["samples"] == {"seen": 58, "unseen": 30}
    assert "unseen (per class)" in done.stdout

    before = out.read_bytes()
    again = run_arf(*common, "--skip-missing", "--out", out)
    assert out.read_bytes() == before
    assert again.stdout == done.stdout
    assert "images/s" not in again.stderr  # nothing was measured
    assert "1/1" in run_arf(*common, "--dry-run", "--out", out).stdout


def test_own_folders_and_a_mixture(clip, path, tmp_path, run_arf):
    """What the quickstart reads."""
    write_set(tmp_path / "sets" / "id")
    write_set(tmp_path / "sets" / "shift" / "a")
    other = save_checkpoint(clip, tmp_path / "b.pt", 2)
    done = run_arf(
        *("evaluate", path, other, "--wise", 0.5, "--model", clip, "--data", tmp_path / "sets"),
        *("--json", tmp_path / "out.json", "--workers", 0),
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written["accuracy"]) == {str(path), str(other), f"{other}+wise"}
    assert written["samples"] == {"id": 18, "shift/a": 18}
    assert all(set(sets) == {"id", "shift/a"} for sets in written["accuracy"].values())
    assert "[3]" in done.stdout


def torchrun(*argv: object) -> subprocess.CompletedProcess:
    """Two processes of the command; what both print is in one place."""
    done = forks.run("arf_plugin.cli.main", *argv, nproc=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_two_processes_give_the_figures_of_one(clip, path, tmp_path, run_arf):
    write_set(tmp_path / "sets" / "many", images=70, shards=2)
    write_set(tmp_path / "sets" / "one-batch", images=6, shards=1)
    other = save_checkpoint(clip, tmp_path / "b.pt", 2)
    common = ["evaluate", path, other, "--wise", 0.5, "--model", clip, "--data", tmp_path / "sets"]
    common += ["--batch-size", 8, "--workers", 1, "--device", "cpu"]
    one = run_arf(*common, "--out", tmp_path / "one.jsonl")
    two = torchrun(*common, "--out", tmp_path / "two.jsonl")

    def timeless(name: str) -> list[dict]:
        return [{**record, "time": None} for record in read_records(tmp_path / name)]

    assert timeless("one.jsonl") == timeless("two.jsonl")
    # Seven batches of two processes, and which image was right is in the set's order all the same.
    many = [record for record in timeless("two.jsonl") if record["set"] == "many"]
    assert all(0 < right_images(record).sum() < 70 for record in many)
    assert len(timeless("two.jsonl")) == 6
    assert two.stdout == one.stdout  # one table, from the first process
    before = (tmp_path / "two.jsonl").read_bytes()
    assert torchrun(*common, "--out", tmp_path / "two.jsonl").stdout == one.stdout
    assert (tmp_path / "two.jsonl").read_bytes() == before


def test_two_arms_compared_by_image(clip, tmp_path, run_arf):
    """Three seeds each on two sets, measured and compared; compared again from the file; with damaged bits."""
    for name, images in (("id", 60), ("shift/a", 36)):
        write_set(tmp_path / "sets" / name, images=images)
    paths = []
    for seed in range(3):
        for arm in ("flyp", "arf"):
            (tmp_path / f"{arm}-{seed}").mkdir()
            paths.append(save_checkpoint(clip, tmp_path / f"{arm}-{seed}" / "w.pt", 10 * seed + len(arm)))
    out, summary = tmp_path / "results.jsonl", tmp_path / "summary.json"
    measured = run_arf(
        *("evaluate", *paths, "--model", clip, "--data", tmp_path / "sets", "--workers", 0),
        *("--out", out, "--json", summary, "--compare", "flyp", "arf"),
    )
    compared = json.loads(summary.read_text())["compare"]
    assert set(compared["sets"]) == {"id", "shift/a", "mean"} and compared["averages"] == {}
    by_arm = {
        arm: [
            100 * right_images(r).mean()
            for r in read_records(out)
            if arm in r["checkpoint"] and r["set"] == "id"
        ]
        for arm in ("flyp-", "arf-")
    }
    found = compared["sets"]["id"]
    assert (found["images"], found["seeds"]) == (60, 3)
    assert found["difference"] == pytest.approx((sum(by_arm["arf-"]) - sum(by_arm["flyp-"])) / 3, abs=1e-3)
    assert compared["sets"]["mean"]["difference"] == pytest.approx(
        (found["difference"] + compared["sets"]["shift/a"]["difference"]) / 2, abs=1e-3
    )
    assert "top-1 in percent, paired by image, 3 runs each" in measured.stdout

    again = run_arf("evaluate", "--compare", "flyp", "arf", "--among", out, "--json", summary)
    assert measured.stdout.endswith(again.stdout)
    assert json.loads(summary.read_text()) == {"compare": compared}
    back = run_arf("evaluate", "--compare", "arf", "flyp", "--out", out, "--json", summary)
    assert json.loads(summary.read_text())["compare"]["sets"]["id"]["difference"] == -found["difference"]
    assert "before: arf; after: flyp" in back.stdout

    # A file per arm; of the first, an earlier version's records on one set.
    for arm in ("flyp", "arf"):
        records = [r for r in read_records(out) if f"{arm}-" in r["checkpoint"]]
        for record in records:
            if (arm, record["set"]) == ("flyp", "id"):
                del record["right"]
            append_record(tmp_path / f"{arm}.jsonl", record)
    apart = run_arf("evaluate", "--compare", tmp_path / "flyp.jsonl", tmp_path / "arf.jsonl")
    assert "not compared: id: a record does not say which images were right" in apart.stdout
    assert re.search(r"^shift/a +36 ", apart.stdout, re.MULTILINE)

    out.write_text(out.read_text().replace('"right": "', '"right": "AAAA', 1))
    broken = run_arf("evaluate", "--compare", "flyp", "arf", "--among", out, check=False)
    assert broken.returncode == 1 and "results.jsonl, line 1: 'right' has" in broken.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "a.pt"], "--model is needed to measure"),
        (["evaluate", "a.pt", "--compare", "a", "b"], "--model is needed to measure"),
        (["evaluate", "--compare", "a", "b"], "expected two files of records"),
        (["evaluate", "--compare", "a", "b", "--among", "none.jsonl"], "none.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_named(argv, message, run_arf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_arf(*argv, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "imagenet", "--data-root", "."], "There is no suite 'imagenet'"),
        (["--suite", "emojinet"], "needs --data-root"),
        ([], "Name either a suite"),
        (["--data", "none"], "There is no folder none"),
        (
            ["--suite", "emojinet", "--data-root", ".", "--sets", "shifts/*"],
            "'shifts/*' is no set of the suite",
        ),
    ],
)
def test_wrong_arguments_are_named(clip, path, argv, message, run_arf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_arf("evaluate", path, "--model", clip, *argv, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_has_examples(run_arf):
    shown = run_arf("evaluate", "--help").stdout
    assert "--suite imagenet-shifts" in shown
    assert "torchrun --nproc_per_node" in shown
