"""Columns of text as their bytes, and 64-bit digests of all texts of a column at once.

Python's hash functions take one text at a time, and no Arrow function gives a hash; five million calls are seconds.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pyarrow as pa

_MASK = (1 << 64) - 1
# Odd constants of good mixing: those of Steele, Lea and Flood's SplitMix64 (OOPSLA 2014).
_START, _STEP = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_LONG = 1 << 12  # bytes beyond which a text has a hash function of Python's to itself


def text_bytes(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The offsets [n + 1] of a ``large_string`` column's texts, from 0, and their bytes [size]; no copy is made."""
    offsets = np.frombuffer(column.buffers()[1] or bytes(8), np.int64)
    offsets = offsets[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], data


def digests(column: pa.Array) -> np.ndarray:
    """The `digest` [n], uint64, of each text of a ``large_string`` column without gaps.

    Eight bytes at a time, as many rounds as the longest text needs.
    """
    offsets, data = text_bytes(column)
    starts, lengths = offsets[:-1], np.diff(offsets)
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))  # the word that begins at each byte
    state = lengths.astype(np.uint64) * np.uint64(_START)
    short = lengths <= _LONG
    for position in range(0, int(lengths[short].max(initial=0)), 8):
        rows = np.flatnonzero((lengths > position) & short)
        # Bits of the next text, which leave the word at its upper end.
        beyond = (8 * np.maximum(position + 8 - lengths[rows], 0)).astype(np.uint64)
        word = words[starts[rows] + position] << beyond >> beyond
        mixed = (state[rows] ^ word) * np.uint64(_STEP)
        state[rows] = mixed ^ (mixed >> np.uint64(32))
    for row in np.flatnonzero(~short).tolist():
        state[row] = _digest(data[starts[row] : offsets[row + 1]].tobytes())
    return state


def digest(text: str) -> int:
    """A number of 64 bits that looks random but depends on the text alone.

    It is no cryptographic hash: who wants to can make texts of one digest.
    """
    return _digest(text.encode())


def _digest(data: bytes) -> int:
    if len(data) > _LONG:
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    count = -(-len(data) // 8)
    state = len(data) * _START & _MASK
    for word in struct.unpack(f"<{count}Q", data.ljust(8 * count, b"\0")):
        mixed = (state ^ word) * _STEP & _MASK
        state = mixed ^ mixed >> 32
    return state
