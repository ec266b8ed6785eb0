"""Suites and grids out of any YAML: read, or refused in one sentence that names the file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arf_plugin.ablation.reader import load_grid, ready
from arf_plugin.errors import EvaluationError, GridError
from arf_plugin.evaluation.suites import FOLDER, read_suite

pytest.importorskip("yaml")

SOUND = [path.read_text() for path in (*sorted(FOLDER.glob("*.yaml")), *ready().values())]
ODD = [
    *(
        "2025-99-99",
        "2025-01-01T99:99:99Z",
        "9" * 5000,
        "0x" + "f" * 5000,
        "1:" * 300 + "1",
        "-" + "1" * 400,
        ".nan",
    ),
    *(
        "!!binary x",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!python/object/apply:os.getcwd []",
        "!!int x",
        "!!timestamp x",
    ),
    *(
        "[" * 2000,
        "{a: " * 500,
        "? [a]\n: b",
        "<<: {a: b}",
        "&x [*x]",
        "*nowhere",
        "---\na: b\n---\nc: d",
        "%YAML 9",
    ),
    *(
        "\ufeff",
        "\0",
        "\x1b[31m",
        "\u2028",
        "!<tag:yaml.org,2002:str> a",
        '"\\ud800"',
        '"\\U00110000"',
        "${",
        "${x}",
    ),
    *(
        "null",
        "",
        "~",
        "{}",
        "[]",
        "true",
        "'",
        "|",
        ">",
        "@",
        "%",
        "`",
        "\t",
        "- - - -",
        ": :",
        "a: &a {b: *a}",
    ),
]


def outcome(read, path: Path, error: type[Exception]) -> str | None:
    started = time.monotonic()
    try:
        read(path)
    except error as cause:
        said = str(cause)
        assert said and len(said) < 1500
        assert time.monotonic() - started < 60
        return said
    assert time.monotonic() - started < 60
    return None


def both(path: Path) -> list[str | None]:
    return [
        outcome(read_suite, path, EvaluationError),
        outcome(lambda path: load_grid(str(path), path.parent / "out"), path, GridError),
    ]


@given(data=st.data())
def test_a_sound_file_with_something_odd_in_it(tmp_path, data):
    text = data.draw(st.sampled_from(SOUND))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        text = text[:start] + data.draw(st.sampled_from(ODD) | st.text(max_size=10)) + text[end:]
    (tmp_path / "file.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    both(tmp_path / "file.yaml")


@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-16")))
def test_any_bytes(tmp_path, content):
    (tmp_path / "file.yaml").write_bytes(content)
    assert all(said and "file.yaml" in said for said in both(tmp_path / "file.yaml"))


VALUES = st.recursive(
    st.sampled_from(ODD[:7]) | st.text(max_size=5) | st.integers().map(str),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(
            st.sampled_from(["name", "sets", "averages", "sources", "arms", "of", "kind"]), inner, max_size=4
        ).map(lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}")
    ),
)


@given(
    value=VALUES,
    key=st.sampled_from(["sets", "averages", "arms", "anchors", "seeds", "variables", "wise", "task"]),
)
def test_any_value_under_a_key_that_is_known(tmp_path, value, key):
    (tmp_path / "file.yaml").write_text(f"{key}: {value}\n", encoding="utf-8", errors="surrogatepass")
    both(tmp_path / "file.yaml")
