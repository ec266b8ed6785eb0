"""A YAML file whose values know where they stand, so that every complaint names file, line and key.

The file is read to nodes alone: plain values, no Python objects (:mod:`arf_plugin.plain_yaml`). Beyond YAML,
``${name}`` in a text is replaced by a variable, and a key that occurs twice is an error rather than the last one
winning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from arf_plugin.errors import GridError
from arf_plugin.plain_yaml import compose

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
LONGEST_MESSAGE = 600  # characters of what a file may say in an error
LARGEST_TEXT = 1 << 20  # characters, variables filled in
LARGEST_NUMBER = (1 << 63) - 1
_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"


class Value:
    """One value of a file: a scalar, a list or a mapping.

    Args:
        node: PyYAML's node.
        file: what the file is called in messages.
        key: path of the key, such as ``arms[2].flags.lr``; empty for the whole file.
        variables: what ``${name}`` stands for.
    """

    def __init__(self, node: Any, file: str, key: str, variables: Mapping[str, str | None]) -> None:
        self.node, self.file, self.key, self.variables = node, file, key, variables

    @property
    def line(self) -> int:
        """Number of the line it begins on, from 1."""
        return self.node.start_mark.line + 1

    @property
    def where(self) -> str:
        """Its place, such as ``grid.yaml, line 12, arms[2].flags.lr``."""
        return f"{self.file}, line {self.line}" + (f", {self.key}" if self.key else "")

    def error(self, message: str) -> GridError:
        """An error about this value, to be raised."""
        return GridError(f"{self.where[:300]}: {message[:LONGEST_MESSAGE]}")

    @property
    def is_null(self) -> bool:
        """Whether it is ``null`` or left empty."""
        return self.node.tag == _NULL

    @property
    def is_mapping(self) -> bool:
        """Whether it is a mapping."""
        return self.node.id == "mapping"

    @property
    def is_list(self) -> bool:
        """Whether it is a list."""
        return self.node.id == "sequence"

    def mapping(self, known: Collection[str] | None = None, needed: Collection[str] = ()) -> dict[str, Value]:
        """Its entries, each with its own place.

        Args:
            known: keys that it may have; None for any.
            needed: keys that it must have.

        Raises:
            GridError: it is no mapping, or has a key twice, an unknown one, or one too few.
        """
        if not self.is_mapping:
            raise self.error(f"found {self._found()}, expected a mapping (key: value).")
        entries: dict[str, Value] = {}
        for key_node, value_node in self.node.value:
            name = str(key_node.value)
            path = f"{self.key}.{name}" if self.key else name
            entry = Value(value_node, self.file, path, self.variables)
            if name in entries:
                raise GridError(
                    f"{self.file}, line {key_node.start_mark.line + 1}, {path[:120]}: this key stands on line "
                    f"{entries[name].line}, too. Keep one of them."
                )
            if known is not None and name not in known:
                raise GridError(
                    f"{self.file}, line {key_node.start_mark.line + 1}, {path[:120]}: unknown key. "
                    f"Expected one of: {', '.join(known)}."
                )
            entries[name] = entry
        for name in needed:
            if name not in entries:
                raise self.error(f"'{name}' is missing (found: {', '.join(entries) or 'nothing'}).")
        return entries

    def items(self) -> list[Value]:
        """Its elements, each with its own place; a scalar is a list of one.

        Raises:
            GridError: it is a mapping.
        """
        if self.is_mapping:
            raise self.error("found a mapping, expected a list.")
        if not self.is_list:
            return [] if self.is_null else [self]
        return [
            Value(node, self.file, f"{self.key}[{index}]", self.variables)
            for index, node in enumerate(self.node.value)
        ]

    def text(self) -> str:
        """Its text as it was written, variables filled in.

        Raises:
            GridError: it is no scalar, empty, or names an unknown variable.
        """
        if self.node.id != "scalar" or self.is_null or not str(self.node.value).strip():
            raise self.error(f"found {self._found()}, expected a text.")
        written = str(self.node.value)
        used = _VARIABLE.findall(written)
        if sum(len(self.variables.get(name) or "") for name in used) > LARGEST_TEXT:
            raise self.error(f"with its variables filled in this has more than {LARGEST_TEXT} characters.")
        return _VARIABLE.sub(self._fill, written)

    def number(self, smallest: float = float("-inf"), largest: float = float("inf")) -> float:
        """Its value as a number of a range, ends included."""
        return self._number(float, "a number", smallest, largest)

    def whole(self, smallest: int = 0) -> int:
        """Its value as a whole number."""
        return int(self._number(int, "a whole number", smallest, LARGEST_NUMBER))

    def boolean(self) -> bool:
        """Its value as true or false."""
        if self.node.tag != _BOOL:
            raise self.error(f"found {self._found()}, expected true or false.")
        return str(self.node.value).lower() in ("true", "yes", "on")

    @property
    def is_boolean(self) -> bool:
        """Whether it is true or false."""
        return self.node.tag == _BOOL

    def one_of(self, choices: Collection[str]) -> str:
        """Its text, which must be one of a few."""
        text = self.text()
        if text not in choices:
            raise self.error(f"found '{text[:80]}', expected one of: {', '.join(choices)}.")
        return text

    def _number(self, convert: Callable[[str], float], kind: str, smallest: float, largest: float) -> float:
        text = self.text()
        try:
            value = convert(text)
        except ValueError:
            raise self.error(f"found '{text[:80]}', expected {kind}.") from None
        if not smallest <= value <= largest:
            limits = (
                f"at least {smallest:g}" if largest >= LARGEST_NUMBER else f"from {smallest:g} to {largest:g}"
            )
            raise self.error(f"found {text[:80]}, expected {kind}, {limits}.")
        return value

    def _fill(self, match: re.Match[str]) -> str:
        name = match[1]
        if name not in self.variables:
            raise self.error(
                f"${{{name}}} is not a variable (known: {', '.join(self.variables)}). "
                "Declare it under 'variables', or correct the name."
            )
        value = self.variables[name]
        if value is None:
            raise self.error(f"${{{name}}} has no value. Give one with: --set {name}=VALUE")
        return value

    def _found(self) -> str:
        if self.is_null:
            return "nothing"
        return {"mapping": "a mapping", "sequence": "a list"}.get(
            self.node.id, f"'{str(self.node.value)[:80]}'"
        )


def parse(path: Path, name: str) -> Any:
    """Parses a YAML file into PyYAML's nodes, which know their lines; nothing is constructed.

    Raises:
        GridError: the file cannot be read, is not YAML, or holds something else than plain values.
    """
    node = compose(path, name, "a grid", GridError)
    if node is None:
        raise GridError(f"{name} is empty. Expected a grid; `arf ablate --list` names ready ones.")
    return node
