"""`arf fit` from a folder of images to a model: end to end, stopped at every stage, with the same bytes."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import building, forks

import arf_plugin

STAGES = ("data", "anchors", "check", "train", "choose", "report")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Images of three classes in mixed forms, one broken and one class nested; a pool, a tiny CLIP, a captioner."""
    root = tmp_path_factory.mktemp("fit")
    for n in range(310):
        kind, suffix = (("JPEG", ".JPG"), ("PNG", ".png"))[n // 3 % 2]
        folder = root / "my images" / building.SHAPES[n % 3]
        path = (folder / "from the phone" if n % 3 == 1 else folder) / f"{n}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(building.drawing(n, kind))
    (root / "my images" / "circle" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    building.write_pool(root / "pool", per_shard=500)
    building.save_tiny_clip(root / "clip")
    building.save_tiny_captioner(root / "captioner")
    return root


def command(inputs: Path, out: Path) -> list[str]:
    words = ["fit", str(inputs / "my images"), "--model", f"local-dir:{inputs / 'clip'}", "--out", str(out)]
    words += ["--pool", str(inputs / "pool"), "--captioner", str(inputs / "captioner"), "--preset", "paper"]
    return [*words, "--set", "epochs=2", "--set", "arf-checkpoint-every=1"]


arf = functools.partial(forks.run, "arf_plugin.cli.main")


def made(out: Path) -> dict[str, bytes]:
    """What a fit leaves for its user, apart from names of folders and times."""
    found = {name: (out / name).read_bytes() for name in ("best.pt", "best/open_clip_model.safetensors")}
    found |= {p.name: p.read_bytes() for p in sorted((out / "task" / "train").glob("*.tar"))}
    results = json.loads((out / "results.json").read_text())
    return {
        **found,
        "results": json.dumps([results["rows"], results["alpha"], results["retrieval"]]).encode(),
    }


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "fit"
    done = arf(*command(inputs, out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done


def test_a_fit_ends_with_a_model_and_what_it_has_kept(inputs, whole):
    out, done = whole
    found = json.loads((out / "results.json").read_text())
    assert list(found["rows"])[:2] == ["before", "paper"]
    assert {"own", "r@1", "r@5", "cka", "kept"} <= set(found["rows"]["before"])
    assert found["rows"]["before"]["cka"] == pytest.approx(1)
    assert (
        found["verdicts"]["paper"]["val"]["images"] == found["images"]["val"]
        and "95 % interval" in done.stdout
    )
    assert "broken.jpg" in (out / "rejected.tsv").read_text()
    assert re.search(
        r"about [\d.]+ minutes of computing \(embedding [\d.]+, training [\d.]+, eval", done.stderr
    )
    assert "each with its reason" in done.stderr and "a tenth of the" in done.stderr
    assert "On your own classes the model went from" in done.stdout
    assert "$ arf train" in (out / "log.txt").read_text()

    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out / 'best'}")
    assert sum(p.numel() for p in model.parameters()) > 0


def test_the_report_of_a_fit_says_whether_it_forgot(whole):
    out, _ = whole
    results, page = (
        json.loads((out / "results.json").read_text()),
        (out / "report" / "index.html").read_text(),
    )
    report = json.loads((out / "report" / "report.json").read_text())
    assert (report["reference"], report["missing"]) == ("before", {})
    chosen = list(results["rows"].values())[2 if results["alpha"] else 1]
    assert f"to {chosen['own']:.1f} % " in report["answer"]["sentence"]
    assert f"to {chosen['kept']:.1f} % " in report["answer"]["sentence"]
    assert report["answer"]["word"] in ("yes", "no", "perhaps") and "image-text retrieval" in page
    assert '<p class="class">circle</p>' in page  # of a card of the gallery


def test_the_same_command_has_nothing_left_to_do(inputs, whole):
    out, _ = whole
    before = made(out)
    again = arf(*command(inputs, out), "--json")
    assert json.loads(again.stdout)["rows"] == json.loads((out / "results.json").read_text())["rows"]
    assert made(out) == before
    other = arf(*command(inputs, out), "--val", 0.3)
    assert other.returncode == 1 and "another --val" in other.stderr


@pytest.mark.slow
def test_python_goes_on_with_what_the_command_has_made(inputs, whole):
    out, _ = whole
    words = command(inputs, out)
    given = {"pool": inputs / "pool", "captioner": inputs / "captioner", "preset": "paper", "out": out}
    own = {"epochs": 2, "arf-checkpoint-every": 1}
    found = arf_plugin.fit(words[1], words[3], **given, set={n: str(v) for n, v in own.items()}, quiet=True)
    assert found["rows"] == json.loads((out / "results.json").read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["recommended", "fast"])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no pool"])
def test_every_preset_trains(inputs, tmp_path, preset, pool):
    words = command(inputs, tmp_path / "fit")
    words[words.index("--preset") + 1] = preset
    if not pool:
        del words[words.index("--pool") : words.index("--preset")]
    done = arf(*words, "--json", "--baseline")
    assert done.returncode == 0, done.stderr
    assert {"before", preset, "flyp"} <= set(json.loads(done.stdout)["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_fit_that_was_stopped_ends_with_the_same_bytes(inputs, whole, tmp_path, stage, sign):
    out = tmp_path / "fit"
    process = subprocess.Popen(
        [sys.executable, "-m", "arf_plugin.cli.main", *command(inputs, out)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if f"] {stage}:" in line:
            time.sleep(1)
            break
    (os.killpg if sign == signal.SIGKILL else os.kill)(process.pid, sign)
    process.stderr.read()
    assert process.wait() in (-signal.SIGKILL, 130, 0)
    assert arf(*command(inputs, out)).returncode == 0
    assert made(out) == made(whole[0])


@pytest.mark.slow
def test_runs_side_by_side_that_were_interrupted_end_with_the_same_bytes(inputs, tmp_path):
    more = ["--seeds", "2", "--baseline", "--jobs", "2"]
    assert arf(*command(inputs, tmp_path / "whole"), *more).returncode == 0
    words = [*command(inputs, tmp_path / "fit"), *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "arf_plugin.cli.main", *words], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "] train:" in line:
            time.sleep(1)
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130 and "this goes on: arf fit --config" in said
    assert not (tmp_path / "fit" / "results.json").exists()
    assert arf(*words).returncode == 0
    assert made(tmp_path / "fit") == made(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "fit" / "runs").iterdir()} == {
        "paper-0", "paper-1", "flyp-0", "flyp-1"
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, says",
    [
        (["--model", "local-dir:nowhere"], "nowhere"),
        (["--model", "weights.pt"], "expected NAME@PRETRAINED"),
        (["--model", "ViT-B-61@openai"], "Did you mean 'ViT-B-16'"),
        (["--model", "ViT-B-16@opnai"], "Did you mean 'openai'"),
        (["--pool", "nowhere"], "--pool nowhere does not exist"),
        (["--captioner", "./nowhere"], "--captioner ./nowhere does not exist"),
        (["--keep", "nowhere"], "no folder nowhere"),
        (["--set", "bach-size=8"], "Did you mean '--batch-size'"),
        (["--set", "batch-size=1000", "--dry-run"], "Lower --set batch-size"),
        (["--set", "workers=99", "--dry-run"], "Lower --set workers"),
        (["--val", "nowhere"], "nowhere does not exist"),
        (["--templates", "nowhere"], "--templates nowhere"),
        (["--time", "soon"], "is no time"),
    ],
)
def test_mistakes_get_one_sentence(inputs, tmp_path, run_arf, change, says):
    words = [
        *("fit", inputs / "my images", "--model", f"local-dir:{inputs / 'clip'}"),
        *("--out", tmp_path / "x"),
        *change,
    ]
    done = run_arf(*words, check=False)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()
