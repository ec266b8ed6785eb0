"""Caption files of every form: read where they hold text, refused in one sentence where not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arf_plugin.anchors.captions import caption_batches, list_caption_files
from arf_plugin.errors import AnchorSetError

IDS, TEXTS = ["a/1", "ü/2", "stra\\xdfe/3"], ["a cat", "naïve \x1b[31m", "日本"]


def write(folder: Path, ids=IDS, texts=TEXTS, name: str = "part-0.parquet", **columns) -> Path:
    table = pa.table({"id": ids, "caption": texts, **columns})
    (folder / "captions").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "captions" / name)
    return folder / "captions" / name


def read(folder: Path) -> list[tuple[str, str]]:
    fs, files = list_caption_files(str(folder))
    table = pa.concat_tables(batch for name in files for batch in caption_batches(fs, name))
    assert table.schema == pa.schema([("id", pa.large_string()), ("caption", pa.large_string())])
    return list(zip(table["id"].to_pylist(), table["caption"].to_pylist(), strict=True))


def refusal(folder: Path) -> str:
    with pytest.raises(AnchorSetError) as error:
        read(folder)
    said = str(error.value)
    assert len(said) < 800 and said.count("\n") <= 1
    return said


def encoded(values):
    return [value.encode() for value in values]


FORMS = {
    "string": lambda v: pa.array(v, pa.string()),
    "large_string": lambda v: pa.array(v, pa.large_string()),
    "string_view": lambda v: pa.array(v, pa.string_view()),
    "binary": lambda v: pa.array(encoded(v), pa.binary()),
    "large_binary": lambda v: pa.array(encoded(v), pa.large_binary()),
    "binary_view": lambda v: pa.array(encoded(v), pa.binary_view()),
    "dictionary": lambda v: pa.array(v).dictionary_encode(),
    "dictionary of bytes": lambda v: pa.array(encoded(v)).dictionary_encode(),
    "json": lambda v: pa.array(v, pa.json_()),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("column", ["ids", "texts"])
def test_every_form_of_text_is_read_without_loss(tmp_path, form, column):
    values = {"ids": IDS, "texts": TEXTS}
    write(tmp_path, **{column: form(values[column])})
    assert read(tmp_path) == list(zip(IDS, TEXTS, strict=True))


def test_bytes_of_one_length_are_text_if_they_are_utf8(tmp_path):
    write(tmp_path, ids=pa.array([b"ab", b"cd"], pa.binary(2)), texts=["x", "y"])
    assert read(tmp_path) == [("ab", "x"), ("cd", "y")]
    write(tmp_path, ids=pa.array([b"ab", b"c\xff"], pa.binary(2)), texts=["x", "y"])
    assert "row 1: id is not UTF-8 (invalid start byte at byte 1" in refusal(tmp_path)


OTHERS = {
    "list": pa.array([["a"], ["b"], []]),
    "struct": pa.array([{"id": "a"}] * 3),
    "decimal": pa.array([1, 2, 3], pa.decimal128(20)),
    "numbers": pa.array([1, 2, 3]),
    "floats": pa.array([1.0, np.nan, 2.0]),
    "times": pa.array([1, 2, 3], pa.timestamp("us")),
    "nothing": pa.nulls(3),
    "uuid": pa.array([b"0" * 16] * 3, pa.uuid()),
    "map": pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string())),
    "dictionary of lists": pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array([1, 2])),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_is_no_text_is_named(tmp_path, other):
    write(tmp_path, texts=other)
    assert "column 'caption' holds" in refusal(tmp_path) and "arf caption" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", " \n\t", None, "a\0b", "\ufeff", "\ufeff \ufeff"])
def test_a_caption_that_says_nothing_is_named_with_its_row(tmp_path, text):
    rows = 70_000  # more than are read at once
    write(tmp_path, [f"s/{row}" for row in range(rows)], ["x"] * (rows - 1) + [text])
    assert f"part-0.parquet, row {rows - 1}: caption is {text!r}; expected non-empty text" in refusal(
        tmp_path
    )


def test_odd_columns(tmp_path):
    write(
        tmp_path,
        **{"id.x": ["1", "2", "3"], "x": [{"id": "nested"}] * 3, "\x1b[31m": [1, 2, 3], "": [1, 2, 3]},
    )
    assert read(tmp_path) == list(zip(IDS, TEXTS, strict=True))
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["id", "caption", "id"])
    pq.write_table(table, tmp_path / "captions" / "part-0.parquet")
    assert "has 2 columns 'id' (found: id, caption, id)" in refusal(tmp_path)
    pq.write_table(
        pa.table({f"column {n}": [1] for n in range(500)}), tmp_path / "captions" / "part-0.parquet"
    )
    assert "has no column 'id' and no column 'caption'" in refusal(tmp_path)
    pq.write_table(pa.table({"x": [{"id": "a", "caption": "b"}]}), tmp_path / "captions" / "part-0.parquet")
    assert "(found: x)" in refusal(tmp_path)


def test_bytes_that_a_file_calls_a_string(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"fine", b"caf\xe9", b"x"]).buffers())
    write(tmp_path, texts=bad)
    assert "row 1: caption is not UTF-8 (" in refusal(tmp_path) and "at byte 3" in refusal(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def thrift(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-60] + bytes(52) + content[-8:])


def gone(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def encrypted(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(b"PARE" + content[4:-4] + b"PARE")


@pytest.mark.parametrize("damage", [cut, pipe, thrift, gone, encrypted, lambda path: path.write_bytes(b"")])
def test_damaged_files_are_refused(tmp_path, damage):
    damage(write(tmp_path))
    assert "part-0.parquet" in refusal(tmp_path)


def test_hidden_files_and_folders_are_no_captions(tmp_path):
    write(tmp_path)
    write(tmp_path, ["b/1"], ["unfinished"], name=".incomplete-1@host@ab@part-1.parquet")
    write(tmp_path, ["b/2"], ["of another system"], name="._part-0.parquet")
    (tmp_path / "captions" / "folder.parquet").mkdir()
    assert [identity for identity, _ in read(tmp_path)] == IDS


def test_a_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    from arf_plugin.anchors import captions

    monkeypatch.setattr(captions, "_ALWAYS_READ", 1 << 20)
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int32)), pa.array(["x" * 500]))
    write(tmp_path, ids=text, texts=text)
    assert "unpacks to more than 1000 times its size" in refusal(tmp_path)


def test_no_files_are_no_captions(tmp_path):
    assert list_caption_files(str(tmp_path))[1] == []
