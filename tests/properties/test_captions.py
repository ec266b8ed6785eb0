"""Caption files and the sorted file that is made of them: what was written is read, and damage is said or mended."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from arf_plugin.anchors.captions import caption_batches
from arf_plugin.data.captions import open_captions
from arf_plugin.errors import AnchorSetError
from arf_plugin.untrusted import utf8

LOCAL = fsspec.filesystem("file")
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda text: text.strip().strip("\ufeff").strip())
NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name).map(os.fsdecode)
ROWS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)
KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


def as_column(values: list[str], kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind) if "string" in str(kind) else pa.array([v.encode() for v in values], kind)


def parquet(rows, ids=KINDS[0], texts=KINDS[0], **options) -> bytes:
    table = {"id": as_column([i for i, _ in rows], ids), "caption": as_column([t for _, t in rows], texts)}
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer, **options)
    return buffer.getvalue()


def write(folder: Path, content: bytes) -> str:
    file = folder / "captions" / "part.parquet"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return str(file)


def damaged(data, content: bytes) -> bytes:
    """Some bytes changed, some left out."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(changed)))
        del changed[start : start + data.draw(st.integers(0, len(changed)))]
    return bytes(changed)


@given(
    rows=ROWS,
    ids=st.sampled_from(KINDS),
    texts=st.sampled_from(KINDS),
    version=st.sampled_from(["1.0", "2.4", "2.6"]),
    dictionary=st.booleans(),
)
def test_every_form_is_read_as_it_was_written(tmp_path, rows, ids, texts, version, dictionary):
    name = write(tmp_path, parquet(rows, ids, texts, version=version, use_dictionary=dictionary))
    found = [row for batch in caption_batches(LOCAL, name) for row in batch.to_pylist()]
    assert [(row["id"], row["caption"]) for row in found] == rows


@given(data=st.data())
def test_damaged_parquet_is_read_or_refused(tmp_path, data):
    name = write(tmp_path, damaged(data, parquet(data.draw(ROWS))))
    try:
        batches = list(caption_batches(LOCAL, name))
    except AnchorSetError as error:
        assert "part.parquet" in str(error) and len(str(error)) < 1000
    else:
        for batch in batches:
            batch.validate(full=True)


@given(name=NAMES, text=TEXTS)
def test_a_sample_of_any_name_finds_its_caption(tmp_path, name, text):
    assume(utf8(name).strip().strip("\ufeff").strip())
    write(tmp_path, parquet([(utf8(name), text), ("another", "x")]))
    expected = [text, "x"] if utf8(name) == "another" else [text]
    assert open_captions(str(tmp_path)).get(name) == expected


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    write(folder, parquet([(f"s/{n}", f"caption {n}") for n in range(20)]))
    return folder


@given(data=st.data(), sealed=st.booleans())
def test_a_damaged_cache_never_answers(cached, monkeypatch, data, sealed):
    """Nothing but the right captions comes out of it; with a forged checksum, nothing but text, and no crash."""
    monkeypatch.setenv("ARF_CACHE_DIR", str(cached / "cache"))
    path = open_captions(str(cached)).path
    content = path.read_bytes()
    # The texts themselves are covered by the checksum alone.
    start, stop = content.index(b"caption 0") & ~63, content.index(b"caption 19") + 10
    around = damaged(data, content[:start]), damaged(data, content[stop:])
    changed = content[start:stop].join(around) if sealed else damaged(data, content)
    path.write_bytes(changed)
    if sealed:
        path.with_suffix(".crc32").write_text(f"{zlib.crc32(changed):08x}")
    store = open_captions(str(cached))
    found = [store.get(f"s/{n}") for n in range(20)]
    if not sealed:
        assert found == [[f"caption {n}"] for n in range(20)]
    assert all(type(text) is str for texts in found for text in texts)
