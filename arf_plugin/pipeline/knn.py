"""Exact nearest neighbours: blocked matrix products and top-k over vectors that need not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def exact_search(
    queries: np.ndarray,
    pool: Iterable[tuple[int, np.ndarray]],
    k: int,
    device: torch.device,
    advance: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k pool rows with the largest inner product for each query.

    Ties go to the lower row, so the result depends on the vectors alone and not on how they are cut into blocks.

    Args:
        queries: [n, d], unit norm, any float dtype.
        pool: blocks as (row number of the first vector, vectors [m, d]), rows ascending.
        k: neighbours per query.
        device: where to compute, in fp32. The CUDA path has not been run by the authors.
        advance: called with the number of pool rows after each block.

    Returns:
        Rows [n, k] int64 and similarities [n, k] fp32, best first; k is cut to the number of pool rows.
    """
    import torch

    query = _on_device(queries, device)
    best_scores = torch.empty((len(query), 0), device=device)
    best_rows = torch.empty((len(query), 0), dtype=torch.int64, device=device)
    for first, vectors in pool:
        block = _on_device(vectors, device)
        scores, rows = _top_k(query @ block.T, k)
        # Rows of earlier blocks are lower and come first, so a stable sort keeps them first among equals.
        best_scores = torch.cat([best_scores, scores], dim=1)
        best_rows = torch.cat([best_rows, rows + first], dim=1)
        best_scores, order = best_scores.sort(dim=1, descending=True, stable=True)
        best_scores, best_rows = best_scores[:, :k], best_rows.gather(1, order[:, :k])
        if advance is not None:
            advance(len(block))
    return best_rows.cpu().numpy(), best_scores.cpu().numpy()


def _on_device(vectors: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies vectors as they are stored, which may be half the bytes, and converts them to fp32 over there."""
    import torch

    return torch.from_numpy(np.array(vectors)).to(device).float()


def _top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top k of each row of scores [n, m], ties in order of their column.

    ``torch.topk`` breaks ties as it likes. One value more than needed shows whether a tie crosses the cut; those
    rows, which are few, are sorted in full.
    """
    import torch

    width = scores.shape[1]
    if k >= width:
        ordered, columns = scores.sort(dim=1, descending=True, stable=True)
        return ordered, columns
    values, columns = scores.topk(k + 1, dim=1)
    tied = torch.nonzero(values[:, k - 1] == values[:, k]).flatten()
    values, columns = values[:, :k], columns[:, :k]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if len(tied):
        full, where = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = full[:, :k], where[:, :k]
    return values, columns
