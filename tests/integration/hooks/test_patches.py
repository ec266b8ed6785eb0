"""The source patches: they apply and revert, do what the hooks do, and mend the upstream bugs that they name."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
from pathlib import Path

import open_clip_train
import pytest
import torch
from support.environments import make_environment
from support.trainer import SHIM

from arf_plugin.hooks.source_patches import Series, releases
from arf_plugin.hooks.table import HOOKS

ROOT = Path(__file__).parents[3]
INSTALLED = importlib.metadata.version("open_clip_torch")
SOURCES = {
    INSTALLED: Path(open_clip_train.__file__).parents[1],
    "2.32.0": ROOT / ".venvs" / "open_clip_torch-2.32.0",
}
NEWER_WEBDATASET = ROOT / ".venvs" / "webdataset-1.0.2"


@pytest.fixture
def sources(tmp_path):
    """Copies a release's sources, as a fork would have them."""

    def copy(release: str = INSTALLED) -> Path:
        folder = tmp_path / f"fork-{release}"
        for package in ("open_clip", "open_clip_train"):
            shutil.copytree(
                SOURCES[release] / package, folder / package, ignore=shutil.ignore_patterns("*.pyc")
            )
        return folder

    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


@pytest.mark.parametrize(("series", "inside_a_repository"), [("arf", True), ("upstream", False)])
@pytest.mark.parametrize("release", SOURCES)
def test_apply_check_revert(run_arf, sources, release, series, inside_a_repository):
    folder = sources(release)
    if inside_a_repository:
        subprocess.run(["git", "init", "-q", folder.parent], check=True)
    before = contents(folder)
    command = [folder, "--series", series]
    assert "applies" in run_arf("patch", "check", *command).stdout
    assert contents(folder) == before
    run_arf("patch", "apply", *command)
    assert contents(folder) != before
    found = json.loads(run_arf("patch", "check", *command, "--json").stdout)
    assert found["state"] == "applied" and found["release"] == release
    again = run_arf("patch", "apply", *command, check=False)
    assert again.returncode == 1 and "applied already" in again.stderr
    run_arf("patch", "revert", *command)
    assert contents(folder) == before
    again = run_arf("patch", "revert", *command, check=False)
    assert again.returncode == 1 and "not applied already" in again.stderr


def test_both_series_go_together(run_arf, sources):
    folder = sources()
    for series in ("arf", "upstream"):
        run_arf("patch", "apply", folder, "--series", series)
    assert Series("arf", INSTALLED).state(folder) == Series("upstream", INSTALLED).state(folder) == "applied"


def test_changed_sources_are_refused_and_left_as_they_are(run_arf, sources):
    folder = sources()
    main = folder / "open_clip_train" / "main.py"
    main.write_text(main.read_text().replace("loss = create_loss(args)", "loss = my_loss(args)"))
    before = contents(folder)
    done = run_arf("patch", "apply", folder, check=False)
    assert (
        done.returncode == 1 and "open_clip_train/main.py" in done.stderr and "Traceback" not in done.stderr
    )
    assert contents(folder) == before
    assert run_arf("patch", "check", folder, check=False).returncode == 1


@pytest.mark.parametrize("problem", ["no trainer", "no version", "unknown release"])
def test_wrong_folders(run_arf, sources, tmp_path, problem):
    folder, flags = sources(), []
    if problem == "no trainer":
        folder, flags = tmp_path, ["--release", INSTALLED]
    elif problem == "no version":
        (folder / "open_clip" / "version.py").unlink()
    else:
        flags = ["--release", "1.0.0"]
    expected = {"no trainer": "expected the one that holds it", "no version": "Name it with --release"}
    done = run_arf("patch", "check", folder, *flags, check=False)
    assert done.returncode == 1 and expected.get(problem, "there are for: 2.") in done.stderr


