"""Whether the ids that a faiss index gives are the rows of a pool. An index says nothing of that itself.

An index may carry ids of its own (IndexIDMap, ids in inverted lists), or hold the vectors in another order: both would
give each query the pairs of others, and ids beyond the pool would read memory that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.errors import PoolError

if TYPE_CHECKING:
    from arf_plugin.pipeline.embeddings import Embeddings

SAMPLED = 2048  # rows that are compared; all of a pool that has no more
_WRAPPED = ("index", "base_index", "refine_index", "index_ivf", "storage")
_ROUNDING = 2e-3  # distance of unit vectors; fp16 rounds by less
_AGAIN = "Build the index of this folder again with: arf index"


def check_row_ids(index: Any, path: Path) -> None:
    """Checks that the ids of an index, and of all that it wraps, are 0, 1, 2 and so on.

    Raises:
        PoolError: for other ids, and for parts of different lengths.
    """
    import faiss

    for layer in _layers(index):
        if layer.ntotal != index.ntotal:
            raise PoolError(
                f"{path} is damaged: it has {index.ntotal} vectors, a part of it {layer.ntotal}. {_AGAIN}"
            )
        if isinstance(layer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
            ids = faiss.vector_to_array(layer.id_map)
            if not np.array_equal(ids, np.arange(layer.ntotal)):
                raise _foreign(path, layer, ids)
        if isinstance(layer, faiss.IndexIVF):
            layer.make_direct_map(False)  # one that came with the file would be believed
            _check_lists(layer, path)


def check_vectors(index: Any, path: Path, pool: Embeddings) -> None:
    """Compares vectors of an index with those of its pool, row by row: all of a small pool, else some of each file.

    A compressed index gives back what its compression made of a vector. That must be as near to the stored vector as
    the same compression of the stored vector is.

    Args:
        index: its ids have been checked.
        path: of the index.
        pool: with vectors, as many as the index has.

    Raises:
        PoolError: for an index of other vectors, or of these in another order.
    """
    rows = _sample(pool)
    stored = pool.vectors(rows).astype(np.float32)
    try:
        given = reconstruct(index, rows)
    except RuntimeError:  # of faiss: this kind of index cannot give its vectors back
        wrong = _not_found(index, stored, rows)
    else:
        wrong = _unlike(given, stored, _compressed(index, stored))
    if wrong.any():
        row = int(rows[np.flatnonzero(wrong)[0]])
        raise PoolError(
            f"{path} does not hold the vectors of {pool.folder} in its order: {wrong.sum()} of {len(rows)} rows that "
            f"were compared differ, row {row} first. {_AGAIN}"
        )


def check_found(rows: np.ndarray, similarities: np.ndarray, count: int, path: Path) -> None:
    """Checks what a search has returned: rows of the pool, or -1 for none, with similarities that are numbers.

    Raises:
        PoolError: for anything else.
    """
    if rows.size and (rows.min() < -1 or rows.max() >= count):
        bad = rows[(rows < -1) | (rows >= count)][0]
        raise PoolError(f"{path} found the id {bad}, which is no row of a pool of {count}. {_AGAIN}")
    if not np.isfinite(similarities[rows >= 0]).all():
        raise PoolError(f"{path} gives a similarity that is no finite number. {_AGAIN}")


def reconstruct(index: Any, rows: np.ndarray) -> np.ndarray:
    """Vectors [n, d] that an index gives back for rows [n]; its ids have been checked.

    Raises:
        RuntimeError: if this kind of index cannot.
    """
    import faiss

    index = _of_vectors(index, storage=False)
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        lists: Any = inverted.invlists
        # faiss reads through a null pointer for those (1.15.1)
        if type(faiss.downcast_InvertedLists(lists)).__name__ == "BlockInvertedLists":
            raise RuntimeError("its lists are packed for fast scans")
        inverted.make_direct_map()
    found: np.ndarray = index.reconstruct_batch(np.ascontiguousarray(rows, np.int64))
    return found


def _layers(index: Any) -> Iterator[Any]:
    import faiss

    pending = [index]
    while pending:
        layer = faiss.downcast_index(pending.pop())
        yield layer
        for name in _WRAPPED:
            inner = getattr(layer, name, None)
            if isinstance(inner, faiss.Index):
                pending.append(inner)


def _check_lists(layer: Any, path: Path) -> None:
    """Checks that the inverted lists hold each row once."""
    import faiss

    lists = layer.invlists
    seen, count = np.zeros(layer.ntotal, bool), 0
    for number in range(lists.nlist if lists is not None else 0):
        size = lists.list_size(number)
        if size == 0:
            continue
        pointer = lists.get_ids(number)
        ids = faiss.rev_swig_ptr(pointer, size).copy()
        lists.release_ids(number, pointer)
        if ids.min() < 0 or ids.max() >= layer.ntotal:
            raise _foreign(path, layer, ids)
        seen[ids] = True
        count += size
    merged = type(layer).__name__ == "IndexIVFFlatDedup"  # equal vectors are kept once
    if seen.sum() != count or (count != layer.ntotal and not merged):
        raise PoolError(
            f"{path} holds {count} of {layer.ntotal} rows, {count - seen.sum()} of them twice. {_AGAIN}"
        )


def _foreign(path: Path, layer: Any, ids: np.ndarray) -> PoolError:
    shown = ", ".join(map(str, ids[:4].tolist()))
    return PoolError(
        f"{path} has ids of its own ({type(layer).__name__}: {shown}, ...); expected the row numbers of the embedding "
        f"folder, from 0. {_AGAIN}"
    )


def _of_vectors(index: Any, *, storage: bool) -> Any:
    """The part of an index that has the vectors, whose ids are the same; with `storage` also below a graph."""
    import faiss

    layer: Any = faiss.downcast_index(index)
    while True:
        if isinstance(layer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
            inner = layer.index
        elif isinstance(layer, faiss.IndexRefine):
            inner = layer.refine_index
        elif storage and isinstance(getattr(layer, "storage", None), faiss.Index):
            inner = layer.storage
        else:
            return layer
        layer = faiss.downcast_index(inner)


def _sample(pool: Embeddings) -> np.ndarray:
    """Rows in ascending order: all, or the first and last ones of files and others at random."""
    if pool.rows <= SAMPLED:
        return np.arange(pool.rows)
    generator = np.random.default_rng(0)
    ends = np.array([row for file in pool.files for row in (file.first, file.first + file.rows - 1)])
    others = generator.integers(0, pool.rows, SAMPLED // 2)
    return np.unique(np.concatenate([generator.permutation(ends)[: SAMPLED // 2], others]))


def _compressed(index: Any, stored: np.ndarray) -> np.ndarray | None:
    """What the compression of an index makes of vectors [n, d]; None if it cannot be asked."""
    part = _of_vectors(index, storage=True)
    try:
        decoded: np.ndarray = part.sa_decode(part.sa_encode(np.ascontiguousarray(stored)))
    except RuntimeError:
        return None
    return decoded


def _unlike(given: np.ndarray, stored: np.ndarray, expected: np.ndarray | None) -> np.ndarray:
    """Which of the vectors [n, d] that an index gives cannot be the stored ones of the same rows."""
    import faiss

    wrong: np.ndarray = ~np.isfinite(given).all(axis=1)
    given = np.where(wrong[:, None], np.float32(0), given)
    squares = faiss.pairwise_distances(given, stored if expected is None else expected)
    distances = np.sqrt(np.maximum(squares, 0))
    closer = (distances < np.diagonal(distances)[:, None] - _ROUNDING).mean(axis=1)
    if expected is None:  # coarse compression may bring a few vectors nearer to others
        doubtful = closer > 0.5
        if doubtful.mean() > 0.05:
            wrong |= doubtful
    else:
        error, usual = (np.linalg.norm(vectors - stored, axis=1) for vectors in (given, expected))
        wrong |= (error > 1.25 * usual + _ROUNDING) | (closer > 0.05)
    return wrong


def _not_found(index: Any, stored: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which rows [n] a search by their own vectors does not find, if that is half of them; else none."""
    k = min(1000, max(1, index.ntotal // 20))
    found = index.search(np.ascontiguousarray(stored), k)[1]
    missed = ~(found == rows[:, None]).any(axis=1)
    return missed if missed.mean() > 0.5 else np.zeros(len(rows), bool)
