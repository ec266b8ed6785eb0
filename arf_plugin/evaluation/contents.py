"""What is in the images of a set: a digest of each, computed once and found again while no file is touched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arf_plugin.anchors.files import digest, file_digest, read_cache, stat_key, write_cache
from arf_plugin.errors import EvaluationError
from arf_plugin.untrusted import require_regular

_WORTH_CACHING = 1 << 24  # bytes; less is read again in no time
_WORTH_SHOWING = 1 << 28
# Nanoseconds: a file may change once more within the tick of the clock that it was read in.
_SETTLED = 2 * 10**9
_READERS, _READ_AHEAD = 8, 1024  # threads, and what is handed to them at a time


def digests_of_files(paths: Sequence[Path]) -> list[bytes]:
    """SHA-256 of each file.

    Raises:
        EvaluationError: one is missing, unreadable or no file.
    """
    total = 0
    try:
        for path in paths:
            require_regular(path, EvaluationError)
            total += path.stat().st_size
    except (OSError, ValueError) as cause:  # ValueError: a name that no file can have
        raise EvaluationError(
            f"{getattr(cause, 'filename', None) or path} cannot be read: "
            f"{getattr(cause, 'strerror', None) or cause}. Is the copy complete?"
        ) from cause

    def one(index: int) -> bytes:
        try:
            return bytes.fromhex(file_digest(paths[index]))
        except OSError as cause:
            raise EvaluationError(
                f"{paths[index]} cannot be read: {cause.strerror}. Is the copy complete?"
            ) from cause

    return cached_digests("files", paths, len(paths), total, one)


def cached_digests(
    kind: str, files: Sequence[Path], count: int, size: int, one: Callable[[int], bytes]
) -> list[bytes]:
    """Digests of the images of a set, computed once and found in the cache while no file is touched.

    Args:
        kind: which function `one` is.
        files: what the images are in.
        count: number of images.
        size: bytes to read.
        one: computes one image's digest.
    """
    from arf_plugin.pipeline.progress import Progress

    states = [state_of(path) for path in files]
    places = [str(path.absolute()) for path in files]
    key = digest(["evaluation-1", kind, count, places, states])
    if size >= _WORTH_CACHING:
        known = read_cache("evaluation", key, list)
        if known is not None and len(known) == count and all(_is_sha256(each) for each in known):
            return [bytes.fromhex(each) for each in known]
    started = time.time_ns()
    with (
        Progress("images' digests", count, shown=size >= _WORTH_SHOWING) as progress,
        ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers,
    ):
        found: list[bytes] = []
        for start in range(0, count, _READ_AHEAD):
            for each in readers.map(one, range(start, min(start + _READ_AHEAD, count))):
                found.append(each)
                progress.advance()
    # Times of change are the second and third of a state.
    settled = all(state is not None and started - max(state[1:3]) > _SETTLED for state in states)
    if size >= _WORTH_CACHING and settled:
        write_cache("evaluation", key, [each.hex() for each in found])
    return found


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def state_of(path: Path) -> list[int] | None:
    """What changes when a file is written to; None if it is not there."""
    try:
        return stat_key(path)
    except OSError:
        return None  # who reads it says so
