"""scripts/gpu_check.py on a CPU, with sizes as small as can be: the script itself works, and says what it finds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def check(tmp_path: Path, *flags: object) -> tuple[subprocess.CompletedProcess, dict, str]:
    files = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command = [
        *(sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--json", files[0]),
        *("--markdown", files[1]),
        *flags,
    ]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, check=False)
    return done, json.loads(files[0].read_text()), files[1].read_text()


def test_one_check(tmp_path):
    done, content, markdown = check(tmp_path, "--only", "machine", "search")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(content["checks"]) == {"machine", "search"}
    search = content["checks"]["search"]
    assert (
        search["status"] == "passed"
        and all(bar["met"] for bar in search["bars"])
        and len(search["bars"]) >= 4
    )
    assert len(search["figures"]["seconds"]["exact_search"]) == 3
    assert content["machine"]["packages"]["torch"] and content["commit"]
    assert "| search | passed |" in markdown


def test_what_there_is_no_time_for_is_not_run(tmp_path):
    done, content, _ = check(tmp_path, "--only", "search", "--budget", 1)
    assert content["checks"]["search"]["status"] == "not run"
    assert "not run" in done.stdout


def test_a_check_that_runs_too_long_is_ended(tmp_path):
    """Two runs of the trainer take more than the budget on any machine."""
    done, content, _ = check(tmp_path, "--only", "waiting", "--budget", 9)
    assert content["checks"]["waiting"]["status"] in ("timeout", "error")
    assert done.returncode == 1


@pytest.fixture
def trainers(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu.trainers")


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (
            "INFO | workers: 2\narf-plugin: error: --arf-watch needs a library.\nInstall it.\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n",
            "arf-plugin: error: --arf-watch needs a library.",
        ),
        ("arf evaluate: error: no set\nmore\n", "arf evaluate: error: no set"),
        ("Traceback\n  raise\ntorch.OutOfMemoryError: CUDA\n", "torch.OutOfMemoryError: CUDA"),
        ("Killed\n", "it does not say why"),
    ],
)
def test_the_reason_of_a_failed_run(trainers, output, why):
    assert trainers.reason(output) == why


def test_what_evaluates_is_left_out_without_clip_benchmark(trainers, monkeypatch, tmp_path):
    context = trainers.Context("cpu", True, tmp_path, 1, 60)
    monkeypatch.setattr(trainers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(trainers.Skipped, match="clip-benchmark is not installed"):
        trainers.watch(context)


@pytest.mark.slow
def test_all_checks(tmp_path):
    done, content, markdown = check(tmp_path, "--budget", 2400)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = {name: row["status"] for name, row in content["checks"].items()}
    skipped = {"compile", "step-ViT-B-16-bf16", "step-ViT-B-16-fp32"}
    assert {name for name, verdict in verdicts.items() if verdict == "skipped"} == skipped
    assert all(verdict == "passed" for name, verdict in verdicts.items() if name not in skipped)
    without = skipped | {"machine", "step-ViT-B-32-bf16", "step-ViT-B-32-fp32", "loaders", "waiting"}
    assert all(row["bars"] for name, row in content["checks"].items() if name not in without)
    assert "| ARF, A = B, trimmed |" in markdown
