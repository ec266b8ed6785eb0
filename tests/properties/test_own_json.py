"""Our own bookkeeping, tampered with: one sentence, or the right result; never a traceback, never another result."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arf_plugin.anchors.manifest import begin_kind, problems_of, read_manifest, update_manifest
from arf_plugin.errors import AnchorSetError, ArfError, StageError
from arf_plugin.files import replacing
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.runner import describe, run_stage
from arf_plugin.pipeline.stage import Outcome, Shard, Stage

FILES = ("config.json", "plan.json", "finished.json", "done/00000.json", "done/00001.json")
SHARDS = [[1, 2], [3]]


class Doubling(Stage):
    """Writes the doubles of numbers, and notes itself in an anchor set."""

    name = "doubling"
    shard_inputs = "numbers"

    def config(self) -> dict[str, Any]:
        return {"factor": 2, "numbers": SHARDS}

    def plan(self) -> list[Shard]:
        return [Shard(i, f"{i:05d}", numbers, len(numbers)) for i, numbers in enumerate(SHARDS)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        return [self.out / "pairs" / f"{shard.name}.tar" for shard in shards]

    def input_digest(self, shard: Shard) -> str:
        return str(shard.source)

    def begin(self) -> None:
        begin_kind(self.out, "pairs")

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        with replacing(self.artifacts([shard])[0]) as path:
            path.write_text(json.dumps([2 * number for number in shard.source]))
        return Outcome(len(shard.source), len(shard.source))

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        update_manifest(self.out, "pairs", {"count": 3}, self.artifacts(shards))
        return {"sum": sum(sum(json.loads(path.read_text())) for path in self.artifacts(shards))}


def written(out: Path) -> dict[str, bytes]:
    """What others read of the folder."""
    paths = [*sorted((out / "pairs").iterdir()), out / "anchors.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def nested(depth: int, end: str) -> bytes:
    return b'{"a":' * depth + b"1" + end.encode() * depth


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**20, 10**30) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("format", "made_by", "config", "samples", "kept", "rejects", "sizes", "inputs", "finished", "shards", "sum",
        "pairs", "format_version", "written", "incomplete")  # fmt: skip


def tamperings() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """Ways to spoil a file."""

    def cut(data: bytes, share: float) -> bytes:
        return data[: int(len(data) * share)]

    def change(data: bytes, key: str, value: Any, drop: bool) -> bytes:
        found = json.loads(data)
        if isinstance(found, dict):
            if drop:
                found.pop(key, None)
            else:
                found[key] = value
        else:
            found = [*found, value]
        return json.dumps(found).encode()

    return st.one_of(
        st.binary(max_size=40).map(lambda new: lambda data: new),
        values.map(lambda new: lambda data: json.dumps(new).encode()),
        st.floats(0, 0.99).map(lambda share: lambda data: cut(data, share)),
        st.tuples(st.integers(1, 200_000), st.sampled_from(("}", ""))).map(
            lambda how: lambda data: nested(how[0], how[1])
        ),
        st.tuples(st.sampled_from(KEYS), values, st.booleans()).map(
            lambda how: lambda data: change(data, *how)
        ),
    )


@given(name=st.sampled_from(FILES), tamper=tamperings(), restart=st.booleans())
def test_tampered_bookkeeping(name: str, tamper: Callable[[bytes], bytes], restart: bool):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "A"
        run_stage(Doubling(out))
        expected = written(out)
        path = out / "work/doubling" / name
        path.write_bytes(tamper(path.read_bytes()))
        for options in (Execution(restart=restart), Execution()):
            try:
                describe(Doubling(out))
                summary = run_stage(Doubling(out), options)
            except ArfError as cause:
                assert isinstance(cause, StageError)
                assert str(path.parent) in str(cause) or "another configuration" in str(cause), cause
            else:
                assert summary["finished"] is True and written(out) == expected
        if name != "plan.json":  # a restart mends everything but the list of what it is to remove
            run_stage(Doubling(out), Execution(restart=True))
            assert written(out) == expected


@given(tamper=tamperings())
def test_tampered_manifests(tamper: Callable[[bytes], bytes]):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "A"
        run_stage(Doubling(out))
        assert problems_of(str(out)) == []
        path = out / "anchors.json"
        path.write_bytes(tamper(path.read_bytes()))
        try:
            read_manifest(out)
        except AnchorSetError as cause:
            assert str(path) in str(cause)
            assert problems_of(str(out)) != []
        else:
            problems_of(str(out))


PLANS = (
    *("../outside.txt", "pairs/../../outside.txt", "{absolute}", "link/outside.txt", "pairs/../anchors.json"),
    *(
        "anchors.json",
        "work/doubling",
        "work/doubling/config.json",
        "pairs",
        ".",
        "",
        "pairs/\0",
        7,
        None,
        ["x"],
    ),
)


@pytest.mark.parametrize("name", PLANS, ids=repr)
def test_a_plan_removes_nothing_but_artifacts(tmp_path: Path, name: Any):
    out, outside = tmp_path / "A", tmp_path / "outside.txt"
    outside.write_text("precious")
    run_stage(Doubling(out))
    (out / "link").symlink_to(tmp_path)
    expected = written(out)
    plan = out / "work/doubling/plan.json"
    entry = name.format(absolute=outside) if isinstance(name, str) else name
    plan.write_text(json.dumps([*json.loads(plan.read_text()), entry]))
    with pytest.raises(StageError, match="which is no artifact below"):
        run_stage(Doubling(out), Execution(restart=True))
    assert outside.read_text() == "precious" and written(out) == expected
    plan.unlink()
    assert run_stage(Doubling(out), Execution(restart=True))["sum"] == 12


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file(tmp_path: Path, name: str, kind: str):
    run_stage(Doubling(tmp_path))
    expected = written(tmp_path)
    path = tmp_path / "work/doubling" / name
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    try:
        summary = run_stage(Doubling(tmp_path))
    except StageError as cause:
        assert str(path) in str(cause)
        shutil.rmtree(path) if kind == "folder" else path.unlink()
        summary = run_stage(Doubling(tmp_path))
    assert summary["sum"] == 12 and written(tmp_path) == expected
