"""Says in our words, and with its place, what pydantic found wrong: what, where, found, expected, what to do next.

Models of what comes from outside derive from :class:`Strict`; :func:`validated` reads a value with one::

    class Source(Strict):
        name: str
        shards: Listed[str]

    validated(Source, read_json(path, PoolError), str(path), PoolError, "Build it again with: arf embed ...")

Importing this module imports pydantic (0.1 s), so commands import it where they use it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from arf_plugin.errors import ArfError, did_you_mean
from arf_plugin.untrusted import printable

Location = tuple[int | str, ...]  # keys and indices from the root to a value
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

Listed = Annotated[tuple[T, ...], Field(strict=False)]  # JSON and YAML have lists, a frozen model tuples
_LONGEST_MESSAGE = 600  # characters of what a file may say in an error

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string": "a text",
    "bool": "true or false",
    **dict.fromkeys(("dict", "model"), "a mapping (key: value)"),
    **dict.fromkeys(("list", "tuple"), "a list"),
}
_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number, at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number, at most"),
    "too_short": ("min_length", "entries, at least"),
    "too_long": ("max_length", "entries, at most"),
    "string_too_short": ("min_length", "characters, at least"),
    "string_too_long": ("max_length", "characters, at most"),
    "string_pattern_mismatch": ("pattern", "a text like"),
}


class Strict(BaseModel):
    """Base of models of files: unknown keys are mistakes, and nothing is converted (``"1"`` is no number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def validated(
    model: type[M],
    value: object,
    where: str,
    error: type[ArfError],
    advice: str = "",
    locate: Callable[[Location], str] | None = None,
) -> M:
    """Reads plain values (of JSON, of YAML) with a model.

    Args:
        model: What is expected.
        value: What was found.
        where: What it is, such as the file's path, for messages.
        error: Family of the error.
        advice: What to do about it.
        locate: Gives the place of a value in place of `where`, such as ``grid.yaml, line 12``.

    Raises:
        error: One sentence with the first mistake; an unknown key comes before others, as it often explains them.
    """
    try:
        return model.model_validate(value)
    except ValidationError as cause:
        found = cause.errors(include_url=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    location = tuple(step for step in first["loc"] if step != "[key]")
    message = _message(first, location, model)
    if first["type"] == "missing":
        location = location[:-1]
    text = placed(where if locate is None else locate(location), location, message)
    raise error(f"{text} {printable(advice)}" if advice else text)


def placed(place: str, location: Location, message: str) -> str:
    """A message after the place of what it is about.

    >>> placed("grid.yaml, line 12", ("arms", 2, "flags", "lr"), "found a list.")
    'grid.yaml, line 12, arms[2].flags.lr: found a list.'
    """
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:80]}" for step in location)
    dotted = path.removeprefix(".")
    return printable(f"{place}{f', {dotted}' if dotted else ''}"[:300] + f": {message}"[:_LONGEST_MESSAGE])


def shown(value: object) -> str:
    """A value as messages show it: in quotes if it is a text, in short if it is large."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else printable(repr(value))[:80]


def _message(found: ErrorDetails, location: Location, model: type[BaseModel]) -> str:
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    if kind == "missing":
        return f"'{location[-1]}' is missing (found: {', '.join(map(str, value)) or 'nothing'})."
    if kind == "extra_forbidden":
        known = _keys(model, location[:-1])
        return f"unknown key. Expected one of: {', '.join(known)}.{did_you_mean(str(location[-1]), known)}"
    if kind in ("literal_error", "enum"):
        choices = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        return f"found {shown(value)}, expected one of: {', '.join(choices)}."
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        length = context.get("actual_length")
        number = shown(value).strip("'") if length is None else f"{length} of them"
        return f"found {number}, expected {words} {context[bound]}."
    expected = _EXPECTED.get(kind) or _EXPECTED.get(kind.partition("_")[0])
    if expected is None:
        return f"found {shown(value)}: {found['msg']}."
    return f"found {shown(value)}, expected {expected}."


def _keys(model: type[BaseModel], location: Location) -> list[str]:
    """Keys of the model that a location leads to; indices, and keys of plain mappings, stay within a model."""
    models = [model]
    for step in location:
        fields = {field.alias or name: field for one in models for name, field in one.model_fields.items()}
        if step in fields:
            models = list(_models(fields[step].annotation))
    return [field.alias or name for one in models for name, field in one.model_fields.items()]


def _models(annotation: Any) -> set[type[BaseModel]]:
    """The models that an annotation names, within lists and mappings, too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in _models(part)}
