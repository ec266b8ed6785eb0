"""Which images are near others: pairs near excluded images, and pairs that say the same twice.

Few are compared all with all, in blocks. Among many, a faiss index finds candidates, whose cosines are computed from
the vectors themselves. It has cells (IVF), around means of the vectors that are nearest to ones drawn at random, and
codes of 8 bits a dimension, a quarter of fp32. It may miss some whose cell is not looked into; how many cells are is
measured when it is made, on copies that are just near enough.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from arf_plugin.errors import FlagError
from arf_plugin.pipeline.embeddings import Embeddings, same_model

if TYPE_CHECKING:
    import torch

BLOCK = 4096
# All pairs of so many images are compared; among more, an index finds those that may be near.
EXACT = {"cpu": 40_000, "cuda": 1_000_000}
Parts = Sequence[tuple[Embeddings, np.ndarray]]  # rows [n] of some folders, numbered on from 0
_CALIBRATED = 8192  # vectors that are copied to see how many cells need to be looked into
_RECALL = 0.9995  # of such copies
_CANDIDATES = 16
_CODE_ERROR = 0.02  # of a cosine computed with codes
_AT_ONCE = 1024


class Dropped(NamedTuple):
    """A pool row that was kept out of the anchors.

    Attributes:
        row: pool row.
        reason: ``excluded``, ``duplicate`` or ``near duplicate``.
        near: what it is near: an id of the excluded images, or the pool row of the pair that stands for it.
        similarity: cosine to it.
    """

    row: int
    reason: str
    near: str | int
    similarity: float


@dataclass(frozen=True)
class Exclusion:
    """Images that no anchor may show, such as those of the evaluation sets.

    Attributes:
        folders: their embeddings.
        similarity: pool items whose image is at least this similar (cosine) to one of them are excluded.
    """

    folders: tuple[Embeddings, ...]
    similarity: float = 0.95

    def check(self, pool: Embeddings) -> None:
        """Checks that all folders were embedded with the pool's model.

        Raises:
            PoolError: if not.
            FlagError: for a similarity that excludes everything.
        """
        if not 0 < self.similarity <= 1:
            raise FlagError(f"--exclude-similarity {self.similarity}: expected a cosine above 0, up to 1.")
        for folder in self.folders:
            same_model(folder, pool)
            for file in folder.files:
                file.check_unit()

    def near(self, pool: Embeddings, rows: np.ndarray, device: torch.device) -> list[Dropped]:
        """Returns those of the pool's rows [n] that are near an excluded image, with the nearest one."""
        find = self._by_comparison
        if _many(len(rows), sum(folder.rows for folder in self.folders), device):
            find = self._by_index
        near = [found for found in find(pool, rows, device) if found[2] >= self.similarity]
        names = self._names(np.unique([number for _, number, _ in near]))
        return [Dropped(int(rows[i]), "excluded", names[number], cosine) for i, number, cosine in near]

    def _by_comparison(
        self, pool: Embeddings, rows: np.ndarray, device: torch.device
    ) -> Iterator[tuple[int, int, float]]:
        """Yields for each of the rows its place, the number of the nearest image in all folders, and the cosine."""
        import torch

        first = 0
        for block, vectors in _blocks(pool, rows, device):
            best = torch.full((len(block),), -2.0, device=device)
            nearest = torch.zeros(len(block), dtype=torch.int64, device=device)
            start = 0
            for folder in self.folders:
                for _, theirs in _blocks(folder, np.arange(folder.rows), device):
                    found, column = (vectors @ theirs.T).max(dim=1)
                    nearest = torch.where(found > best, column + start, nearest)
                    best = torch.maximum(found, best)
                    start += len(theirs)
            yield from zip(range(first, first + len(block)), nearest.tolist(), best.tolist(), strict=True)
            first += len(block)

    def _by_index(
        self, pool: Embeddings, rows: np.ndarray, device: torch.device
    ) -> Iterator[tuple[int, int, float]]:
        """The same for those of the rows that may be near an image."""
        images = [(folder, np.arange(folder.rows)) for folder in self.folders]
        index = NearIndex(images, self.similarity)
        for folder, numbers in images:
            for _, theirs in _blocks(folder, numbers):
                index.add(theirs.numpy(), index.cells(theirs.numpy()))
        first = 0
        for block, ours in _blocks(pool, rows):
            for i, number, cosine in index.nearest(ours.numpy(), index.cells(ours.numpy()), images):
                yield first + i, number, cosine
            first += len(block)

    def _names(self, numbers: np.ndarray) -> dict[int, str]:
        """``FOLDER:ID`` of images by their numbers in all folders, which ascend."""
        names, first = {}, 0
        for folder in self.folders:
            inside = numbers[(numbers >= first) & (numbers < first + folder.rows)].astype(np.int64)
            found = folder.take(inside - first, ["id", "image_path"]).to_pylist()
            for number, columns in zip(inside.tolist(), found, strict=True):
                names[number] = f"{folder.folder.name}:{columns['id'] or columns['image_path']}"
            first += folder.rows
        return names


