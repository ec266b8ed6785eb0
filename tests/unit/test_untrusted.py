"""Text and JSON of others: bounded, and one sentence for what is wrong."""

from __future__ import annotations

import os

import pytest

from arf_plugin.errors import AnchorSetError, ArfError
from arf_plugin.untrusted import (
    parse_json,
    printable,
    read_json,
    require_fields,
    require_regular,
    split_lines,
    utf8,
)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"text"',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"s": "\\ud800"}',
        b"\xff\xfe{}",
        b"\x00" * 100,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_json_that_is_wrong_is_one_sentence(data):
    with pytest.raises(AnchorSetError, match=r"^X "):
        parse_json(data, "X", AnchorSetError)


def test_json_with_a_byte_order_mark_and_pairs_of_surrogates_is_read():
    assert parse_json(b"\xef\xbb\xbf" + rb'{"a": "\ud83d\ude00"}', "X", ArfError) == {"a": "\U0001f600"}


def test_missing_file_and_fifo(tmp_path):
    with pytest.raises(AnchorSetError, match="cannot be read"):
        read_json(tmp_path / "a.json", AnchorSetError)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AnchorSetError, match="pipe"):
        read_json(tmp_path / "fifo", AnchorSetError)
    require_regular(tmp_path / "not there", ArfError)


def test_fields():
    require_fields({"a": 1, "b": None}, {"a": int, "b": (str, type(None))}, "X", ArfError)
    with pytest.raises(ArfError, match="'a' is True, expected a whole number"):
        require_fields({"a": True}, {"a": int}, "X", ArfError)
    with pytest.raises(ArfError, match="no field 'b'"):
        require_fields({"a": 1}, {"b": int}, "X", ArfError)


def test_console_sees_no_control_sequences():
    assert (
        printable("a\x1b[31mb\x9b\u202e\u2028\udcdf\tü\n😀") == "a\\x1b[31mb\\x9b\\u202e\\u2028\\xdf\tü\n😀"
    )


def test_lines_are_those_of_editors():
    assert split_lines("\ufeffcat\r\ndog\u2028x\rfox\x85y\n") == ["cat", "dog\u2028x", "fox\x85y", ""]


def test_bytes_of_names_become_text():
    assert utf8(os.fsdecode(b"stra\xdfe")) == "stra\\xdfe"
    assert utf8("straße") == "straße"
