"""YAML of others: bounded, plain, and one sentence with the line."""

from __future__ import annotations

import os

import pytest

from arf_plugin.ablation.reader import load_grid
from arf_plugin.errors import EvaluationError, GridError
from arf_plugin.evaluation.suites import read_suite
from arf_plugin.plain_yaml import read

pytest.importorskip("yaml")


def laughs(depth: int, width: int = 10) -> str:
    lines = ["a0: &a0 [ha]"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


CASES = {
    "billion laughs": (laughs(10), r"line \d+: with its aliases filled in this has more than 100000 values"),
    "laughs of mappings": (
        "\n".join(["a0: &a0 {x: y}"] + [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 40)]),
        "with its aliases filled in",
    ),
    "a list in itself": ("sets: &a [*a]", "line 1: this value contains itself"),
    "a mapping in itself": ("sets: &a\n  b: {c: *a}", "contains itself"),
    "deep flow": ("sets: " + "[" * 10_000, "nested too deeply"),
    "deep block": ("\n".join(" " * n + "a:" for n in range(1000)), "nested too deeply"),
    "unknown alias": ("sets: *nowhere", "line 1 .*this is not YAML: found undefined alias"),
    "two documents": ("a: b\n---\nc: d", "line 2 .*this is not YAML"),
    "binary": ("sets: !!binary aGk=", "line 1: the tag tag:yaml.org,2002:binary cannot be read"),
    "a set": ("sets: !!set {a, b}", "the tag tag:yaml.org,2002:set"),
    "own tag": ("sets: !x y", "the tag !x cannot be read"),
    "key that is a list": ("a: b\n? [x]\n: y", "line 2: a key is no text"),
    "control character": ("sets: \x1b[31m", "this is not YAML: special characters are not allowed"),
    "zero byte": ("sets: \0", "this is not YAML"),
    "no unicode": (b"a: b\nc: caf\xe9", "line 2 cannot be read as text: .*Save the file as UTF-8"),
    "UTF-16": ("sets: {}".encode("utf-16"), "line 1 cannot be read as text"),
    "half a pair": ('sets: "\\ud800"', "this is not YAML|expected a mapping|'ud800'|line 1"),
    "beyond unicode": ('sets: "\\U00110000"', "cannot be read as YAML|this is not YAML"),
    "huge": (b"#" * (2 << 20), "has more than 1 MiB"),
    "empty": ("", "empty|expected a mapping"),
    "a number alone": ("9" * 5000, "expected a mapping"),
}


@pytest.mark.parametrize(("content", "expected"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", ["suite", "grid"])
def test_odd_files_are_refused_in_one_sentence(tmp_path, content, expected, kind):
    path = tmp_path / "own.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(EvaluationError if kind == "suite" else GridError, match=expected) as error:
        read_suite(path) if kind == "suite" else load_grid(str(path), tmp_path / "out")
    assert "own.yaml" in str(error.value) and len(str(error.value)) < 800 and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "loop"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "own.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(EvaluationError, match=r"own\.yaml"):
        read_suite(path)
    with pytest.raises(GridError, match=r"own\.yaml"):
        load_grid(str(path), tmp_path / "out")


SUITE = """\
description: {description}
sets:
  one: {{sources: [{{folders: one}}], classes: {classes}, templates: ['{template}']}}
averages:
  A: {{kind: id, of: [one]}}
"""


def suite(tmp_path, **values: str):
    (tmp_path / "own.yaml").write_text(
        SUITE.format(**({"description": "x", "classes": "2", "template": "a {c}"} | values))
    )
    return read_suite(tmp_path / "own.yaml")


def test_dates_are_texts(tmp_path):
    """An impossible one, too."""
    assert suite(tmp_path, description="2025-99-99").description == "2025-99-99"
    assert suite(tmp_path, description="2025-01-31").description == "2025-01-31"


@pytest.mark.parametrize(
    "number", ["9" * 5000, "0x10", "1_0", "1:30", "2025-99-99", "1e3", "true", "-1", "0"]
)
def test_what_is_no_number_of_classes_is_named(tmp_path, number):
    with pytest.raises(
        EvaluationError, match=r"line 3, sets\.one\.classes: found .*, expected a (whole )?number"
    ):
        suite(tmp_path, classes=number)


def test_a_byte_order_mark_and_aliases_are_fine(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + b"a: &x [1, 2]\nb: [*x, *x]\n")
    value, place = read(path, "own.yaml", "a test", GridError)
    assert value == {"a": ["1", "2"], "b": [["1", "2"], ["1", "2"]]}
    assert (place(("b", 7)), place(("c",))) == ("own.yaml, line 2", "own.yaml, line 1")


def test_variables_do_not_fill_without_end(tmp_path):
    (tmp_path / "own.yaml").write_text(
        f"name: {'${x}' * 20_000}\nvariables: {{x: {'y' * 1000}}}\nmodel: m\ntask: {{data: d}}\ntrainer: {{}}\n"
        "seeds: [0]\nevaluation: {suite: s, test: t}\narms: [{name: before, kind: before}]\n"
    )
    with pytest.raises(GridError, match="with its variables filled in this has more than"):
        load_grid(str(tmp_path / "own.yaml"), tmp_path / "out")
    (tmp_path / "list.yaml").write_text("name: ${x}\nvariables: {x: [a]}\n")
    with pytest.raises(GridError, match=r"variables\.x: a variable stands for a text"):
        load_grid(str(tmp_path / "list.yaml"), tmp_path / "out")
