"""What pydantic finds wrong is said with its place, what was found and what was expected."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, field_validator

from arf_plugin.errors import PoolError
from arf_plugin.validation import Listed, Strict, validated


class Source(Strict):
    kind: Literal["csv", "tar"]
    rows: int | None = Field(default=None, ge=1)
    dash_ed: bool = Field(default=False, alias="dash-ed")


class Pool(Strict):
    name: str = Field(min_length=1)
    share: float = 1.0
    sources: Listed[Source] = Field(default=(), max_length=3)
    by_name: dict[str, Source] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _check(cls, name: str) -> str:
        if name == "odd":
            raise ValueError("the name 'odd' is taken. Choose another.")
        return name


def test_a_sound_value_is_read_and_frozen():
    pool = validated(Pool, {"name": "p", "share": 2, "sources": [{"kind": "csv"}]}, "p.json", PoolError)
    assert pool.share == 2.0 and pool.sources == (Source(kind="csv"),)
    with pytest.raises(ValueError, match="frozen"):
        pool.name = "q"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "p.json: 'name' is missing (found: nothing). Build it."),
        ([], "p.json: found a list, expected a mapping (key: value). Build it."),
        ({"name": 1}, "p.json, name: found 1, expected a text. Build it."),
        ({"name": "odd"}, "p.json, name: the name 'odd' is taken. Choose another. Build it."),
        ({"nmae": "p"}, "nmae: unknown key. Expected one of: name, share, sources, by_name. Did you mean 'name'?"),
        ({"name": ""}, "name: found , expected characters"),
        ({"name": "p", "share": "1"}, "share: found '1', expected a number."),
        ({"name": "p", "share": True}, "share: found true, expected a number."),
        ({"name": "p", "share": float("nan")}, "share: found nan, expected a finite number."),
        ({"name": "p", "share": None}, "share: found nothing, expected a number."),
        ({"name": "p", "sources": {}}, "sources: found a mapping, expected a list."),
        ({"name": "p", "sources": [{"kind": "csv"}] * 4}, "sources: found 4 of them, expected entries, at most 3."),
        ({"name": "p", "sources": [{"kind": "zip"}]}, "sources[0].kind: found 'zip', expected one of: csv, tar."),
        ({"name": "p", "sources": [{"kind": "csv", "rows": 0}]}, "rows: found 0, expected a number, at least 1."),
        ({"name": "p", "sources": [{"kind": "csv", "x": 0}]}, "x: unknown key. Expected one of: kind, rows, dash-ed"),
        ({"name": "p", "by_name": {"a": {"rows": 3}}}, "by_name.a: 'kind' is missing (found: rows)."),
        ({"name": "p", "by_name": {3: {"kind": "csv"}}}, "by_name[3]: found 3, expected a text."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence_with_its_place(value, message):
    with pytest.raises(PoolError) as caught:
        validated(Pool, value, "p.json", PoolError, "Build it.")
    assert message in str(caught.value)


def test_a_place_of_its_own_for_every_value_and_nothing_that_a_console_obeys():
    value = {"name": "p", "sources": [{"kind": "\x1b[31m" + "x" * 5000}]}
    with pytest.raises(PoolError) as caught:
        validated(Pool, value, "p", PoolError, locate=lambda location: f"p.yaml, line {len(location)}")
    text = str(caught.value)
    assert (
        text.startswith("p.yaml, line 3, sources[0].kind: found '") and len(text) < 400 and "\x1b" not in text
    )
