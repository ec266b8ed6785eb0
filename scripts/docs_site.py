"""What mkdocs.yml hooks in: pages that are written elsewhere, and links that leave docs/.

README.md is the first page, CONTRIBUTING.md and patches/README.md are pages, and so is CONTRIBUTING.md's glossary. The
page of all commands is made from their parsers at each build.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "patches.md": "patches/README.md"}
GLOSSARY = "Glossary"  # a section of CONTRIBUTING.md
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are not in docs/."""
    from mkdocs.structure.files import File

    pages = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in PAGES.items()}
    pages["glossary.md"] = glossary(pages["contributing.md"])
    pages["commands.md"] = commands()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to files of the repository into links of the site, or into plain text where it has no such page."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda match: _relinked(match, ROOT / source), markdown)


def _relinked(match: re.Match[str], page: Path) -> str:
    picture, text, target, anchor = match.groups(default="")
    if not target or "://" in target or target.startswith("mailto:"):
        return match[0]
    path = os.path.relpath((page.parent / target).resolve(), ROOT)
    sites = {source: name for name, source in PAGES.items()}
    if path in sites:
        return f"{picture}[{text}]({sites[path]}{anchor})"
    if path.startswith("docs/") and not path.endswith(".json"):
        return f"{picture}[{text}]({path.removeprefix('docs/')}{anchor})"
    return text


def glossary(contributing: str) -> str:
    """The section of CONTRIBUTING.md, as a page."""
    section = re.search(rf"^## {GLOSSARY}\n(.*?)(?=^## |\Z)", contributing, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError(
            f"CONTRIBUTING.md has no section '## {GLOSSARY}'; scripts/docs_site.py makes a page of it."
        )
    return f"# {GLOSSARY}\n{section[1]}"


def commands() -> str:
    """All commands of ``arf`` and their flags, from the parsers."""
    from arf_plugin.cli.main import build_parser

    parser = build_parser()
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    about = {action.dest: action.help or "" for action in found._choices_actions}
    parts = ["# All commands", "What `arf COMMAND --help` says.", _list(about)]
    for name, command in found.choices.items():
        parts += [f"## arf {name}", _escaped(" ".join((command.description or "").split())), _flags(command)]
        if command.epilog:
            parts.append(f"```\n{command.epilog.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _list(about: dict[str, str]) -> str:
    return "\n".join(f"* [`arf {name}`](#arf-{name}): {_escaped(text)}" for name, text in about.items())


def _flags(command: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(command.prog)
    lines = ["| argument | meaning |", "| --- | --- |"]
    for action in command._actions:
        if action.dest == "help" or action.help == argparse.SUPPRESS:
            continue
        value = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper())
        names = f"{', '.join(action.option_strings)} {value}".strip()
        meaning = formatter._expand_help(action) if action.help else ""
        lines.append(f"| `{names}` | {_escaped(meaning)} |".replace("`|", "` |"))
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return flags_as_code(re.sub(r"([|<*_])", r"\\\1", text.replace("\n", " ")))


def flags_as_code(text: str) -> str:
    """Sets flags in a line of Markdown as code, but for those that are code already."""
    flag = r"`[^`]*`|(?<![\w-])--[a-z][\w-]*\*?"
    return re.sub(flag, lambda match: match[0] if match[0].startswith("`") else f"`{match[0]}`", text)
