"""The start-up file and the hooks, in real processes of real environments."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support import data, forks, releases
from support.environments import copy_project, make_environment, pip

from arf_plugin.hooks.table import trains_tasks

ROOT = Path(__file__).parents[3]
OBJECTIVE = "create_task" if trains_tasks(releases.current()) else "create_loss"


def hooks_active(python: Path) -> bool:
    """Whether a new process of an environment has the finder."""
    code = "import sys; print('arf_plugin._boot' in sys.modules and sys.modules['arf_plugin._boot'].is_installed())"
    return (
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "True"
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the project, so that building it leaves the checkout alone."""
    return copy_project(tmp_path_factory.mktemp("copy") / "source")


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_install_activates_and_uninstall_removes(tmp_path, source, editable):
    python = make_environment(tmp_path / "env")
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    assert not hooks_active(python)
    pip(python, "install", "--no-deps", "--no-build-isolation", *(["-e"] if editable else []), str(source))
    assert hooks_active(python)
    assert {path.name for path in packages.glob("arf_plugin.*")} == {"arf_plugin.pth", "arf_plugin.start"}
    where = subprocess.run(
        [python, "-c", "import arf_plugin; print(arf_plugin.__file__)"], capture_output=True, text=True
    )
    assert str(source if editable else packages) in where.stdout
    shown = subprocess.run(
        [tmp_path / "env/bin/arf", "--version"], capture_output=True, text=True, check=True
    )
    assert "arf-plugin" in shown.stdout
    # The source patches come along: those for a release, asked of a folder that has no sources.
    asked = subprocess.run(
        [tmp_path / "env/bin/arf", "patch", "check", tmp_path, "--release", "3.3.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "expected the one that holds it" in asked.stderr, asked.stderr
    pip(python, "uninstall", "-y", "arf-plugin")
    assert not list(packages.glob("*arf*")) and not hooks_active(python)


def test_start_up_imports_next_to_nothing():
    watched = "('torch', 'arf_plugin', 'typing', 'importlib.metadata')"
    code = f"import sys; print([name for name in sorted(sys.modules) if name.split('.')[0] in {watched}])"
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(plain.stdout.replace("'", '"')) == ["arf_plugin", "arf_plugin._boot"]


@pytest.fixture(scope="module")
def csv_task(tmp_path_factory) -> Path:
    """Task data as CSV, whose order depends on torch's seed alone (WebDataset's shuffle does not)."""
    return data.write_csv_task(tmp_path_factory.mktemp("csv"), 16)


def test_run_without_flags_is_bit_equal_to_one_without_the_plugin(tmp_path, train, csv_task):
    without = make_environment(tmp_path / "env")
    assert hooks_active(Path(sys.executable)) and not hooks_active(without)
    runs = [
        train("--train-data", csv_task, name=name, python=str(python), torchrun=False)
        for name, python in (("with", sys.executable), ("without", without))
    ]
    first, second = (run.checkpoint for run in runs)
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, weight in first["state_dict"].items():
        assert torch.equal(weight, second["state_dict"][name]), name
    assert "ARF" not in runs[0].output


def trainer_output(
    *flags: object, path: Path | None = None, check: bool = False
) -> subprocess.CompletedProcess:
    """The trainer, with a folder of other packages in front of the environment's."""
    env = {"PYTHONPATH": releases.path(path)} if path is not None else {}
    done = forks.run("open_clip_train.main", *flags, env=env)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_help_shows_the_group():
    shown = trainer_output("--help", check=True).stdout
    assert "Anchor-based Robust Fine-tuning (arf-plugin)" in shown
    flags = set(re.findall(r"--arf-[a-z-]+", shown))
    assert flags >= {
        *(
            "--arf-anchors",
            "--arf-caption-weight",
            "--arf-pair-weight",
            "--arf-pair-batch-size",
            "--arf-workers",
        ),
        *("--arf-missing-caption", "--arf-classnames", "--arf-templates", "--arf-freeze-bn"),
    }


def test_arf_train_shows_the_same_help(run_arf):
    assert "  --arf-anchors PATH" in run_arf("train", "--help").stdout


@pytest.mark.parametrize("version", ["2.26.0", "9.9.9"])
def test_unknown_release_is_refused(tmp_path, task, anchors, version):
    metadata = tmp_path / f"open_clip_torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: open_clip_torch\nVersion: {version}\n")
    done = trainer_output("--train-data", task.urls, "--arf-anchors", anchors, path=tmp_path)
    assert done.returncode != 0
    assert f"open_clip_torch {version} is installed" in done.stderr and "tested: 2.26.1" in done.stderr
    assert "arf doctor" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"tokenizer, {OBJECTIVE}", f"tokenizer, {OBJECTIVE} as make", f"has no '{OBJECTIVE}'"),
        (
            "def random_seed",
            "def get_data(*a, **k): ...\n\n\ndef random_seed",
            "upstream's own open_clip_train.data:get_data",
        ),
    ],
    ids=["missing", "replaced"],
)
def test_a_trainer_that_does_not_fit_is_refused(tmp_path, task, anchors, old, new, message):
    shutil.copytree(Path(find_spec("open_clip_train").origin).parent, tmp_path / "open_clip_train")
    main = tmp_path / "open_clip_train" / "main.py"
    assert old in main.read_text()
    main.write_text(main.read_text().replace(old, new, 1))
    done = trainer_output(
        "--model", "ViT-B-32", "--train-data", task.urls, "--arf-anchors", anchors, path=tmp_path
    )
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "Train Epoch" not in done.stderr and "Traceback" not in done.stderr


