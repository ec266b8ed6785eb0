"""Runs open_clip's own tests with the plugin installed and without it, and compares the two reports test by test.

    python scripts/versions/install.py                           releases first
    python scripts/versions/upstream_tests.py                    every release that has not run yet
    python scripts/versions/upstream_tests.py --releases 3.3.0 --again
    python scripts/versions/upstream_tests.py --open-clip-git ~/open_clip    a clone, for tests that PyPI does not have
    python scripts/tables.py                                     puts the table into docs/versions.md

The tests are those of exactly that release: from its source archive on PyPI, or from its commit in git where it is
unreleased. The code is that of scripts/versions/install.py, and all libraries are the environment's own.

*With*: a fresh virtual environment into which pip has installed the plugin as a wheel, start-up file and all.
*Without*: another one, into which it has not: no `arf_plugin` can be imported, and no start-up file of it is run. Both
are checked before anything else. Each run has a fresh copy of the tests at the same place, so that messages with paths
can be compared.

A test is the same if its outcome (passed, failed, error, skipped) and the first line of its message are; addresses in
memory are left out. Tests see no model hub unless --online is given: those that need it fail at once, with and without.
A run in which a test takes more than --timeout seconds ends the script. Finished runs are kept in --work, with reports
and logs: started again, the script goes on where it was.

One test is run for some of its parameters only: test_inference_with_data makes every model that open_clip knows, up to
five billion parameters, and compares them with data that open_clip does not ship. Its own CI makes these data with
tests/util_test.py and picks models by OPEN_CLIP_TEST_REG_MODELS. So does this script: the data are made without the
plugin, the models are MODELS below, and the table says how many others are left out. SLOW below names the tests that
are left out for their time; --slow runs them, too. A conftest.py beside the tests skips them: both reports have them.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from sources import fetch_tests
from tqdm import tqdm

from arf_plugin.hooks.releases import PACKAGE, RELEASES, Release

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support import environments  # noqa: E402

RESULTS = ROOT / "docs" / "upstream-tests.json"
FOLDERS = ROOT / ".venvs"
PYTEST_TIMEOUT = "pytest-timeout==2.4.0"

# A ResNet, ViTs with and without QuickGELU, and timm's towers; what a laptop makes in seconds.
MODELS = ("RN50", "ViT-B-32", "ViT-B-32-quickgelu", "convnext_base", "vit_relpos_medium_patch16_cls_224")
# Two runs, as in open_clip's CI: the tests of the second switch torch to deterministic kernels for good.
MARKED = ("not regression_test", "regression_test")

SLOW = {
    "tests/test_training_simple.py::test_training": "left out: RN50 in half precision, over ten minutes on a processor"
}
CONFTEST = """import json, os, pytest

LEFT_OUT = json.loads(os.environ["LEFT_OUT"])

def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid in LEFT_OUT:
            item.add_marker(pytest.mark.skip(reason=LEFT_OUT[item.nodeid]))
