"""Finds which of many vectors are near given ones, in a faiss index: work grows far slower than with all pairs.

The index has cells (IVF), around means of the vectors that are nearest to ones drawn at random, and codes of 8 bits a
dimension, a quarter of fp32. What it finds are candidates: the caller computes their cosines from the vectors
themselves. It may miss some whose cell is not looked into; how many cells are is measured when it is made, on copies
that are just near enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_CALIBRATED = 8192  # vectors that are copied to see how many cells need to be looked into
_RECALL = 0.9995  # of such copies
_CANDIDATES = 16
_CODE_ERROR = 0.02  # of a cosine computed with codes
_AT_ONCE = 1024


class Cells(NamedTuple):
    """The cells that are nearest to some vectors: numbers [n, probes], and cosines to their centers."""

    numbers: np.ndarray
    cosines: np.ndarray


class NearIndex:
    """Vectors of unit norm, of which those near others are found.

    Args:
        sample: [m, d] fp32 vectors like those that will be added, in random order; `sample_for` says how many.
        blocks: those that will be added, in blocks.
        rows: how many they are.
        similarity: least cosine that is near.
    """

    def __init__(
        self, sample: np.ndarray, blocks: Iterable[np.ndarray], rows: int, similarity: float
    ) -> None:
        import faiss

        self._similarity = similarity
        self._centers = sample[: _cells_for(rows)]
        self.probes = 1  # cells that are looked into for a vector
        self._center(blocks)
        cells, dimension = self._centers.shape
        self._coarse = faiss.IndexFlatIP(dimension)
        self._coarse.add(self._centers)  # it counts as trained, and only the codes are learned
        self._index = faiss.IndexIVFScalarQuantizer(
            self._coarse, dimension, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
        )
        self._index.train(sample)
        self.probes = self._needed(sample[-_CALIBRATED:])
        self._index.nprobe = self.probes

    def cells(self, vectors: np.ndarray) -> Cells:
        """Looks up the cells of vectors [n, d] fp32."""
        import torch

        found: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(vectors), _AT_ONCE):
            block = torch.from_numpy(vectors[start : start + _AT_ONCE])
            cosines, numbers = torch.topk(block @ torch.from_numpy(self._centers).T, self.probes)
            found.append((numbers.numpy(), cosines.numpy()))
        return Cells(*(np.concatenate(part) for part in zip(*found, strict=True)))

    def add(self, vectors: np.ndarray, cells: Cells) -> None:
        """Adds vectors [n, d] fp32, n > 0, with their cells; they are counted on from 0."""
        from faiss.contrib.ivf_tools import add_preassigned

        add_preassigned(self._index, vectors, np.ascontiguousarray(cells.numbers[:, 0]))

    def candidates(self, vectors: np.ndarray, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
        """Those that may be near vectors [n, d] fp32, as pairs: row of `vectors` [c], ascending, and number [c]."""
        from faiss.contrib.ivf_tools import search_preassigned

        if not self._index.ntotal:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        most = min(_CANDIDATES, self._index.ntotal)
        scores, numbers = search_preassigned(self._index, vectors, most, cells.numbers, cells.cosines)
        near = (numbers >= 0) & (scores >= self._similarity - _CODE_ERROR)
        return np.nonzero(near)[0], numbers[near]

    def _center(self, blocks: Iterable[np.ndarray]) -> None:
        """Moves each center to the direction of the mean of its vectors, which it is nearer to: one step of k-means."""
        sums = np.zeros_like(self._centers)
        for block in blocks:
            of = self.cells(block).numbers[:, 0]
            order = np.argsort(of, kind="stable")
            cells, starts = np.unique(of[order], return_index=True)
            sums[cells] += np.add.reduceat(block[order], starts, axis=0)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        self._centers = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), self._centers)

    def _needed(self, vectors: np.ndarray) -> int:
        """Cells to look into for a copy at the least similarity to find its original."""
        noise = np.random.default_rng(0).standard_normal(vectors.shape, np.float32)
        noise -= (noise * vectors).sum(1, keepdims=True) * vectors
        noise /= np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-12)
        copies = self._similarity * vectors + math.sqrt(1 - self._similarity**2) * noise
        own = self.cells(vectors).numbers
        ranks = []
        for start in range(0, len(vectors), _AT_ONCE):
            scores = copies[start : start + _AT_ONCE] @ self._centers.T
            of_own = np.take_along_axis(scores, own[start : start + _AT_ONCE], axis=1)
            ranks.append((scores > of_own).sum(axis=1))
        rank = np.quantile(np.concatenate(ranks), _RECALL, method="higher")
        return min(int(rank) + 1, len(self._centers))


def sample_for(rows: int) -> int:
    """How many of so many vectors an index is made with."""
    return min(rows, _cells_for(rows) + _CALIBRATED)


def _cells_for(rows: int) -> int:
    return max(1, min(rows, round(8 * math.sqrt(rows))))