def test_hooks_can_be_undone_and_applied_again(tmp_path):
    """In one process: parsing with flags applies every row of the run, parsing without restores what was there."""
    code = """
import open_clip_train.main as main, open_clip_train.data as data
from arf_plugin.hooks.activation import ENGINE
from arf_plugin.hooks.table import hooks
from arf_plugin.hooks.table import upstream_version
names = [hook.target.split(":")[1] for hook in hooks("run", upstream_version())]
before = [getattr(main, name) for name in names]
for _ in range(2):
    args = main.parse_args(["--train-data", "x.tar", "--arf-freeze-bn"])
    assert args.arf_freeze_bn and args.arf_caption_weight == 1.0
    assert ENGINE.applied == [hook.id for hook in hooks("run", upstream_version())] and len(names) == 4
    assert not any(getattr(main, name) is old for name, old in zip(names, before))
    args = main.parse_args(["--train-data", "x.tar"])
    assert not hasattr(args, "arf_freeze_bn")
    assert all(getattr(main, name) is old for name, old in zip(names, before))
assert main.get_data is data.get_data
print("restored")
"""
    (tmp_path / "x.tar").touch()
    (tmp_path / "program.py").write_text(code.replace("x.tar", str(tmp_path / "x.tar")))
    done = forks.run(str(tmp_path / "program.py"))
    assert done.stdout.strip() == "restored", done.stderr


def test_doctor_reports_every_hook(run_arf):
    from arf_plugin.hooks.table import HOOKS, upstream_version

    found = json.loads(run_arf("doctor", "--json").stdout)
    assert found["ok"] and found["startup"]["active"]
    assert [hook["id"] for hook in found["hooks"]] == [
        hook.id for hook in HOOKS if hook.covers(upstream_version())
    ]
    assert all(hook["applies"] for hook in found["hooks"])
    assert {"torch", "open_clip_torch", "webdataset"} <= found["versions"].keys()


def test_doctor_says_when_the_start_up_file_is_not_active(tmp_path):
    python = make_environment(tmp_path / "env")
    environment = {**os.environ, "PYTHONPATH": releases.path(ROOT)}
    command = [python, "-m", "arf_plugin.cli.main", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and "NOT ACTIVE" in done.stdout and "arf train" in done.stdout