def exact_duplicates(pool: Embeddings, rows: np.ndarray) -> list[Dropped]:
    """Returns those of the rows [n] whose vector and caption equal those of an earlier one."""
    first: dict[bytes, int] = {}
    ascending = np.sort(rows)
    texts = pool.take(ascending, ["caption"])["caption"].to_pylist()
    captions = dict(zip(ascending.tolist(), texts, strict=True))
    dropped = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        for row, vector in zip(block.tolist(), pool.vectors(block), strict=True):
            if captions[row] is None:
                continue  # whether the texts are the same is not known
            key = hashlib.blake2b(vector.tobytes() + captions[row].encode(), digest_size=16).digest()
            if first.setdefault(key, row) != row:
                dropped.append(Dropped(row, "duplicate", first[key], 1.0))
    return dropped


def near_duplicates(
    pool: Embeddings, rows: np.ndarray, similarity: float, device: torch.device
) -> list[Dropped]:
    """Returns those of the rows [n] that are near an earlier one which is itself kept (cosine >= similarity).

    Each block is compared with what was kept before, so memory is bounded however many duplicates there are.
    """
    import torch

    kept = np.zeros(0, np.int64)
    dropped = []
    index = NearIndex([(pool, rows)], similarity) if _many(len(rows), len(rows), device) else None
    for block, vectors in _blocks(pool, rows, device):
        near: dict[int, tuple[int, float]] = {}  # place in the block: a kept row, and the cosine to it
        if index is not None:
            ours = vectors.cpu().numpy()
            cells = index.cells(ours)
            for i, number, cosine in index.nearest(ours, cells, [(pool, kept)]):
                if cosine >= similarity:
                    near[i] = int(kept[number]), cosine
        else:
            for others, theirs in _blocks(pool, kept, device):
                best, column = (vectors @ theirs.T).max(dim=1)
                for i in torch.nonzero(best >= similarity).flatten().tolist():
                    near.setdefault(i, (int(others[column[i]]), float(best[i])))
        free = ~np.isin(np.arange(len(block)), list(near))
        among = torch.tril(vectors @ vectors.T, diagonal=-1).cpu().numpy()
        for i in np.flatnonzero(free & (among >= similarity).any(axis=1)).tolist():
            before = np.flatnonzero(free[:i] & (among[i, :i] >= similarity))
            if len(before):
                free[i] = False
                near[i] = int(block[before[0]]), float(among[i, before[0]])
        dropped += [Dropped(int(block[i]), "near duplicate", *found) for i, found in near.items()]
        kept = np.concatenate([kept, block[free]])
        if index is not None and free.any():
            index.add(ours[free], Cells(*(part[free] for part in cells)))
    return dropped


def _many(one: int, other: int, device: torch.device) -> bool:
    """Whether so many times so many vectors are for an index, rather than all compared."""
    most = EXACT.get(device.type, EXACT["cpu"])
    if one * other <= most**2:
        return False
    if importlib.util.find_spec("faiss") is None:
        logging.warning(
            f"All of {one:,} images are compared with {other:,}, which takes long; with faiss an index would find "
            "those that are near: pip install 'arf-plugin[retrieval]'"
        )
        return False
    return True


