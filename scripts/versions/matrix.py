"""Runs the real trainer on every open_clip release with every feature, and writes docs/versions.json.

    python scripts/versions/install.py                          releases first
    python scripts/versions/matrix.py                           every cell that has not run yet
    python scripts/versions/matrix.py --releases 3.3.0 --features fsdp csv --again
    python scripts/tables.py                                    puts the table into docs/versions.md

About ten seconds for each cell; a cell that ran is kept unless --again is given, so an interrupted run goes on where it
was. A cell is `passed`, `refused` (by the plugin, with its message) or `upstream broken` (stock open_clip ends with the
same error). `failed` is none of these: the table is not to be published then, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from features import FEATURES
from tqdm import tqdm

from arf_plugin.hooks.releases import PACKAGE, RELEASES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "versions.json"


def load() -> dict[str, Any]:
    """What has been measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cells": {}}


def save(results: dict[str, Any]) -> None:
    """Writes the results, in the order of the lists."""
    cells = results["cells"]
    results["cells"] = {
        release.version: {
            feature.id: cells[release.version][feature.id]
            for feature in FEATURES
            if feature.id in cells.get(release.version, {})
        }
        for release in RELEASES
    }
    incomplete = RESULTS.with_suffix(".incomplete")
    incomplete.write_text(json.dumps(results, indent=1) + "\n")
    incomplete.replace(RESULTS)


def run(version: str, features: list[str], results: dict[str, Any], progress: tqdm) -> None:
    """Runs cells of one release in a process that sees it, and keeps each as soon as it is there."""
    folder = ROOT / ".venvs" / f"{PACKAGE}-{version}"
    if not folder.is_dir() and metadata.version(PACKAGE) != version:
        raise SystemExit(f"open_clip {version} is missing; run: python scripts/versions/install.py {version}")
    path = str(folder) if folder.is_dir() else ""
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as work:
        argv = [sys.executable, str(Path(__file__).with_name("cells.py")), f"{work}/cells", *features]
        with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                cell = json.loads(line)
                assert cell.pop("release") == version
                name = cell.pop("feature")
                results["cells"].setdefault(version, {})[name] = cell
                save(results)
                progress.update()
                progress.write(f"{version:11} {name:20} {cell['status']:15} {cell.get('detail', '')}")
    if process.returncode:
        raise SystemExit(f"the cells of {version} ended with status {process.returncode}; run again to go on")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    versions, names = [r.version for r in RELEASES], [feature.id for feature in FEATURES]
    parser.add_argument("--releases", nargs="+", choices=versions, default=versions, metavar="VERSION")
    parser.add_argument("--features", nargs="+", choices=names, default=names, metavar="FEATURE")
    parser.add_argument("--again", action="store_true", help="also run cells that have been run")
    args = parser.parse_args()
    results = load()
    results["libraries"] = {
        name: metadata.version(name) for name in ("torch", "torchvision", "webdataset", "timm")
    }
    wanted = {
        version: [f for f in args.features if args.again or f not in results["cells"].get(version, {})]
        for version in args.releases
    }
    with tqdm(total=sum(map(len, wanted.values())), unit=" cells", disable=None) as progress:
        for version, features in wanted.items():
            if features:
                run(version, features, results, progress)
    save(results)
    failed = [
        f"{version} {name}: {cell.get('detail')}"
        for version, cells in results["cells"].items()
        for name, cell in cells.items()
        if cell["status"] == "failed"
    ]
    print("\n".join(["failed:", *failed]) if failed else "no cell has failed; next: python scripts/tables.py")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
