"""Pairs that say the same twice, and pool items that show evaluation images.

Both are looked for among the candidates of a selection only: what no query has found cannot become an anchor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arf_plugin.errors import FlagError
from arf_plugin.pipeline.embeddings import Embeddings, same_model

if TYPE_CHECKING:
    import torch

BLOCK = 4096


@dataclass(frozen=True)
class Dropped:
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
        import torch

        dropped = []
        for block, vectors in _blocks(pool, rows, device):
            best = torch.full((len(block),), -2.0, device=device)
            place = torch.zeros((len(block),), dtype=torch.int64, device=device)
            start = 0
            for folder in self.folders:
                for others, theirs in _blocks(folder, np.arange(folder.rows), device):
                    found, column = (vectors @ theirs.T).max(dim=1)
                    better = found > best
                    best = torch.where(better, found, best)
                    place = torch.where(better, column + (start + int(others[0])), place)
                start += folder.rows
            for i in torch.nonzero(best >= self.similarity).flatten().tolist():
                dropped.append(Dropped(int(block[i]), "excluded", int(place[i]), float(best[i])))
        return [Dropped(d.row, d.reason, self._name(int(d.near)), d.similarity) for d in dropped]

    def _name(self, place: int) -> str:
        """``FOLDER:ID`` of an image, by its row number through all folders."""
        for folder in self.folders:
            if place < folder.rows:
                columns = folder.take(np.array([place]), ["id", "image_path"]).to_pylist()[0]
                return f"{folder.folder.name}:{columns['id'] or columns['image_path']}"
            place -= folder.rows
        raise IndexError(place)


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

    Each block is compared with what was kept before, so memory is bounded however many duplicates there are; the
    work grows with the square of the number of rows that are kept.
    """
    import torch

    kept = np.zeros(0, np.int64)
    dropped = []
    for block, vectors in _blocks(pool, rows, device):
        free = np.ones(len(block), bool)
        for others, theirs in _blocks(pool, kept, device):
            best, column = (vectors @ theirs.T).max(dim=1)
            for i in torch.nonzero(best >= similarity).flatten().tolist():
                if free[i]:
                    free[i] = False
                    dropped.append(
                        Dropped(int(block[i]), "near duplicate", int(others[column[i]]), float(best[i]))
                    )
        among = torch.tril(vectors @ vectors.T, diagonal=-1).cpu().numpy()
        for i in np.flatnonzero(free & (among >= similarity).any(axis=1)):
            earlier = np.flatnonzero(free[:i] & (among[i, :i] >= similarity))
            if len(earlier):
                free[i] = False
                dropped.append(
                    Dropped(
                        int(block[i]), "near duplicate", int(block[earlier[0]]), float(among[i, earlier[0]])
                    )
                )
        kept = np.concatenate([kept, block[free]])
    return dropped


def _blocks(
    embeddings: Embeddings, rows: np.ndarray, device: torch.device
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Rows and their vectors in fp32."""
    import torch

    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        yield block, torch.from_numpy(embeddings.vectors(block)).to(device).float()
