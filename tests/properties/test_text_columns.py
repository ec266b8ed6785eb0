"""Digests of whole columns are those of their texts one by one."""

from __future__ import annotations

import itertools

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from arf_plugin.anchors.text_columns import digest, digests, text_bytes

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=20)


@given(texts=TEXTS, skip=st.integers(0, 5))
def test_digests_of_a_column_are_those_of_its_texts(texts, skip):
    column = pa.array(texts, pa.large_string())[skip:]
    assert digests(column).tolist() == [digest(text) for text in texts[skip:]]


@given(texts=TEXTS, skip=st.integers(0, 5))
def test_the_bytes_of_a_slice_are_its_own(texts, skip):
    offsets, data = text_bytes(pa.array(texts, pa.large_string())[skip:])
    found = [data[a:b].tobytes().decode() for a, b in itertools.pairwise(offsets)]
    assert found == texts[skip:]


def test_a_long_text_has_its_digest_among_short_ones():
    texts = ["a", "x" * 5000, "b" * 4096, "c" * 4097]
    assert digests(pa.array(texts, pa.large_string())).tolist() == [digest(text) for text in texts]


def test_digests_differ_by_length_and_place():
    texts = [
        "",
        "\0",
        "\0\0",
        "a",
        "a\0",
        "\0a",
        *(f"imagenet-train-{n:06d}/{n:09d}" for n in range(100_000)),
    ]
    assert len(set(digests(pa.array(texts, pa.large_string())).tolist())) == len(texts)
