"""Reads YAML files that others have written: plain values that know their lines, bounded, one sentence.

What a text stands for is for the reader of the file to say, so that an impossible date is a text like any other.
Aliases are fine as long as the file remains of a sane size with all of them filled in, which "billion laughs" do not,
nor lists that contain themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import ArfError, MissingDependencyError
from arf_plugin.untrusted import printable, require_regular

if TYPE_CHECKING:
    from arf_plugin.validation import Location

LARGEST_FILE = 1 << 20  # bytes; the package's own have some thousand
LARGEST_VALUE = 100_000  # nodes, aliases filled in
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge", "value")


def read(
    path: Path,
    name: str,
    what: str,
    error: type[ArfError],
    scalar: Callable[[Any, Location], Any] = lambda node, location: node.value,
) -> tuple[Any, Callable[[Location], str]]:
    """Reads a YAML file of one document: mappings, lists, truth values and nothing; for the rest it is asked.

    Args:
        path: the file.
        name: what messages call it.
        what: what it is read for, such as "a suite".
        error: family of the error.
        scalar: what another value stands for, given its node and location; by default the text as it is written.

    Returns:
        The value, None for an empty file; and what gives the place of a location in it, such as ``grid.yaml, line 12``,
        or of the nearest one around it.

    Raises:
        error: it cannot be read, is no YAML, holds something else than plain values, or has a key twice; with the line
            if there is one.
    """
    lines: dict[Location, int] = {(): 1}

    def plain(node: Any, location: Location) -> Any:
        lines.setdefault(location, node.start_mark.line + 1)
        if node.id == "sequence":
            return [plain(child, (*location, index)) for index, child in enumerate(node.value)]
        if node.id == "mapping":
            found: dict[str, Any] = {}
            for key, value in node.value:
                inner, line = (*location, key.value), key.start_mark.line + 1
                if key.value in found:
                    where = printable(".".join(map(str, inner)))[:200]
                    raise error(
                        f"{name}, line {line}, {where}: this key stands on line {lines[inner]}, too. Keep one of them."
                    )
                lines[inner] = line
                found[key.value] = plain(value, inner)
            return found
        if node.tag.endswith(":null"):
            return None
        return (
            node.value.lower() in ("true", "yes", "on")
            if node.tag.endswith(":bool")
            else scalar(node, location)
        )

    def place(location: Location) -> str:
        while location not in lines:
            location = location[:-1]
        return f"{name}, line {lines[location]}"

    root = _compose(path, name, what, error)
    return None if root is None else plain(root, ()), place


def _compose(path: Path, name: str, what: str, error: type[ArfError]) -> Any:
    """The root node of a file's one document, whose mappings have plain texts for keys; None for an empty file."""
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError("pyyaml", f"Reading {what}", "evaluation") from None
    text = _read(path, name, error)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check(node, name, error)
    except RecursionError:
        raise error(f"{name} is nested too deeply to be read; expected {what}.") from None
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(cause, "problem", None) or getattr(cause, "reason", None) or str(cause)
        raise error(
            f"{name}{place} cannot be read as YAML, for this is not YAML: {' '.join(str(reason).split())[:200]}."
        ) from cause
    except (ValueError, OverflowError) as cause:  # escapes and directives of thousands of digits
        raise error(f"{name} cannot be read as YAML: {printable(str(cause))[:200]}.") from cause
    return node


def _read(path: Path, name: str, error: type[ArfError]) -> str:
    require_regular(path, error)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as cause:
        raise error(f"{name} cannot be read: {cause.strerror or cause}. Expected a YAML file.") from cause
    if len(content) > LARGEST_FILE:
        raise error(f"{name} has more than {LARGEST_FILE >> 20} MiB. Expected a YAML file of some kilobytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = content[: cause.start].count(b"\n") + 1
        raise error(
            f"{name}, line {line} cannot be read as text: {cause.reason}. Save the file as UTF-8."
        ) from cause


def _check(root: Any, name: str, error: type[ArfError]) -> None:
    """Looks at every node once, and counts what they come to with aliases filled in.

    Raises:
        error: a tag that is no plain value's, a key that is no text, or a value that is endless.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in sizes:  # an alias; its target has been looked at
            return sizes[id(node)]
        line = node.start_mark.line + 1
        if id(node) in open_nodes:
            raise error(f"{name}, line {line}: this value contains itself. Write it out.")
        if node.tag.removeprefix(_PREFIX) not in _PLAIN or not node.tag.startswith(_PREFIX):
            tag = printable(node.tag)[:100]
            raise error(f"{name}, line {line}: the tag {tag} cannot be read as YAML of plain values.")
        open_nodes.add(id(node))
        total = 1
        for child in node.value if node.id != "scalar" else ():
            if isinstance(child, tuple) and child[0].id != "scalar":
                raise error(
                    f"{name}, line {child[0].start_mark.line + 1}: a key is no text. Expected key: value."
                )
            total += sum(map(size, child)) if isinstance(child, tuple) else size(child)
            if total > LARGEST_VALUE:
                raise error(
                    f"{name}, line {line}: with its aliases filled in this has more than {LARGEST_VALUE} values. "
                    "Expected a file of some hundred."
                )
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root)
