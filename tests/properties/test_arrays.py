"""Vectors, parquet files and notes of embedding folders, damaged or hostile: read right, or refused in a sentence."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from arf_plugin.errors import PoolError
from arf_plugin.pipeline.embeddings import METADATA, ORIGIN, Embeddings, read_vectors
from arf_plugin.pipeline.pack import COLUMNS, PackStage
from arf_plugin.pipeline.pool_images import PoolTars
from arf_plugin.pipeline.tables import TEXT, WHOLE, count_rows, read_columns

WORK = tempfile.TemporaryDirectory()  # removed when the tests end


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=WORK.name))


def written(data: bytes, name: str) -> Path:
    path = new_folder() / name
    path.write_bytes(data)
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(text: str, version: int = 1) -> bytes:
    size = len(text.encode()).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


def refused_or_floats(path: Path) -> np.ndarray | None:
    try:
        vectors = read_vectors(path)
    except PoolError as cause:
        assert str(path) in str(cause) and "\n" not in str(cause)
        return None
    assert vectors.ndim == 2 and vectors.dtype in (np.float16, np.float32, np.float64)
    return vectors


GOOD = np.arange(12, dtype=np.float32).reshape(4, 3)
SHAPES = st.lists(st.integers(-(2**70), 2**70) | st.integers(-3, 5), max_size=3)
DTYPES = st.sampled_from(
    ["<f4", ">f4", "<f2", "<i4", "|O", "<c8", "|V3", "<U2", "<f16", "|b1", "[('a', '<f4')]", "", "("]
)


@given(st.integers(0, 200), st.binary(max_size=8), st.integers(0, 200))
def test_damaged_vector_files(at: int, change: bytes, cut: int):
    data = bytearray(npy(GOOD))
    data[at : at + len(change)] = change
    refused_or_floats(written(bytes(data[: len(data) - cut]), "img_emb_0.npy"))


@given(SHAPES, DTYPES, st.booleans(), st.sampled_from([1, 2, 3, 9]), st.text(max_size=5))
def test_headers_that_claim_anything(shape: list[int], dtype: str, fortran: bool, version: int, more: str):
    descr = dtype if dtype.startswith("[") else repr(dtype)
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': ({', '.join(map(str, shape))},){more}, }}\n"
    refused_or_floats(written(header(text, version) + bytes(48), "img_emb_0.npy"))


@given(st.sampled_from(["f2", "f4", "f8", ">f4", "i8", "c8", "O", "?", "S3", "U3", "M8[s]"]), st.booleans())
def test_arrays_of_any_type(dtype: str, fortran: bool):
    array = np.ones((4, 3)).astype(dtype)
    vectors = refused_or_floats(written(npy(np.asfortranarray(array) if fortran else array), "x_1.npy"))
    good = dtype in ("f2", "f4", "f8")
    assert (vectors is not None) == good
    if vectors is not None:
        np.testing.assert_array_equal(vectors, array)


def test_what_is_no_vector_file_at_all():
    archive = io.BytesIO()
    np.savez(archive, GOOD)
    for data in (b"", archive.getvalue(), b"\x93NUMPY", b"\x80\x04N.", npy(GOOD[0]), npy(np.float32(1)), npy(GOOD)[:-1],
                 header("(" * 3000), header("{'descr': " * 500), header("9" * 9000)):  # fmt: skip
        assert refused_or_floats(written(data, "img_emb_0.npy")) is None


# Parquet.

KEYS = ["a", "bé", "c"]
AS_TEXT = st.sampled_from(
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
)
AS_WHOLE = st.sampled_from([pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64()])
ENDS = pa.py_buffer(np.arange(4, dtype=np.int32).tobytes())
WRONG: list[tuple[str, Any]] = [
    ("image_path", pa.array([[1]] * 3)),
    ("image_path", pa.array([1, 2, 3])),
    ("image_path", pa.array([b"\xff", b"\xfe", b"x"])),
    ("image_path", pa.array([{"x": 1}] * 3)),
    ("image_path", pa.StringArray.from_buffers(3, ENDS, pa.py_buffer(b"\xff\xfea"))),
    ("caption", pa.array([True] * 3)),
    ("offset", pa.array([0, -2, 3])),
    ("offset", pa.array([0.0, 1.5, 2.0])),
    ("offset", pa.array(["0", "1", "2"])),
    ("offset", pa.array([1, 2, 2**64 - 1], pa.uint64())),
    ("size", pa.array([[1]] * 3)),
    ("sha256", pa.array([1.0] * 3)),
]  # fmt: skip


def parquet(columns: list[tuple[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table([column for _, column in columns], names=[name for name, _ in columns]), buffer)
    return buffer.getvalue()


@given(AS_TEXT, AS_WHOLE, st.booleans(), st.permutations(["image_path", "offset", "other"]))
def test_texts_and_numbers_stored_in_any_way(
    text: pa.DataType, whole: pa.DataType, coded: bool, order: list[str]
):
    keys = pa.array([key.encode() for key in KEYS]).cast(text)
    coded = coded and "view" not in str(text)  # which Arrow does not write
    columns = {
        "image_path": keys.dictionary_encode() if coded else keys,
        "offset": pa.array([1, 2, 3], whole),
    }
    columns["other"] = pa.array([[1], [], None])
    path = written(parquet([(name, columns[name]) for name in order]), "metadata_0.parquet")
    table = read_columns(path, {"offset": WHOLE, "image_path": TEXT, "caption": TEXT}, PoolError)
    assert table.to_pydict() == {"offset": [1, 2, 3], "image_path": KEYS, "caption": [None] * 3}


@given(st.sampled_from(WRONG))
def test_columns_of_other_types(wrong: tuple[str, Any]):
    path = written(parquet([wrong, ("more", pa.array([1, 2, 3]))]), "metadata_0.parquet")
    try:
        read_columns(path, METADATA, PoolError)
    except PoolError as cause:
        assert wrong[0] in str(cause) and str(path) in str(cause)
    else:
        raise AssertionError(wrong)


def test_a_column_that_is_there_twice():
    path = written(
        parquet([("caption", pa.array(["a"])), ("caption", pa.array(["b"]))]), "metadata_0.parquet"
    )
    try:
        read_columns(path, METADATA, PoolError)
    except PoolError as cause:
        assert "has 2 columns 'caption'" in str(cause)
    else:
        raise AssertionError


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=8), st.integers(0, 3000) | st.just(0))
def test_damaged_parquet_files(at: int, change: bytes, cut: int):
    columns = [("image_path", pa.array(KEYS)), ("caption", pa.array(KEYS)), ("offset", pa.array([1, 2, 3]))]
    data = bytearray(parquet(columns))
    at %= len(data)
    data[at : at + len(change)] = change
    path = written(bytes(data[: max(0, len(data) - cut)]), "metadata_0.parquet")
    try:
        rows = count_rows(path, PoolError)
        table = read_columns(path, METADATA, PoolError)
        assert table.num_rows == rows
        table.to_pylist()
    except PoolError as cause:
        assert str(path) in str(cause)


# Folders: what the readers of whole folders make of such files.

VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5)


@given(st.dictionaries(st.sampled_from(list(COLUMNS)), st.lists(VALUES, min_size=2, max_size=2), max_size=12))
def test_lists_of_pairs_that_hold_anything(changes: dict[str, list[Any]]):
    """Every row of a list that passes is one that the stage pack can go on with."""
    folder = new_folder()
    row: dict[str, Any] = {
        "image_path": "k",
        "id": "t/k",
        "tar": "t.tar",
        "ext": "jpg",
        "offset": 512,
        "size": 3,
    }
    row |= {
        "caption": "c",
        "sha256": "0" * 64,
        "similarity": 0.5,
        "queries": ["q"],
        "query_similarities": [0.5],
    }
    row |= {"query_count": 1}
    columns: dict[str, Any] = {name: pa.array([value] * 2) for name, value in row.items()}
    for name, values in changes.items():
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    for pool in (None, [str(folder / "t.tar")]):
        try:
            stage = PackStage(folder / "A", folder, pool)
            pairs = [pair for shard in stage.plan() for pair in shard.source]
            json.dumps(stage.config())
        except PoolError:
            continue
        for pair in pairs:
            assert json.loads(json.dumps(pair.provenance, allow_nan=False)) == pair.provenance
            assert isinstance(pair.key, str) and pair.offset >= -1 and pair.size >= -1


SCHEMES = [
    "pipe:",
    "PIPE:",
    "https://h/",
    "s3://b/",
    "simplecache::",
    "local::",
    "file:",
    "file://",
    "C:\\",
    "",
    "../",
    "::",
]


@given(
    st.sampled_from(SCHEMES),
    st.sampled_from(SCHEMES),
    st.text(max_size=8),
    st.sampled_from(["t.tar", "", "u.tar"]),
)
def test_recorded_locations_lead_to_local_files_or_what_the_user_names(
    one: str, other: str, text: str, name: str
):
    folder = new_folder()
    (folder / "t.tar").write_bytes(b"x")
    recorded = f"{one}{other}{text}{name}"
    for location in (recorded, f"{one}{folder}/{name}"):
        for pool in ([], ["s3://mine/t.tar"], [location]):
            try:
                found = [url for url, _ in PoolTars(pool, folder / "pairs.parquet").candidates(location)]
            except PoolError as cause:
                assert "--pool" in str(cause)
                continue
            assert found
            for url in found:
                assert url in pool or Path(url.removeprefix("file://").removeprefix("file:")).is_file()


def containers(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)


NOTES = st.recursive(VALUES, containers)


@given(NOTES | NOTES.map(lambda value: {"model": value}) | st.binary(max_size=6))
def test_notes_of_the_model(value: Any):
    folder = new_folder()
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    (folder / "img_emb/img_emb_0.npy").write_bytes(npy(np.float32([[1, 0]])))
    (folder / "metadata/metadata_0.parquet").write_bytes(parquet([("image_path", pa.array(["k"]))]))
    (folder / ORIGIN).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    try:
        embeddings = Embeddings(folder)
        json.dumps(embeddings.fingerprint())
        assert embeddings.model is None or all(isinstance(v, str) for v in embeddings.model.values())
    except PoolError as cause:
        assert ORIGIN in str(cause)