def _vectors(parts: Parts, numbers: np.ndarray) -> np.ndarray:
    """Vectors [n, d] fp32 of rows by their numbers [n] in all parts."""
    found = np.empty((len(numbers), parts[0][0].dimension), np.float32)
    first = 0
    for folder, rows in parts:
        inside = (numbers >= first) & (numbers < first + len(rows))
        found[inside] = folder.vectors(rows[numbers[inside] - first])
        first += len(rows)
    return found


def _blocks(
    embeddings: Embeddings, rows: np.ndarray, device: torch.device | str = "cpu"
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Rows and their vectors in fp32."""
    import torch

    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        yield block, torch.from_numpy(embeddings.vectors(block)).to(device).float()


class Cells(NamedTuple):
    """The cells that are nearest to some vectors: numbers [n, probes], and cosines to their centers."""

    numbers: np.ndarray
    cosines: np.ndarray


class NearIndex:
    """Vectors of unit norm, of which those near others are found; empty at first.

    Args:
        parts: where the vectors are that will be added.
        similarity: least cosine that is near.
    """

    def __init__(self, parts: Parts, similarity: float) -> None:
        import faiss

        rows = sum(len(rows) for _, rows in parts)
        cells = max(1, min(rows, round(8 * math.sqrt(rows))))
        size = min(rows, cells + _CALIBRATED)
        sample = _vectors(parts, np.sort(np.random.default_rng(0).choice(rows, size, replace=False)))
        sample = sample[np.random.default_rng(1).permutation(size)]
        self._similarity, self._centers = similarity, sample[:cells]
        self._probes = 1  # cells that are looked into for a vector
        self._center(parts)
        dimension = sample.shape[1]
        self._coarse = faiss.IndexFlatIP(dimension)
        self._coarse.add(self._centers)  # it counts as trained, and only the codes are learned
        self._index = faiss.IndexIVFScalarQuantizer(
            self._coarse, dimension, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
        )
        self._index.train(sample)
        self._index.nprobe = self._probes = self._needed(sample[-_CALIBRATED:])

    def cells(self, vectors: np.ndarray) -> Cells:
        """Looks up the cells of vectors [n, d] fp32."""
        import torch

        found: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(vectors), _AT_ONCE):
            block = torch.from_numpy(vectors[start : start + _AT_ONCE])
            cosines, numbers = torch.topk(block @ torch.from_numpy(self._centers).T, self._probes)
            found.append((numbers.numpy(), cosines.numpy()))
        return Cells(*(np.concatenate(part) for part in zip(*found, strict=True)))

    def add(self, vectors: np.ndarray, cells: Cells) -> None:
        """Adds vectors [n, d] fp32, n > 0, with their cells; they are counted on from 0."""
        from faiss.contrib.ivf_tools import add_preassigned

        add_preassigned(self._index, vectors, np.ascontiguousarray(cells.numbers[:, 0]))

    def nearest(self, vectors: np.ndarray, cells: Cells, parts: Parts) -> Iterator[tuple[int, int, float]]:
        """Yields (row, number, cosine) of the nearest candidate of those vectors [n, d] fp32 that have some.

        Cosines are computed from the vectors of the parts, which are those that have been added.
        """
        from faiss.contrib.ivf_tools import search_preassigned

        if not self._index.ntotal:
            return
        most = min(_CANDIDATES, self._index.ntotal)
        scores, found = search_preassigned(self._index, vectors, most, cells.numbers, cells.cosines)
        near = (found >= 0) & (scores >= self._similarity - _CODE_ERROR)
        rows, numbers = np.nonzero(near)[0], found[near]
        cosines = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), BLOCK):
            at = slice(start, start + BLOCK)
            cosines[at] = np.einsum("nd,nd->n", vectors[rows[at]], _vectors(parts, numbers[at]))
        order = np.lexsort((numbers, -cosines, rows))
        _, first = np.unique(rows[order], return_index=True)
        for place in order[first].tolist():
            yield int(rows[place]), int(numbers[place]), float(cosines[place])

    def _center(self, parts: Parts) -> None:
        """Moves each center to the direction of the mean of its vectors, which it is nearer to: one step of k-means."""
        sums = np.zeros_like(self._centers)
        for block in (block.numpy() for folder, rows in parts for _, block in _blocks(folder, rows)):
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
