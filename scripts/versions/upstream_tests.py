"""Runs open_clip's own tests with the plugin and without it, and compares them test by test.

    python scripts/versions/upstream_tests.py https://github.com/mlfoundations/open_clip
    python scripts/versions/upstream_tests.py CLONE --releases 3.3.0 --again

The tests are taken from the tag of each release in the repository (a clone, a bare clone or a URL), the code from the
release itself, and both runs share all libraries but the plugin's start-up file. A test that needs the network, or a
library that is missing, fails in both alike. Writes docs/upstream-tests.json; the exit status is 1 if a test differs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from arf_plugin.hooks.releases import PACKAGE, RELEASES, Release

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "upstream-tests.json"
sys.path.insert(0, str(ROOT / "tests"))

from support.environments import make_environment  # noqa: E402


def checkout(repository: str, release: Release, folder: Path) -> Path:
    """The release's folder of tests, from its tag or commit."""
    folder.mkdir()
    revision = release.commit or f"v{release.version}"
    if Path(repository).exists():
        git, revisions = ["git", "-C", repository], revision
    else:
        subprocess.run(["git", "init", "-q", "--bare", folder / "git"], check=True)
        git, revisions = ["git", "-C", str(folder / "git")], "FETCH_HEAD"
        fetched = release.commit or f"refs/tags/{revision}"
        subprocess.run([*git, "fetch", "-q", "--depth", "1", repository, fetched], check=True)
    archive = subprocess.run([*git, "archive", revisions, "tests"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
    return folder / "tests"


def outcomes(
    python: Path, tests: Path, code: str, report: Path, timeout: int, ignored: list[str]
) -> dict[str, str]:
    """Runs the tests: ``file::name`` -> passed, failed, error or skipped."""
    paths = [code, str(tests.parent)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
    }
    argv = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--junitxml", report]
    argv += [f"--ignore-glob=*{name}" for name in ignored]
    with report.with_suffix(".log").open("w") as log:
        subprocess.run(
            [*map(str, argv), "tests"],
            cwd=tests.parent,
            env=env,
            stdout=log,
            stderr=log,
            timeout=timeout,
            check=False,
        )
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = next(iter(sorted(kinds)), "passed").replace("failure", "failed")
    return found


def compare(
    repository: str, release: Release, work: Path, timeout: int, ignored: list[str]
) -> dict[str, object]:
    """Runs one release's tests in both environments."""
    folder = ROOT / ".venvs" / f"{PACKAGE}-{release.version}"
    if not folder.is_dir() and metadata.version(PACKAGE) != release.version:
        raise SystemExit(f"open_clip is missing; run: python scripts/versions/install.py {release.version}")
    code = str(folder) if folder.is_dir() else ""
    tests = checkout(repository, release, work / release.version)
    plugged, bare = make_environment(work / "with"), make_environment(work / "without")
    (packages,) = (work / "with").glob("lib/python*/site-packages")
    (packages / "arf_plugin.pth").write_text(f"{ROOT}\nimport arf_plugin._boot\n")
    for python, expected in ((plugged, "True"), (bare, "False")):
        check = "import sys; print('arf_plugin._boot' in sys.modules)"
        assert subprocess.check_output([python, "-c", check], text=True).strip() == expected
    reports = [
        outcomes(python, tests, code, work / f"{release.version}-{name}.xml", timeout, ignored)
        for name, python in (("with", plugged), ("without", bare))
    ]
    names = sorted(reports[0].keys() | reports[1].keys())
    different = {
        n: [r.get(n, "absent") for r in reports] for n in names if reports[0].get(n) != reports[1].get(n)
    }
    counts = dict(sorted(collections.Counter(reports[1].values()).items()))
    return {"tests": len(names), "without": counts, "different": different, "left out": ignored}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    versions = [release.version for release in RELEASES]
    parser.add_argument("repository", help="a clone of open_clip, or its URL")
    parser.add_argument("--releases", nargs="+", choices=versions, default=versions, metavar="VERSION")
    parser.add_argument("--again", action="store_true", help="also releases that have been run")
    parser.add_argument(
        "--timeout", type=int, default=1800, help="seconds for one run of the tests (default: 1800)"
    )
    parser.add_argument(
        "--leave-out", nargs="*", default=[], metavar="FILE", help="test files that are not run"
    )
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    todo = [r for r in RELEASES if r.version in args.releases and (args.again or r.version not in results)]
    for release in tqdm(todo, unit=" releases", disable=None):
        with tempfile.TemporaryDirectory() as work:
            found = compare(args.repository, release, Path(work), args.timeout, args.leave_out)
        print(release.version, json.dumps(found), flush=True)
        results[release.version] = found
        incomplete = RESULTS.with_suffix(".incomplete")
        ordered = {version: results[version] for version in versions if version in results}
        incomplete.write_text(json.dumps(ordered, indent=1) + "\n")
        incomplete.replace(RESULTS)
    return int(any(found["different"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
