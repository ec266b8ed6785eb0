"""Decodes images in threads: in order, a bounded number ahead, in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def map_ordered(
    function: Callable[[_In], _Out], items: Iterable[_In], workers: int, ahead: int = 64
) -> Iterator[tuple[_In, _Out | Exception]]:
    """Applies a function in threads and yields (item, result or its exception) in the order of the items.

    PIL and torch release the interpreter's lock while they decode and resize, so threads suffice.

    Args:
        function: what to apply.
        items: consumed by the calling thread, at most ``ahead`` beyond what was yielded, and no further than it takes
            for the next result to be there.
        workers: threads; 0 applies the function in the calling thread.
        ahead: bound on the items in flight, which bounds memory.
    """

    def guarded(item: _In) -> _Out | Exception:
        try:
            return function(item)
        except Exception as cause:
            return cause

    if workers <= 0:
        for item in items:
            yield item, guarded(item)
        return
    pending: deque[tuple[_In, Future[_Out | Exception]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(guarded, item)))
                if len(pending) >= ahead or pending[0][1].done():
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def decoded_batches(
    samples: Iterable[_In],
    decode: Callable[[_In], _Out],
    batch_size: int,
    workers: int,
    reject: Callable[[_In, str], object],
) -> Iterator[tuple[list[_In], list[_Out]]]:
    """Yields full batches of samples and what ``decode`` makes of them, in order; the last may be smaller.

    Args:
        samples: what to decode.
        decode: runs in threads; raises an exception with the reason to leave a sample out.
        batch_size: samples per batch.
        workers: threads; see :func:`map_ordered`.
        reject: called with each sample that is left out, and the reason.
    """
    kept: list[_In] = []
    found: list[_Out] = []
    for sample, result in map_ordered(decode, samples, workers, ahead=2 * batch_size):
        if isinstance(result, Exception):
            reject(sample, str(result))
            continue
        kept.append(sample)
        found.append(result)
        if len(kept) == batch_size:
            yield kept, found
            kept, found = [], []
    if kept:
        yield kept, found
