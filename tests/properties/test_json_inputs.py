"""Records of runs, grids and choices that others have written: a report is made of them, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import report as made
from support.tars import write_tar

from arf_plugin.ablation.choose import Choices
from arf_plugin.ablation.reader import load_grid
from arf_plugin.errors import ArfError, GridError
from arf_plugin.report.gallery import build_gallery
from arf_plugin.report.report import Options, gather

ODD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        10**400,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "x" * 1000,
        "\0",
        "\ud800",
        "\x1b[31m",
    ),
    *(
        "/etc/passwd",
        "../..",
        "pipe:touch x",
        "https://a/b",
        "{0..99999999999}",
        "arf",
        "flyp",
        "x.yaml",
        "id",
        "a::b",
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": None},
        ["arf", "flyp"],
        {"arf": {"chosen": 0, "candidates": [{}], "by": "ID"}},
    ),
]
VALUES = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=5) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Where something can be put into a JSON value."""
    yield path
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield from places(item, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def spoiled(data, content: str) -> bytes:
    """JSON with an odd value somewhere, or text that is none."""
    if data.draw(st.integers(0, 9)) == 0:
        return data.draw(
            st.binary(max_size=20)
            | st.sampled_from(
                [b"[" * 10_000, b'{"a": ' + b"9" * 5000 + b"}", content[: len(content) // 2].encode()]
            )
        )
    value = json.loads(content)
    for _ in range(data.draw(st.integers(1, 3))):
        value = replaced(value, data.draw(st.sampled_from(list(places(value)))), data.draw(VALUES))
    return json.dumps(value).encode()


def one_sentence(error: ArfError) -> None:
    assert 0 < len(str(error)) < 3000


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    grid = made.Made(tmp_path_factory.mktemp("made")).usual()
    grid.add_run("arf", 0, made.step(0, 64, contrastive_loss=2.0))
    for row in grid.rows:
        row |= made.bits([n < row["metrics"]["top1"] for n in range(100)], row["set"])
    folder = grid.write()
    choices = {
        "arms": {"arf": {"by": "ID", "seed": 0, "chosen": 0, "candidates": [{"flags": {"lr": "1"}}]}},
        "wise": {},
    }
    (folder / "choices.json").write_text(json.dumps(choices | {"wise": {"arf": {"by": "ID", "chosen": 0.5}}}))
    return folder


@given(data=st.data())
def test_a_report_of_spoiled_records(grid, data):
    files = [
        grid / "grid.json",
        grid / "choices.json",
        *sorted(grid.glob("runs/*/run.json")),
        grid / "results.jsonl",
    ]
    file = data.draw(st.sampled_from(files))
    before = file.read_bytes()
    lines = before.decode().splitlines()
    if file.suffix == ".jsonl":
        number = data.draw(st.integers(0, len(lines) - 1))
        changed = spoiled(data, lines[number]).replace(b"\n", b" ")
        content = b"\n".join(
            [*(line.encode() for line in lines[:number]), changed, *map(str.encode, lines[number + 1 :])]
        )
    else:
        content = spoiled(data, before.decode())
    try:
        file.write_bytes(content + b"\n")
        gather([grid], Options())
    except ArfError as error:
        one_sentence(error)
    finally:
        file.write_bytes(before)


@given(data=st.data())
def test_a_gallery_of_spoiled_pairs(tmp_path, data):
    record = json.dumps({"queries": ["s/1", "s/2"], "query_similarities": [0.5, 0.25]})
    write_tar(
        tmp_path / "pairs" / "0.tar",
        {
            "0.png": data.draw(st.binary(max_size=20)),
            "0.txt": data.draw(st.binary(max_size=20)),
            "0.json": spoiled(data, record),
        },
    )
    try:
        gallery = build_gallery(tmp_path)
    except ArfError as error:
        one_sentence(error)
    else:
        for card in gallery.cards:
            assert all(pair.similarity is None or abs(pair.similarity) < float("inf") for pair in card.pairs)


GRID = """\
name: small
model: m
task: {data: d.tar, samples: 64}
trainer: {}
seeds: [0]
evaluation: {suite: emojinet, test: sets, validation: sets}
arms:
  - {name: before, kind: before}
  - {name: tuned, kind: baseline, choose: {over: [{lr: 1}, {lr: 2}], by: shift}}
"""


@given(data=st.data())
def test_choices_that_are_spoiled(tmp_path, data):
    (tmp_path / "grid.yaml").write_text(GRID)
    arm = load_grid(str(tmp_path / "grid.yaml"), tmp_path).arm("tuned")
    (tmp_path / "choices.json").unlink(missing_ok=True)
    Choices(tmp_path).decide(arm, 0, [{"shift": 1.0}, {"shift": 2.0}])
    content = (tmp_path / "choices.json").read_text()
    (tmp_path / "choices.json").write_bytes(spoiled(data, content))
    try:
        assert Choices(tmp_path).chosen(arm) in (None, 0, 1)
    except GridError as error:
        one_sentence(error)