"""

Outcomes = dict[str, list[str]]  # test -> outcome, first line of its message


class Bench(NamedTuple):
    """What the runs of one release share.

    Attributes:
        release: The release.
        work: Its folder.
        online: Whether tests may ask the model hub.
        slow: Whether tests of SLOW are run.
        timeout: Seconds for one test.
    """

    release: Release
    work: Path
    online: bool
    slow: bool
    timeout: int

    def run(self, log: Path, *argv: Any, models: Path | None = None, trusted: bool = False) -> int:
        """Runs a command beside the tests, on this release, with its output in a file; returns its status."""
        folder = FOLDERS / f"{PACKAGE}-{self.release.version}"
        path = [folder] if folder.is_dir() else []
        fixed = {
            "PYTHONPATH": os.pathsep.join(map(str, [*path, FOLDERS / PYTEST_TIMEOUT.replace("==", "-")])),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "OPEN_CLIP_TEST_REG_MODELS": str(models or self.work / "models.txt"),
            "LEFT_OUT": json.dumps({} if self.slow else SLOW),
            # Before 3.0 the tests load reference data, which are made here, as torch did by default up to 2.5.
            **({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"} if trusted else {}),
            **({} if self.online else {"HF_HUB_OFFLINE": "1"}),
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ARF_", "PYTEST_"))}
        with log.open("w") as out:
            done = subprocess.run(
                list(map(str, argv)),
                cwd=self.work / "run",
                env={**kept, **fixed},
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=7200,
                check=False,
            )
        return done.returncode


def make_environments(work: Path) -> dict[str, Path]:
    """Makes the two environments: name -> interpreter. Fails unless the plugin is in the first and only there."""
    shutil.rmtree(work, ignore_errors=True)
    pythons = {name: environments.make_environment(work / name) for name in ("with", "without")}
    project = environments.copy_project(work / "project")
    environments.pip(pythons["with"], "install", "--no-deps", "--no-build-isolation", str(project))
    code = (
        "import sys; from importlib.util import find_spec; "
        "print('arf_plugin._boot' in sys.modules, find_spec('arf_plugin') is not None)"
    )
    for name, expected in (("with", "True True"), ("without", "False False")):
        found = subprocess.check_output([pythons[name], "-c", code], text=True, cwd=work).strip()
        if found != expected:
            raise SystemExit(f"environment '{name}': start-up file and package are {found}, not {expected}")
    return pythons


def prepare(bench: Bench, git: str | None, python: Path) -> dict[str, Any]:
    """Fetches the tests and makes their reference data, once; counts the models that are left out."""
    done, log, folder = bench.work / "prepared.json", bench.work / "prepare.log", bench.work / "run"
    if done.is_file():
        return json.loads(done.read_text())
    source = fetch_tests(bench.release, git, folder)
    with (folder / "tests" / "conftest.py").open("x") as conftest:
        conftest.write(CONFTEST)
    lists = {"models": "\n".join(MODELS), "all": ""}
    code = "import open_clip; print(*open_clip.list_models(), sep='\\n')"
    if bench.run(log, python, "-c", code):
        raise SystemExit(f"open_clip cannot be imported; see {log}")
    lists["all"] = log.read_text()
    for name, models in lists.items():
        (bench.work / f"{name}.txt").write_text(models + "\n")
    collect = ("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", MARKED[1], "tests")
    counts = {}
    for name in lists:
        if bench.run(log, python, *collect, models=bench.work / f"{name}.txt"):
            raise SystemExit(f"the tests cannot be collected; see {log}")
        counts[name] = log.read_text().count("::")
    if bench.run(log, python, "tests/util_test.py", "--model_list", bench.work / "models.txt", trusted=True):
        raise SystemExit(f"the reference data cannot be made; see {log}")
    shutil.rmtree(bench.work / "tests", ignore_errors=True)
    folder.rename(bench.work / "tests")
    found = {"source": source, "left out": counts["all"] - counts["models"]}
    done.write_text(json.dumps(found))
    return found


def outcomes(bench: Bench, name: str, python: Path) -> Outcomes:
    """One run of all tests in one environment; what has run already is read."""
    found: Outcomes = {}
    for number, marked in enumerate(MARKED):
        report, log = (bench.work / f"{name}-{number}.{kind}" for kind in ("xml", "log"))
        if not report.is_file():
            shutil.rmtree(bench.work / "run", ignore_errors=True)
            shutil.copytree(bench.work / "tests", bench.work / "run")
            incomplete = report.with_suffix(".incomplete")
            pytest = (
                "-m",
                "pytest",
                "-v",
                "-p",
                "no:cacheprovider",
                "-m",
                marked,
                "--timeout",
                bench.timeout,
            )
            junit = ("--junitxml", incomplete, "--basetemp", bench.work / "tmp")
            status = bench.run(log, python, *pytest, *junit, "tests", trusted=marked == MARKED[1])
            if status not in (0, 1):  # pytest's own: all passed, some failed
                raise SystemExit(f"pytest ended with status {status}; see {log}")
            if "from pytest-timeout" in incomplete.read_text(encoding="utf-8"):
                raise SystemExit(
                    f"a test took more than {bench.timeout} s (--timeout); see {log}, and run again"
                )
            incomplete.rename(report)
        found.update(read_report(report, {str(python.parents[1]): "ENVIRONMENT"}))
    return found


def read_report(report: Path, names: dict[str, str]) -> Outcomes:
    """Outcomes in a JUnit file, with some texts of their messages replaced."""
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        child = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
        message = "" if child is None else (child.get("message") or "").strip().partition("\n")[0]
        for text, name in names.items():
            message = message.replace(text, name)
        outcome = "passed" if child is None else child.tag.replace("failure", "failed")
        test = f"{case.get('classname')}::{case.get('name')}"
        found[test] = [outcome, re.sub(r"\b0x[0-9a-f]+", "0x…", message)[:300]]
    return found


def compare(both: dict[str, Outcomes]) -> dict[str, Any]:
    """Counts, tests that did not pass and why, and those that differ between the runs."""
    ours, stock = both["with"], both["without"]
    absent = ["absent", ""]
    names = sorted(ours.keys() | stock.keys())
    pairs = {name: [ours.get(name, absent), stock.get(name, absent)] for name in names}
    counts = {name: collections.Counter(outcome for outcome, _ in run.values()) for name, run in both.items()}
    return {
        "tests": len(names),
        **{name: dict(sorted(count.items())) for name, count in counts.items()},
        "different": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "not passed": {name: found for name, found in stock.items() if found[0] != "passed"},
    }


def run(bench: Bench, git: str | None, pythons: dict[str, Path], progress: tqdm) -> dict[str, Any]:
    """Runs one release's tests in both environments."""
    folder = FOLDERS / f"{PACKAGE}-{bench.release.version}"
    if not folder.is_dir() and metadata.version(PACKAGE) != bench.release.version:
        version = bench.release.version
        raise SystemExit(f"open_clip {version} is missing; run: python scripts/versions/install.py {version}")
    (bench.work / "run").mkdir(parents=True, exist_ok=True)
    prepared, both = prepare(bench, git, pythons["without"]), {}
    for name, python in pythons.items():
        both[name] = outcomes(bench, name, python)
        progress.update()
    libraries = {name: metadata.version(name) for name in ("torch", "transformers", "timm", "pytest")}
    return {**prepared, **compare(both), "online": bench.online, "libraries": libraries}