def hostile_repository(folder: Path, spy: Path) -> dict[str, str]:
    """Makes a repository of a fork in which everything that git can be told to run tells on itself.

    Returns:
        Environment variables of a user whose own configuration does the same.
    """
    command = f"sh -c 'echo \"$0 $*\" >> {spy}; cat' "
    settings = {
        "core.fsmonitor": command + "fsmonitor",
        "core.attributesFile": str(folder / "attributes"),
        "filter.spy.clean": command + "clean",
        "filter.spy.smudge": command + "smudge",
        "filter.spy.process": command + "process",
        "filter.spy.required": "true",
        "diff.spy.textconv": command + "textconv",
        "merge.spy.driver": command + "merge",
        "include.path": str(folder / "more"),
    }
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "-q"], check=True)
    for name, value in settings.items():
        subprocess.run([*git, "config", name, value], check=True)
    (folder / "more").write_text(f"[core]\n\thooksPath = {folder / 'hooks'}\n")
    (folder / "hooks").mkdir()
    for hook in (
        "post-index-change",
        "post-checkout",
        "applypatch-msg",
        "pre-applypatch",
        "reference-transaction",
    ):
        for place in (folder / "hooks" / hook, folder / ".git" / "hooks" / hook):
            place.write_text(f"#!/bin/sh\necho {hook} >> {spy}\n")
            place.chmod(0o755)
    for place in (folder, *folder.rglob("open_clip_train")):
        (place / ".gitattributes").write_text("* filter=spy diff=spy merge=spy eol=crlf ident\n")
    (folder / "attributes").write_text("* filter=spy\n")
    (folder / ".git" / "info").mkdir(exist_ok=True)
    (folder / ".git" / "info" / "attributes").write_text("* filter=spy\n")
    (folder / "own").write_text((folder / ".git" / "config").read_text())
    own = {
        "GIT_CONFIG_GLOBAL": str(folder / "own"),
        "GIT_DIR": str(folder / ".git"),
        "GIT_WORK_TREE": str(folder),
    }
    own |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "filter.spy.clean"}
    return own | {"GIT_CONFIG_VALUE_0": command + "own", "GIT_EXTERNAL_DIFF": command + "external"}


@pytest.mark.parametrize("place", ["sources", "above"])
def test_nothing_that_a_repository_brings_is_run(run_arf, sources, tmp_path, monkeypatch, place):
    """Filters, hooks and monitors of the fork's repository, of one above it, and of the environment."""
    folder, spy = sources(), tmp_path / "ran"
    environment = {**os.environ, **hostile_repository(folder if place == "sources" else tmp_path, spy)}
    if place == "above":
        environment["TMPDIR"] = str(tmp_path)  # git's own scratch folder lies in that repository, too
    # The trap is real: git itself falls into it.
    git = ["git", "hash-object", "open_clip_train/main.py"]
    subprocess.run(git, cwd=folder, env=environment, check=False, capture_output=True)
    assert spy.exists()
    spy.unlink()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for action in ("check", "apply", "check", "revert"):
        run_arf("patch", action, folder)
    assert not spy.exists(), spy.read_text()
    plain = SOURCES[INSTALLED] / "open_clip_train" / "main.py"
    assert (folder / "open_clip_train" / "main.py").read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("link", ["file", "folder"])
def test_links_are_not_followed(run_arf, sources, tmp_path, link):
    folder = sources()
    inside = folder / "open_clip_train" / ("main.py" if link == "file" else "")
    outside = tmp_path / "elsewhere"
    inside.rename(outside)
    inside.symlink_to(outside)
    main = outside if link == "file" else outside / "main.py"
    before = main.read_bytes()
    for action in ("check", "apply"):
        done = run_arf("patch", action, folder, check=False)
        assert done.returncode == 1 and "is a link" in done.stderr and "Traceback" not in done.stderr
    assert main.read_bytes() == before


def test_a_name_that_needs_quoting(run_arf, sources, tmp_path):
    folder = sources().rename(tmp_path / "a fork\n[1] 'of' \udce4 -x")
    run_arf("patch", "apply", folder)
    assert Series("arf", INSTALLED).state(folder) == "applied"


