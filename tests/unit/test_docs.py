"""What the documentation names exists: links, files, functions, commands, flags; its generated tables are fresh."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from arf_plugin.cli.main import build_parser

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "patches/README.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.process
def test_generated_tables_and_the_picture_of_a_step_are_up_to_date():
    command = [sys.executable, ROOT / "scripts/tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@by_page
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert not {link for link in links if not (page.parent / link).exists()}
    paths = set(
        re.findall(r"(?:arf_plugin|scripts|tests|docs|examples)/[\w/.-]+\.(?:py|sh|md|png|svg|json)", text)
    )
    assert not {path for path in paths if not (ROOT / path).exists()} - {"scripts/bench/NAME.py"}


@by_page
def test_functions_that_a_page_names_exist(page):
    for path, name in re.findall(r"`(arf_plugin/[\w/]+\.py):([\w.]+)`", page.read_text(encoding="utf-8")):
        assert_defined(path, name)


def test_the_code_of_every_hop_of_a_step_exists():
    sys.path.insert(0, str(ROOT / "scripts"))
    for hop in runpy.run_path(str(ROOT / "scripts/step_picture.py"))["hops"]():
        path, colon, name = hop.code.partition(":")
        if colon:
            assert_defined(f"arf_plugin/{path}", name)
        elif path:
            module, *rest = path.split(".")
            found = importlib.import_module(module)
            for part in rest:
                found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")


def assert_defined(path: str, name: str) -> None:
    scope = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in scope if getattr(node, "name", None) == part]
        assert found, f"{path} has no {name}"
        scope = found[0].body


def shown_commands(text: str) -> list[str]:
    """Commands in blocks of code, continuation lines joined, and code within sentences."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return lines + re.findall(
        r"`(arf [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    )


def flags_of(command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", command))


@by_page
def test_arf_takes_the_flags_that_a_page_shows(page):
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for line in shown_commands(page.read_text(encoding="utf-8")):
        words = line.split()
        if not (line.startswith("arf ") and len(words) > 1 and re.fullmatch("[a-z]+", words[1])):
            continue
        assert words[1] in subparsers.choices, line
        if words[1] != "train":
            known = set(subparsers.choices[words[1]]._option_string_actions)
            assert not flags_of(line.partition(" # ")[0]) - known, line


@pytest.mark.process
def test_the_trainer_takes_the_flags_that_the_pages_show():
    code = "import arf_plugin._boot, sys; from open_clip_train.params import parse_args; parse_args(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    known = flags_of(done.stdout)
    shown: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        trainer = [line for line in shown_commands(text) if "open_clip_train.main" in line]
        shown |= flags_of(" ".join(line.partition("open_clip_train.main")[2] for line in trainer))
        shown |= set(re.findall(r"--arf-[a-z0-9-]+", text))
    assert not shown - known
    assert not {flag for flag in known if flag.startswith("--arf-")} - shown


@by_page
def test_commands_are_well_quoted(page):
    for line in shown_commands(page.read_text(encoding="utf-8")):
        if line.startswith(("arf ", "torchrun ", "pip ")) and "..." not in line:
            shlex.split(line, comments=True)


def test_means_on_the_page_on_the_paper_are_those_of_their_rows():
    checked = 0
    columns: list[str] = []
    for line in (ROOT / "docs/paper.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| |"):
            columns = cells
        if not re.match(r"\| .* \| [\d.]+ \|", line):
            continue
        for column, cell in zip(columns, cells, strict=False):
            count = re.fullmatch(r"mean of (\d)", column)
            if count and cell:
                shifts = [float(value) for value in cells[2 : 2 + int(count[1])]]
                assert abs(sum(shifts) / len(shifts) - float(cell)) < 0.051, line
                checked += 1
    assert checked
