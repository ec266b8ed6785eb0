"""Reads suite files, and says on which line a mistake is."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.suites import HALVES, KINDS, LAYOUTS, METRICS, Average, SetEntry, Source, Suite
from arf_plugin.plain_yaml import compose

LONGEST_MESSAGE = 600  # characters of what a file may say in an error
_SET_KEYS = ("sources", "metric", "classes", "templates", "classnames", "subset")


class Located(dict[str, Any]):
    """A mapping that knows the line it starts on, and that of each key."""

    line: int
    lines: dict[str, int]


def read_suite(path: Path) -> Suite:
    """Reads a suite file; the format is described in :mod:`arf_plugin.evaluation.suites`.

    Raises:
        EvaluationError: naming file, line and key of the first mistake.
    """
    reader = _Reader(path)
    content = reader.mapping(_load(path), 1, "the file")
    reader.keys(content, ("description", "sets", "averages"), required=("sets",))
    listed = reader.mapping(content["sets"], content.lines["sets"], "sets")
    sets = {name: reader.entry(name, listed) for name in listed}
    averages: dict[str, Average] = {}
    if "averages" in content:
        written = reader.mapping(content["averages"], content.lines["averages"], "averages")
        for name in written:
            averages[name] = reader.average(name, written, list(sets), list(averages))
    return Suite(path.stem, str(content.get("description", path.stem)), sets, averages)


def _load(path: Path) -> Any:
    if not path.exists():
        raise EvaluationError(f"There is no suite file at {path}.")
    return _value(compose(path, str(path), "a suite", EvaluationError), path)


def _value(node: Any, path: Path) -> Any:
    """What a node stands for: mappings, lists, truth values, whole numbers and nothing; else the text as it is."""
    if node is None or node.tag.endswith(":null"):
        return None
    if node.id == "sequence":
        return [_value(child, path) for child in node.value]
    if node.id == "mapping":
        result = Located()
        result.line, result.lines = node.start_mark.line + 1, {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in result:
                raise EvaluationError(
                    f"{path}, line {line}: key '{name[:80]}' is there twice (line {result.lines[name]})."
                )
            result[name], result.lines[name] = _value(value, path), line
        return result
    if node.tag.endswith(":bool"):
        return node.value.lower() in ("true", "yes", "on")
    if node.tag.endswith(":int") and len(node.value) < 20 and node.value.lstrip("+-").isdecimal():
        return int(node.value)
    return str(node.value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class _Reader:
    """Checks values of one file and builds the suite's parts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, line: int, text: str) -> EvaluationError:
        return EvaluationError(f"{self.path}, line {line}: {text[:LONGEST_MESSAGE]}")

    def mapping(self, value: Any, line: int, what: str) -> Located:
        if not isinstance(value, Located) or not value:
            raise self.error(line, f"{what} is {_shown(value)}, expected a mapping.")
        return value

    def keys(self, value: Located, known: Collection[str], required: Collection[str] = ()) -> None:
        for key in value:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                meant = f" Did you mean '{close[0]}'?" if close else ""
                raise self.error(
                    value.lines[key], f"unknown key '{key[:80]}', expected one of {', '.join(known)}.{meant}"
                )
        for key in required:
            if key not in value:
                raise self.error(value.line, f"key '{key}' is missing (found: {', '.join(value)}).")

    def one_of(self, value: Located, key: str, known: Sequence[str], default: str) -> str:
        found = value.get(key, default)
        if found not in known:
            raise self.error(
                value.lines[key], f"'{key}' is {_shown(found)}, expected one of {', '.join(known)}."
            )
        return str(found)

    def number(self, value: Located, key: str) -> int | None:
        found = value.get(key)
        if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 1):
            raise self.error(value.lines[key], f"'{key}' is {_shown(found)}, expected a positive number.")
        return found

    def texts(self, value: Located, key: str) -> tuple[str, ...]:
        found = value.get(key, [])
        if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
            raise self.error(value.lines[key], f"'{key}' is {_shown(found)}, expected a list of texts.")
        return tuple(found)

    def entry(self, name: str, sets: Located) -> SetEntry:
        value = self.mapping(sets[name], sets.lines[name], f"the set '{name}'")
        self.keys(value, _SET_KEYS, required=("sources",))
        sources = value["sources"]
        if not isinstance(sources, list) or not sources:
            raise self.error(value.lines["sources"], f"'sources' is {_shown(sources)}, expected a list.")
        templates = self.texts(value, "templates")
        for template in templates:
            if "{c}" not in template:
                raise self.error(
                    value.lines["templates"], f"{_shown(template)} has no {{c}} for the class name."
                )
        subset: Any = value.get("subset")
        if isinstance(subset, list):
            subset = self.texts(value, "subset")
        elif subset is not None:
            subset = self.one_of(value, "subset", HALVES, "")
        return SetEntry(
            name,
            tuple(self.source(item, value.lines["sources"], name) for item in sources),
            self.one_of(value, "metric", METRICS, "top1"),
            self.number(value, "classes"),
            templates,
            self.texts(value, "classnames"),
            subset,
        )

    def source(self, item: Any, line: int, name: str) -> Source:
        value = self.mapping(item, line, "a source")
        self.keys(value, (*LAYOUTS, "at", "images"))
        layouts = [key for key in value if key in LAYOUTS]
        if len(layouts) != 1 or not isinstance(value[layouts[0]], str):
            raise self.error(
                value.line,
                f"a source needs exactly one of {', '.join(LAYOUTS)} (found: {_shown(dict(value))}).",
            )
        [layout] = layouts
        if "at" in value and layout != "builder":
            raise self.error(
                value.lines["at"], "'at' goes with 'builder' alone; a layout's own value is its path."
            )
        where = value[layout].replace("{set}", name)
        at = str(value.get("at", where)).replace("{set}", name)
        if Path(at).is_absolute() or ".." in Path(at).parts:
            raise self.error(value.line, f"{_shown(at)} leaves the data root, expected a path below it.")
        return Source(layout, where, at, self.number(value, "images"))

    def average(self, name: str, averages: Located, sets: list[str], earlier: list[str]) -> Average:
        line = averages.lines[name]
        value = self.mapping(averages[name], line, f"the average '{name}'")
        self.keys(value, ("kind", "of", "harmonic"), required=("kind",))
        kind = self.one_of(value, "kind", KINDS, "")
        if ("of" in value) == ("harmonic" in value):
            raise self.error(line, f"the average '{name}' needs either 'of' or 'harmonic'.")
        if "harmonic" in value:
            parts = self.texts(value, "harmonic")
            if len(parts) != 2 or any(part not in earlier for part in parts):
                raise self.error(
                    value.lines["harmonic"],
                    f"'harmonic' is {list(parts)}, expected two of the averages above ({', '.join(earlier)}).",
                )
            return Average(name, kind, harmonic=(parts[0], parts[1]))
        members: list[str] = []
        for pattern in self.texts(value, "of"):
            found = fnmatch.filter(sets, pattern)
            if not found:
                close = difflib.get_close_matches(pattern, sets, n=1)
                meant = f" Did you mean '{close[0]}'?" if close else ""
                raise self.error(value.lines["of"], f"{_shown(pattern)} matches no set of the suite.{meant}")
            members += [member for member in found if member not in members]
        if not members:
            raise self.error(value.lines["of"], "'of' is empty, expected names of sets.")
        return Average(name, kind, tuple(members))
