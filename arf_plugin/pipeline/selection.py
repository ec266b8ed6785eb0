"""Which hits of a search become pair anchors.

The paper leaves this open (section 3.3). Ours: hits below a floor are left out, and so are pairs that say the same
twice and pool items that show evaluation images, which are looked for among the hits only; each query chooses its
nearest pairs, up to a cap; a cap on the total is filled in rounds, so that every query has its nearest pair before any
has its second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from arf_plugin.errors import FlagError
from arf_plugin.pipeline.embeddings import Embeddings, same_model
from arf_plugin.pipeline.near import Cells, NearIndex, sample_for

if TYPE_CHECKING:
    import pandas as pd
    import torch

BLOCK = 4096
# All pairs of so many images are compared; among more, an index finds those that may be near.
EXACT = {"cpu": 40_000, "cuda": 1_000_000}
Parts = Sequence[tuple[Embeddings, np.ndarray]]  # rows [n] of some folders, numbered on from 0


@dataclass(frozen=True)
class Selection:
    """Which hits become pair anchors.

    Attributes:
        k: neighbours per query that are searched for.
        min_similarity: hits below are dropped; None keeps all.
        max_pairs: pairs in all; None keeps all.
        random: draws as many pairs at random from the pool instead, as a control.
        seed: of that draw.
        max_per_query: pairs that a query may choose, of those left by the floor, exclusion and duplicates.
        cap_by: how ``max_pairs`` is filled: ``queries`` in rounds, every query's nearest pair first; ``similarity``
            with the most similar pairs, whichever queries they belong to.
        near_duplicates: pairs whose image is at least this similar (cosine) to that of a better placed pair are
            dropped; None drops exact duplicates only.
    """

    k: int = 10
    min_similarity: float | None = None
    max_pairs: int | None = None
    random: bool = False
    seed: int = 0
    max_per_query: int | None = None
    cap_by: str = "queries"
    near_duplicates: float | None = None

    def __post_init__(self) -> None:
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise FlagError(f"--min-similarity {self.min_similarity}: a cosine lies between -1 and 1.")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise FlagError(f"--near-duplicates {self.near_duplicates}: expected a cosine above 0, up to 1.")


def ordered(hits: pd.DataFrame) -> pd.DataFrame:
    """Hits of a search, of columns query, row and similarity: by query, nearest first; ties go to the lower row."""
    return hits.sort_values(["query", "similarity", "row"], ascending=[True, False, True])


def candidates(hits: pd.DataFrame, cap_by: str = "queries") -> np.ndarray:
    """The pool rows of hits in order, each once, those to be taken first in front."""
    ranked = hits.assign(rank=hits.groupby("query").cumcount() if cap_by == "queries" else 0)
    rows: np.ndarray = ranked.sort_values(["rank", "similarity", "row"], ascending=[True, False, True])[
        "row"
    ].unique()
    return rows


def select(hits: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """The hits that choose a pair, of hits in order: by pool row, nearest query first.

    The floor, exclusion and duplicates come before.
    """
    if selection.max_per_query is not None:
        hits = hits[hits.groupby("query").cumcount() < selection.max_per_query]
    taken = candidates(hits, selection.cap_by)[: selection.max_pairs]
    return hits[hits["row"].isin(taken)].sort_values(
        ["row", "similarity", "query"], ascending=[True, False, True]
    )


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
        index = _index(images, self.similarity)
        for folder, numbers in images:
            for _, theirs in _blocks(folder, numbers):
                index.add(theirs.numpy(), index.cells(theirs.numpy()))
        first = 0
        for block, ours in _blocks(pool, rows):
            for i, number, cosine in _nearest(index, ours.numpy(), index.cells(ours.numpy()), images):
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
    index = _index([(pool, rows)], similarity) if _many(len(rows), len(rows), device) else None
    for block, vectors in _blocks(pool, rows, device):
        near: dict[int, tuple[int, float]] = {}  # place in the block: a kept row, and the cosine to it
        if index is not None:
            ours = vectors.cpu().numpy()
            cells = index.cells(ours)
            for i, number, cosine in _nearest(index, ours, cells, [(pool, kept)]):
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


def _index(parts: Parts, similarity: float) -> NearIndex:
    """An index for rows of folders, empty as yet."""
    total = sum(len(rows) for _, rows in parts)
    sample = _vectors(
        parts, np.sort(np.random.default_rng(0).choice(total, sample_for(total), replace=False))
    )
    blocks = (block.numpy() for folder, rows in parts for _, block in _blocks(folder, rows))
    return NearIndex(sample[np.random.default_rng(1).permutation(len(sample))], blocks, total, similarity)


def _nearest(
    index: NearIndex, vectors: np.ndarray, cells: Cells, parts: Parts
) -> Iterator[tuple[int, int, float]]:
    """Yields (row, number in the index, cosine) of the nearest candidate of those vectors [n, d] that have some.

    Cosines are computed from the vectors of the parts, which are those in the index.
    """
    rows, numbers = index.candidates(vectors, cells)
    cosines = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK):
        at = slice(start, start + BLOCK)
        cosines[at] = np.einsum("nd,nd->n", vectors[rows[at]], _vectors(parts, numbers[at]))
    order = np.lexsort((numbers, -cosines, rows))
    _, first = np.unique(rows[order], return_index=True)
    for place in order[first].tolist():
        yield int(rows[place]), int(numbers[place]), float(cosines[place])


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
