"""Every hook of the table against the installed open_clip, generated from the table itself."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from arf_plugin.config import ArfConfig
from arf_plugin.errors import IncompatibleUpstreamError
from arf_plugin.hooks.activation import hooks_of_run
from arf_plugin.hooks.engine import Engine
from arf_plugin.hooks.releases import PACKAGE, RELEASES, REQUIREMENT, SUPPORTED
from arf_plugin.hooks.table import HOOKS, hooks, unsupported, upstream_version

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.id)
def test_hook_fits_the_installed_release_or_refuses_it(hook):
    problem = Engine(PACKAGE).check(hook, upstream_version())
    assert (problem is None) == hook.covers(upstream_version()), problem


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.id)
def test_the_sources_say_of_a_hook_what_importing_them_says(hook):
    engine, version = Engine(PACKAGE), upstream_version()
    assert engine.check(hook, version, imports=False) == engine.check(hook, version)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "open_clip_train.nowhere:main"}, "module open_clip_train.nowhere is not installed"),
        ({"target": "open_clip_train.main:nothing"}, "module open_clip_train.main has no 'nothing'"),
        ({"origin": "open_clip:create_model"}, "upstream's own open_clip:create_model"),
        ({"origin": "builtins:print"}, "upstream's own builtins:print"),
    ],
)
def test_the_sources_show_a_hook_that_does_not_fit(changes, said):
    (hook,) = (hook for hook in HOOKS if hook.id == "create-model")
    problem = Engine(PACKAGE).check(replace(hook, **changes), upstream_version(), imports=False)
    assert problem is not None and said in problem


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.version)
def test_every_release_has_one_hook_for_each_name(release):
    """Nothing that is hooked in one release is forgotten in another; the loss has two homes."""
    phases = ("start-up", "parsing", "run")
    chosen = [hook for phase in phases for hook in hooks(phase, release.version)]
    homes = [hook.target.replace("create_task", "create_loss") for hook in chosen]
    everywhere = {
        hook.target.replace("create_task", "create_loss") for hook in HOOKS if hook.when in phases
    }  # the other phases are of flags that some releases refuse
    assert sorted(homes) == sorted(everywhere)


def test_declared_ranges_tested_releases_and_the_requirement_agree():
    for release in RELEASES:
        assert unsupported(release.version) is None
        assert Requirement(REQUIREMENT).specifier.contains(release.version, prereleases=True)
        if not release.commit:
            assert release.requirement == f"{PACKAGE}=={release.version}"
    for versions in SUPPORTED:  # no range without a test, and none whose lower bound is untested
        tested = [
            release.version for release in RELEASES if SpecifierSet(versions).contains(release.version, True)
        ]
        bounds = [part.version for part in SpecifierSet(versions) if part.operator in (">=", "==")]
        assert tested and set(bounds) <= set(tested)
    for version in ("2.26.0", "3.4.0", "4.1.0", "4.2.0", "4.2.0.dev1", "4.3.0"):
        assert unsupported(version) is not None


@pytest.mark.process
def test_setup_requires_what_is_declared(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    required = (tmp_path / "arf_plugin.egg-info" / "requires.txt").read_text().splitlines()
    (open_clip,) = (Requirement(line) for line in required if line.startswith(PACKAGE))
    assert open_clip == Requirement(REQUIREMENT)


@pytest.mark.parametrize("name", ["setup.py", "noxfile.py", "scripts/test.sh", "scripts/tables.py"])
def test_no_second_list_of_releases(name):
    """These read hooks/releases.py; none names a release of its own."""
    text = (ROOT / name).read_text()
    assert not re.findall(
        rf"{PACKAGE}\W*\d|\b[234]\.\d+\.\d+\.dev|\b(?:2\.26|2\.29|2\.32|3\.0|3\.3)\.\d", text
    )


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.id)
def test_wrapper_exists_and_takes_the_original(hook):
    module, name = hook.wrapper.split(":")
    wrapper = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(wrapper).parameters.values()
    assert sum(one.default is one.empty for one in parameters) == (1 if hook.when == "start-up" else 2)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.id)
@pytest.mark.parametrize("version", ["2.24.0", "2.26.0", "3.4.0", "4.0.0", "4.2.0"])
def test_hook_refuses_other_releases(hook, version):
    problem = Engine(PACKAGE).check(hook, version)
    assert problem is not None and f"{PACKAGE} {version} is installed" in problem and hook.versions in problem


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.version)
@pytest.mark.parametrize("resumes", [False, True])
def test_every_release_has_its_hooks_of_a_run(release, resumes):
    """Step checkpoints are known to runs that make them and to runs that resume, which may be from one."""
    chosen = {hook.when for hook in hooks_of_run(ArfConfig(), resumes, release.version)}
    assert chosen == ({"run", "resumable run"} if resumes else {"run"})
    chosen = {hook.when for hook in hooks_of_run(ArfConfig(deterministic=True), resumes, release.version)}
    assert chosen == {"run", "resumable run"}


def test_a_phase_without_a_hook_for_the_release_is_refused():
    with pytest.raises(
        IncompatibleUpstreamError, match=r"phase 'run' was written for open_clip_torch 3\.4\.0"
    ):
        hooks("run", "3.4.0")
    with pytest.raises(IncompatibleUpstreamError, match="no hook of the phase 'runn'"):
        hooks("runn", "3.3.0")


def test_ids_are_unique():
    assert len({hook.id for hook in HOOKS}) == len(HOOKS)
