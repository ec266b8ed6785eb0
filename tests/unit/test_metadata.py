"""What a package index gets to show."""

from __future__ import annotations

import re
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return message_from_string((folder / "arf_plugin.egg-info" / "PKG-INFO").read_text(encoding="utf-8"))


def test_links_and_pictures_of_the_description_do_not_depend_on_the_repository(metadata):
    text = metadata.get_payload()
    assert "# arf-plugin" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and not [target for target in targets if not target.startswith(("https://", "#"))]


def test_who_and_where(metadata):
    assert metadata["Author"] and metadata["License"] == "MIT" and metadata["Keywords"]
    assert all("https://" in url for url in metadata.get_all("Project-URL"))
    assert (
        f"Programming Language :: Python :: {metadata['Requires-Python'].lstrip('>=')}"
        in metadata.get_all("Classifier")
    )


def test_every_extra_that_a_message_or_a_page_names_is_there(metadata):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "arf_plugin").rglob("*.py")]
    named = set()
    for page in pages:
        for extras in re.findall(r"arf-plugin\[([a-z,]+)\]", page.read_text(encoding="utf-8")):
            named |= set(extras.split(","))
    assert named <= set(metadata.get_all("Provides-Extra"))