@pytest.mark.parametrize("problem", ["pipe", "latin-1", "huge", "path", "control", "source is a pipe"])
def test_odd_sources_are_refused_in_one_sentence(run_arf, sources, problem):
    folder = sources()
    version = folder / "open_clip" / "version.py"
    if problem in ("pipe", "source is a pipe"):
        version = version if problem == "pipe" else folder / "open_clip_train" / "main.py"
        version.unlink()
        os.mkfifo(version)
    else:
        content = {
            "latin-1": b"# caf\xe9\n",
            "huge": b"#" * (17 << 20),
            "path": b"__version__ = '../../fork'",
        }
        version.write_bytes(content.get(problem, b"__version__ = '3.3.0\x1b[31m'"))
    done = run_arf("patch", "check", folder, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_every_hook_is_in_the_patches():
    """A hook of the table that no patch knows would leave forks without it."""
    for release in releases():
        text = "".join(path.read_text() for path in Series("arf", release).paths)
        for hook in HOOKS:
            if hook.covers(release) and hook.when not in ("start-up", "parsing"):
                assert f'arf.hook("{hook.id}"' in text, (release, hook.id)
        assert f'release="{release}"' in text and "arf.add_flags(parser)" in text


def test_one_patched_line_calls_what_one_hook_installs(train, sources, task, anchors, run_arf):
    """In the environment of the tests the start-up file is active as well: nothing is applied twice."""
    folder = sources()
    run_arf("patch", "apply", folder)
    flags = [*task.flags, "--arf-anchors", anchors]
    run = train.forked(*flags, "--arf-freeze-bn", open_clip=folder)
    assert run.output.count("ARF is on") == 1 and run.output.count("Caption_anchor_loss") > 0
    assert "[64/64(100%)]" in run.output.replace(" ", "")


def test_a_patched_run_equals_one_with_hooks_to_the_bit(train, sources, task, anchors, run_arf, tmp_path):
    """Through both data streams, the losses, a stop in the middle of an epoch, and going on from there."""
    folder = sources()
    run_arf("patch", "apply", folder)
    flags = [*task.flags, "--arf-anchors", anchors]
    flags += ["--arf-deterministic", "--arf-stop-file", tmp_path / "stop"]
    hooked = train.forked(*flags, name="hooked")
    (tmp_path / "stop").touch()
    train.forked(*flags, name="patched", open_clip=folder)
    assert [path.name for path in (train.logs / "patched" / "checkpoints").iterdir()] == ["epoch_0_step_1.pt"]
    patched = train.forked(*flags, "--resume", "latest", name="patched", open_clip=folder)
    assert "goes on after 1 of 4 batches" in patched.output
    for name, weight in hooked.checkpoint["state_dict"].items():
        assert torch.equal(weight, patched.checkpoint["state_dict"][name]), name


@pytest.mark.parametrize(
    "flags",
    [pytest.param((), marks=pytest.mark.slow), ("--arf-anchors",)],
    ids=["without flags", "with flags"],
)
def test_without_the_start_up_file(train, sources, task, anchors, run_arf, tmp_path, flags):
    """As in a fork that never runs stock open_clip."""
    folder = sources()
    run_arf("patch", "apply", folder)
    python = str(make_environment(tmp_path / "env"))
    argv = [*flags, *([anchors] if flags else []), *task.flags]
    run = train(*argv, torchrun=False, python=python, env={"PYTHONPATH": f"{SHIM}:{folder}:{ROOT}"})
    assert ("ARF is on" in run.output) == bool(flags) and ("Pair_anchor_loss" in run.output) == bool(flags)
    params = (run.folder / "params.txt").read_text()
    assert ("arf_anchors" in params) == bool(flags)


def test_errors_are_as_clear_as_with_hooks(train, sources, task, run_arf, tmp_path):
    folder = sources()
    run_arf("patch", "apply", folder)
    run = train.forked(
        "--train-data", task.urls, "--arf-anchors", tmp_path / "nowhere", open_clip=folder, check=False
    )
    assert run.status != 0 and "nowhere" in run.output and "does not exist" in run.output


def test_two_processes_on_the_cpu(train, sources, task, run_arf):
    """Upstream's bug, and its mend; the shim that mends it in other tests is off."""
    folder = sources()
    flags = task.flags
    off = {"ARF_TEST_DDP_CPU": ""}
    broken = train.forked(*flags, nproc=2, env=off, open_clip=folder, check=False)
    assert broken.status != 0 and "device_ids" in broken.output
    run_arf("patch", "apply", folder, "--series", "upstream")
    assert "[32/32(100%)]" in train.forked(
        *flags, nproc=2, env=off, open_clip=folder, name="mended"
    ).output.replace(" ", "")


def test_newer_webdataset(train, sources, task, run_arf):
    assert NEWER_WEBDATASET.is_dir(), f"{NEWER_WEBDATASET} is missing: run scripts/test.sh"
    folder = sources()
    flags = task.flags
    both = {"PYTHONPATH": f"{SHIM}:{folder}:{NEWER_WEBDATASET}"}
    broken = train.forked(*flags, env=both, check=False)
    assert broken.status != 0 and "KeyError: 'fname'" in broken.output
    run_arf("patch", "apply", folder, "--series", "upstream")
    assert "[32/32(100%)]" in train.forked(*flags, env=both, name="mended").output.replace(" ", "")
