"""A small part of IconNet from the npm registry."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from arf_plugin.evaluation.suites import load_suite

ROOT = Path(__file__).parents[3]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_part_of_iconnet_is_built_with_the_same_bytes_every_time(tmp_path):
    sets = ["tabler", "lucide", "bi", "bx", "iconoir", "ion", "mdi", "heroicons"]
    for name in ("a", "b"):
        command = [sys.executable, ROOT / "scripts" / "iconnet" / "build.py", "--out", tmp_path / name]
        command += ["--cache", tmp_path / "cache", "--no-unrelated", "--sets", *sets]
        done = subprocess.run(map(str, command), capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    summary = json.loads((tmp_path / "a" / "iconnet.json").read_text())
    assert set(summary["sets"]) == set(sets)
    assert summary["task"]["train"] > 10 and summary["pool"]["icons"] > 1000
    suite = load_suite(ROOT / "scripts" / "iconnet" / "iconnet.yaml")
    assert {name.removeprefix("test/") for name in summary["evaluation"] if name.startswith("test/")} <= set(
        suite.sets
    )
    with tarfile.open(tmp_path / "a" / "pool" / "icons-000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".png", ".txt", ".json"}
