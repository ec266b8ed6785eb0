"""Generated tables of the documentation are up to date, and what it names exists."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_release_was_run_with_every_feature():
    """No cell of docs/versions.md is empty, and none holds a failure that is not upstream's."""
    from arf_plugin.hooks.releases import RELEASES

    columns = runpy.run_path(str(ROOT / "scripts/versions/features.py"))["FEATURES"]
    cells = json.loads((ROOT / "docs/versions.json").read_text())["cells"]
    assert list(cells) == [release.version for release in RELEASES]
    for version, row in cells.items():
        assert list(row) == [feature.id for feature in columns], version
        for name, cell in row.items():
            assert cell["status"] in ("passed", "refused", "upstream broken"), (version, name, cell)
            assert cell["status"] == "passed" or cell["detail"], (version, name)


def test_open_clips_own_tests_end_the_same_with_the_plugin():
    """On every release, and enough of them pass for that to say something."""
    from arf_plugin.hooks.releases import RELEASES

    found = json.loads((ROOT / "docs/upstream-tests.json").read_text(encoding="utf-8"))
    assert list(found) == [release.version for release in RELEASES]
    for version, run in found.items():
        assert not run["different"] and run["with"] == run["without"], version
        assert run["with"]["passed"] >= 25 and sum(run["with"].values()) == run["tests"], version


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert all((page.parent / link).exists() for link in links), links
    paths = set(re.findall(r"(?:arf_plugin|scripts|tests|docs)/[\w/.-]+\.(?:py|sh|md|png|json)", text))
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert not missing - {"scripts/bench/NAME.py"}


def test_every_arf_flag_is_in_the_documentation_and_the_other_way_round():
    import argparse

    from arf_plugin.flags import add_arf_flags

    parser = argparse.ArgumentParser()
    add_arf_flags(parser)
    flags = set(re.findall(r"--arf-[a-z0-9-]+", parser.format_help()))
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert flags == set(re.findall(r"--arf-[a-z0-9-]+", text))


def test_functions_that_the_page_on_the_paper_names_exist():
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    named = re.findall(r"`(arf_plugin/[\w/]+\.py):([\w.]+)`", text)
    assert len(named) >= 12
    for path, name in named:
        scope = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        for part in name.split("."):
            found = [
                node
                for node in scope
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part
            ]
            assert found, f"docs/paper.md names {path}:{name}, which is not there"
            scope = found[0].body


def test_means_on_the_page_on_the_paper_are_those_of_their_rows():
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    checked = 0
    for line in text.splitlines():
        if line.startswith("| |"):
            columns = [cell.strip() for cell in line.strip("|").split("|")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for column, cell in (
            zip(columns, cells, strict=False) if re.match(r"\| .* \| [\d.]+ \|", line) else ()
        ):
            count = re.fullmatch(r"mean of (\d)", column)
            if count and cell:
                shifts = [float(value) for value in cells[2 : 2 + int(count[1])]]
                assert abs(sum(shifts) / len(shifts) - float(cell)) < 0.051, line
                checked += 1
    assert checked >= 14


def test_modules_are_short_or_say_why():
    paths = [path for folder in ("arf_plugin", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    modules = {str(path): path.read_text(encoding="utf-8") for path in [ROOT / "setup.py", *paths]}
    assert len(modules) > 200
    long = {name: text for name, text in modules.items() if len(text.splitlines()) > 350}
    silent = [
        name
        for name, text in long.items()
        if "One module, because" not in (ast.get_docstring(ast.parse(text)) or "")
    ]
    assert not silent, "split these, or say in the docstring: One module, because ..."
