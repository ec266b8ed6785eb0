"""Exact nearest neighbours: blocked matrix products and top-k over vectors that need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from arf_plugin.errors import FlagError

if TYPE_CHECKING:
    import torch

QUERY_BLOCK = 4096  # beyond these, larger blocks gain nothing
POOL_BLOCK = 16384
_SMALLEST = 256
_SORTED_AT_ONCE = 64  # rows of scores that are sorted in full because of a tie


def block_sizes(memory: int, dimension: int, k: int) -> tuple[int, int]:
    """Returns (queries, pool rows) per block, so that :func:`exact_search` allocates at most ``memory`` bytes.

    Raises:
        FlagError: if the memory does not suffice for the smallest blocks.
    """
    usable = int(0.8 * memory)  # the rest: the matrix product's own buffers, and what allocators keep back
    for pool in (POOL_BLOCK, POOL_BLOCK // 4, POOL_BLOCK // 16):
        fixed = pool * dimension * 12  # as stored, its copy on the device, and fp32
        per_query = 5 * pool + 40 * k * (_chunk(pool, k) or 1) + 100 * k + 16 * dimension
        queries = (usable - fixed) // per_query
        if queries >= _SMALLEST:
            return min(queries, QUERY_BLOCK), pool
    least = int((fixed + _SMALLEST * per_query) / 0.8)
    raise FlagError(
        f"--memory {memory / 2**20:.0f}M is too little for {k} neighbours of {dimension}-dimensional vectors: expected "
        f"at least {least / 2**20 + 1:.0f}M."
    )


def exact_search(
    queries: np.ndarray,
    pool: Iterable[tuple[int, np.ndarray]],
    k: int,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k pool rows with the largest inner product for each query.

    Ties go to the lower row, so the result depends on the vectors alone and not on how they are cut into blocks.

    Args:
        queries: [n, d], unit norm, any float dtype.
        pool: blocks as (row number of the first vector, vectors [m, d]), rows ascending.
        k: neighbours per query.
        device: where to compute, in fp32.

    Returns:
        Rows [n, k] int64 and similarities [n, k] fp32, best first; k is cut to the number of pool rows.
    """
    import torch

    query = _on_device(queries, device)
    best_scores = torch.empty((len(query), 0), device=device)
    best_rows = torch.empty((len(query), 0), dtype=torch.int64, device=device)
    scratch = torch.empty(0, device=device)  # reused: fresh pages for every block cost a tenth of the time
    for first, vectors in pool:
        block = _on_device(vectors, device)
        if scratch.numel() < len(query) * len(block):
            scratch = torch.empty(len(query) * len(block), device=device)
        products = scratch[: len(query) * len(block)].view(len(query), len(block))
        scores, rows = top_k(torch.mm(query, block.T, out=products), k)
        # Rows of earlier blocks are lower and come first, so a stable sort keeps them first among equals.
        best_scores = torch.cat([best_scores, scores], dim=1)
        best_rows = torch.cat([best_rows, rows + first], dim=1)
        best_scores, order = best_scores.sort(dim=1, descending=True, stable=True)
        best_scores, best_rows = best_scores[:, :k], best_rows.gather(1, order[:, :k])
    return best_rows.cpu().numpy(), best_scores.cpu().numpy()


def top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top k of each row of scores [n, m], ties in order of their column.

    The k largest lie in the k chunks of columns with the largest maxima. Maxima are quick to find, and only those
    chunks are looked at closely: about a third of the time of ``torch.topk`` on whole rows.

    Returns:
        Values and columns, [n, min(k, m)] each, best first.
    """
    import torch

    width = scores.shape[1]
    chunk = _chunk(width, k)
    if chunk is None:
        return _top_k_by_column(scores, k)
    whole = width - width % chunk
    maxima = scores[:, :whole].unflatten(1, (-1, chunk)).amax(dim=2)
    bounds, chunks = maxima.topk(k + 1, dim=1)
    inside = torch.arange(chunk, device=scores.device)
    columns = (chunks[:, :k].sort(dim=1).values.unsqueeze(2) * chunk + inside).flatten(1)
    rest = torch.arange(whole, width, device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, order = _top_k_by_column(scores.gather(1, columns), k)
    columns = columns.gather(1, order)
    # Where the best chunk that was left out reaches the last value, that value may stand in it at a lower column.
    _sort_tied(scores, bounds[:, k] >= values[:, -1], values, columns)
    return values, columns


def _top_k_by_column(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`top_k`, by looking at every score.

    ``torch.topk`` breaks ties as it likes. One value more than needed shows whether a tie crosses the cut; those
    rows, which are few, are sorted in full.
    """
    if k >= scores.shape[1]:
        ordered, columns = scores.sort(dim=1, descending=True, stable=True)
        return ordered, columns
    values, columns = scores.topk(k + 1, dim=1)
    tied = values[:, k - 1] == values[:, k]
    values, columns = values[:, :k], columns[:, :k]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    _sort_tied(scores, tied, values, columns)
    return values, columns


def _sort_tied(scores: torch.Tensor, tied: torch.Tensor, values: torch.Tensor, columns: torch.Tensor) -> None:
    """Replaces the top k of tied rows by those of a stable sort, a few rows at a time."""
    import torch

    k = values.shape[1]
    for rows in torch.nonzero(tied).flatten().split(_SORTED_AT_ONCE):
        ordered, where = scores[rows].sort(dim=1, descending=True, stable=True)
        values[rows], columns[rows] = ordered[:, :k], where[:, :k]


def _chunk(width: int, k: int) -> int | None:
    """Columns per chunk that make the least work; None where looking at all columns is as quick."""
    chunk = 1 << max(0, int(np.log2(max(1, width / k)) / 2 + 0.5))  # about sqrt(width / k)
    return chunk if chunk >= 8 and width // chunk > k + 1 else None


def _on_device(vectors: np.ndarray, device: torch.device) -> torch.Tensor:
    """Moves vectors as they are stored, which may be half the bytes, and converts them to fp32 over there."""
    import torch

    return torch.from_numpy(np.require(vectors, requirements=["C", "W"])).to(device).float()
