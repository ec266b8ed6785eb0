"""scripts/fuzz.py: tries properties until the time is over, counts, and shows what has failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[3] / "scripts" / "fuzz.py"


def fuzz(*argv: object, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *map(str, argv)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_few_seconds_of_one_property(tmp_path):
    record = tmp_path / "fuzz.json"
    done = fuzz("--minutes", 0.05, "service_replies::test_any_json", "--json", record, "--seed", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())
    [one] = found["properties"]
    assert one["examples"] >= 20 and one["failures"] == [] and one["seconds"] > 0 and found["seed"] == 3
    assert found["kinds"]["parsers"] == one["examples"] and found["kinds"]["names"] == 0
    assert "service_replies::any_json" in done.stdout and "by kind: decoding 0" in done.stdout


def test_a_failure_is_counted_and_can_be_reproduced_and_unknown_topics_are_said(tmp_path):
    """With a property that fails: the blob is shown, the exit status says so."""
    script = tmp_path / "scripts" / "fuzz.py"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text())
    folder = tmp_path / "tests" / "properties"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text(
        (SCRIPT.parents[1] / "tests" / "properties" / "conftest.py").read_text()
    )
    (folder / "test_wrong.py").write_text(
        "from hypothesis import given, strategies as st\n"
        "@given(st.integers())\ndef test_small(number):\n    assert number < 1000\n"
        "@given(st.integers())\ndef test_whole(number):\n    assert type(number) is int\n"
    )
    done = fuzz("--minutes", 0.05, script=script)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "@reproduce_failure(" in done.stdout and "wrong::whole" in done.stdout
    done = fuzz("--minutes", 1, "no_such_topic", script=script)
    assert done.returncode == 1 and "no properties found for no_such_topic" in done.stderr


def test_help_has_examples():
    assert "scripts/fuzz.py --minutes 10" in fuzz("--help").stdout
