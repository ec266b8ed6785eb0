"""A stream of images, decoded in threads: in order, a bounded number ahead, in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Sample = TypeVar("_Sample")
_Loaded = TypeVar("_Loaded")


def map_ordered(
    function: Callable[[_Sample], _Loaded],
    items: Iterable[_Sample],
    workers: int,
    ahead: int = 64,
    stop: Callable[[], object] | None = None,
) -> Iterator[tuple[_Sample, _Loaded | Exception]]:
    """Applies a function in threads and yields (item, result or its exception) in the order of the items.

    PIL and torch release the interpreter's lock while they decode and resize, so threads suffice.

    Args:
        function: what to apply.
        items: consumed by the calling thread, at most ``ahead`` beyond what was yielded, and no further than it takes
            for the next result to be there.
        workers: threads; 0 applies the function in the calling thread.
        ahead: bound on the items in flight, which bounds memory.
        stop: called at the end, be it an early one: makes what is under way return soon, which the end waits for.
    """

    def guarded(item: _Sample) -> _Loaded | Exception:
        try:
            return function(item)
        except Exception as cause:
            return cause

    if workers <= 0:
        for item in items:
            yield item, guarded(item)
        return
    pending: deque[tuple[_Sample, Future[_Loaded | Exception]]] = deque()
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
            if stop is not None:
                stop()


def load_batches(
    samples: Iterable[_Sample],
    load: Callable[[_Sample], _Loaded],
    batch_size: int,
    workers: int,
    reject: Callable[[_Sample, Exception], object],
    stop: Callable[[], object] | None = None,
) -> Iterator[list[tuple[_Sample, _Loaded]]]:
    """Loads a stream of samples in threads and yields them in batches, in order.

    Args:
        samples: such as images as they are stored.
        load: decodes one.
        batch_size: samples in a batch; the last one has what is left.
        workers: threads; 0 loads in the calling thread.
        reject: told of a sample that cannot be loaded, and why; it is in no batch.
        stop: see :func:`map_ordered`.
    """
    batch: list[tuple[_Sample, _Loaded]] = []
    for sample, loaded in map_ordered(load, samples, workers, 2 * batch_size, stop):
        if isinstance(loaded, Exception):
            reject(sample, loaded)
            continue
        batch.append((sample, loaded))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