def save(results: dict[str, Any]) -> None:
    incomplete = RESULTS.with_suffix(".incomplete")
    incomplete.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    incomplete.replace(RESULTS)


def install_timeout() -> None:
    """Puts pytest-timeout into a folder of its own: it is needed here alone."""
    folder = FOLDERS / PYTEST_TIMEOUT.replace("==", "-")
    if not folder.is_dir():
        incomplete = folder.with_name(folder.name + ".incomplete")
        shutil.rmtree(incomplete, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--target", str(incomplete), PYTEST_TIMEOUT], check=True)
        incomplete.rename(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    versions = [release.version for release in RELEASES]
    parser.add_argument("--releases", nargs="+", choices=versions, default=versions, metavar="VERSION")
    parser.add_argument("--again", action="store_true", help="also releases that have run")
    parser.add_argument("--open-clip-git", metavar="DIR", help="open_clip's git (default: GitHub)")
    parser.add_argument("--online", action="store_true", help="let tests ask the model hub")
    parser.add_argument("--slow", action="store_true", help="also tests that are left out for their time")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one test (default: 900)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "upstream-tests", help="folder for reports and logs"
    )
    args = parser.parse_args()
    work = args.work.resolve()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    todo = [r for r in RELEASES if r.version in args.releases and (args.again or r.version not in results)]
    if todo:
        install_timeout()
        pythons = make_environments(work / "environments")
    with tqdm(total=2 * len(todo), unit=" runs", disable=None) as progress:
        for release in todo:
            bench = Bench(release, work / release.version, args.online, args.slow, args.timeout)
            if args.again:
                shutil.rmtree(bench.work, ignore_errors=True)
            found = run(bench, args.open_clip_git, pythons, progress)
            results[release.version] = found
            save({version: results[version] for version in versions if version in results})
            progress.write(
                f"{release.version:11} {found['without']}, different: {found['different'] or 'none'}"
            )
    different = [version for version, found in results.items() if found["different"]]
    print(
        f"tests differ: {', '.join(different)}"
        if different
        else "no test differs; next: python scripts/tables.py"
    )
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
