"""Which images are near others: pairs near excluded images, and pairs that say the same twice.

Few are compared all with all, in blocks. Among many, hash tables find candidates, whose cosines are computed from the
vectors themselves; they may miss one in some thousand, see :class:`NearIndex`.
"""

from __future__ import annotations

import hashlib
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
_SAMPLED = 4096  # vectors that an index is planned by
_RECALL = 0.9995  # of copies that are just near enough
_CHAIN = 32  # vectors of a bucket that are looked at, at most
_SKETCH = 4  # words of 64 signs
_FLOPS, _LOOKUP = 5e10, 1e-7  # a second, and seconds; how they compare counts, on two cores
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
                index.add(index.keys(theirs.numpy()))
        first = 0
        for block, ours in _blocks(pool, rows):
            for i, number, cosine in index.nearest(ours.numpy(), index.keys(ours.numpy()), images):
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
    ascending = np.sort(rows)  # each file is read in one go, however the rows are ordered
    captions = pool.take(ascending, ["caption"])["caption"].to_pylist()
    keys: dict[int, bytes] = {}
    for start in range(0, len(rows), BLOCK):
        block = ascending[start : start + BLOCK]
        told = zip(block.tolist(), pool.vectors(block), captions[start : start + BLOCK], strict=True)
        for row, vector, caption in told:
            if caption is not None:  # else whether the texts are the same is not known
                keys[row] = hashlib.blake2b(vector.tobytes() + caption.encode(), digest_size=16).digest()
    first: dict[bytes, int] = {}
    dropped = []
    for row in filter(keys.__contains__, rows.tolist()):
        before = first.setdefault(keys[row], row)
        if before != row:
            dropped.append(Dropped(row, "duplicate", before, 1.0))
    return dropped


def near_duplicates(
    pool: Embeddings, rows: np.ndarray, similarity: float, device: torch.device
) -> list[Dropped]:
    """Returns those of the rows [n] that are near an earlier one which is itself kept (cosine >= similarity).

    Each block is compared with what was kept before, so memory is bounded however many duplicates there are.
    """
    import torch

    kept, count = np.empty(len(rows), np.int64), 0
    dropped = []
    index = NearIndex([(pool, rows)], similarity) if _many(len(rows), len(rows), device) else None
    for block, vectors in _blocks(pool, rows, device, BLOCK if index is None else _AT_ONCE):
        near: dict[int, tuple[int, float]] = {}  # place in the block: a kept row, and the cosine to it
        if index is not None:
            ours = vectors.cpu().numpy()
            keys = index.keys(ours)
            for i, number, cosine in index.nearest(ours, keys, [(pool, kept[:count])]):
                if cosine >= similarity:
                    near[i] = int(kept[number]), cosine
        else:
            for others, theirs in _blocks(pool, kept[:count], device):
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
        kept[count : count + free.sum()] = block[free]
        count += int(free.sum())
        if index is not None and free.any():
            index.add(Keys(*(part[free] for part in keys)))
    return dropped


def _many(one: int, other: int, device: torch.device) -> bool:
    """Whether so many times so many vectors are for an index, rather than all compared."""
    most = EXACT.get(device.type, EXACT["cpu"])
    return one * other > most**2


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
    embeddings: Embeddings, rows: np.ndarray, device: torch.device | str = "cpu", size: int = BLOCK
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Rows and their vectors in fp32."""
    import torch

    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield block, torch.from_numpy(embeddings.vectors(block)).to(device).float()


class Keys(NamedTuple):
    """What tables know vectors by: numbers of buckets [n, tables], and a sketch of signs [n, words]."""

    buckets: np.ndarray
    sketches: np.ndarray


class NearIndex:
    """Vectors of unit norm, of which those near others are found; empty at first.

    Locality-sensitive hashing by random hyperplanes (Charikar, STOC 2002). A key is the signs of a vector's products
    with some random directions: the nearer two vectors are, the more often they have the same. Each table has
    directions of its own, and a vector is compared with those that share a key with it in any of them. The more
    vectors there are, the longer are the keys, so that few share one by chance, and the more tables it takes to miss
    nothing.

    Both numbers are calculated from a sample of the vectors at hand: of all lengths the one that costs least, with as
    many tables as find all but one in 2,000 copies that are just near enough.

    Args:
        parts: where the vectors are that will be added.
        similarity: least cosine that is near.
    """

    def __init__(self, parts: Parts, similarity: float) -> None:
        rows = sum(len(rows) for _, rows in parts)
        rng = np.random.default_rng(0)
        sample = _vectors(parts, np.sort(rng.choice(rows, min(rows, _SAMPLED), replace=False)))
        copies = _copies(sample, similarity, rng)
        # Vectors of one model may all point into one half of space, where planes part few; around their mean, more.
        means = (np.zeros_like(sample[0]), sample.mean(axis=0))
        plans = [_plan(sample - mean, copies - mean, rows) for mean in means]
        (_, self._bits, self._tables), self._mean = min(
            zip(plans, means, strict=True), key=lambda one: one[0]
        )
        self._planes = rng.standard_normal((sample.shape[1], self._tables * self._bits), np.float32)
        self._width = max(1, math.ceil(math.log2(max(2, rows))))  # bits of a bucket's number
        self._latest = np.full((self._tables, 1 << self._width), -1, np.int32)  # of each bucket
        self._before = np.empty((self._tables, rows), np.int32)  # the one that came before in its bucket
        words = min(_SKETCH, self._planes.shape[1] // 64) or 1
        self._sketches = np.empty((rows, words), np.uint64)
        self.total = 0
        differ = _differ(self.keys(sample).sketches, self.keys(copies).sketches)
        self._most = int(np.quantile(differ, 0.9999, method="higher"))  # bits, of sketches of near ones

    def keys(self, vectors: np.ndarray) -> Keys:
        """Calculates the keys of vectors [n, d] fp32."""
        import torch

        centered = torch.from_numpy(np.ascontiguousarray(vectors - self._mean))
        signs = (centered @ torch.from_numpy(self._planes) > 0).numpy()
        words = self._sketches.shape[1]
        padded = np.packbits(signs[:, : 64 * words], axis=1)
        padded = np.pad(padded, ((0, 0), (0, 8 * words - padded.shape[1])))
        numbers = np.zeros((len(vectors), self._tables), np.uint64)
        for part in np.moveaxis(np.packbits(signs.reshape(len(vectors), self._tables, -1), axis=2), 2, 0):
            numbers = (numbers << np.uint64(8)) | part
        if self._bits > self._width:  # Fibonacci hashing
            numbers = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - self._width)
        elif padding := -self._bits % 8:
            numbers >>= np.uint64(padding)
        return Keys(numbers.astype(np.int64), np.ascontiguousarray(padded).view(np.uint64))

    def add(self, keys: Keys) -> None:
        """Adds vectors by their keys; they are counted on from 0."""
        count = len(keys.buckets)
        numbers = np.arange(self.total, self.total + count, dtype=np.int32)
        self._sketches[self.total : self.total + count] = keys.sketches
        self.total += count
        for latest, before, buckets in zip(self._latest, self._before, keys.buckets.T, strict=True):
            order = np.argsort(buckets, kind="stable")
            sorted_buckets, sorted_numbers = buckets[order], numbers[order]
            first = np.diff(sorted_buckets, prepend=-1) != 0
            earlier = np.roll(sorted_numbers, 1)
            earlier[first] = latest[sorted_buckets[first]]
            before[sorted_numbers] = earlier
            last = np.roll(first, -1)
            latest[sorted_buckets[last]] = sorted_numbers[last]

    def nearest(self, vectors: np.ndarray, keys: Keys, parts: Parts) -> Iterator[tuple[int, int, float]]:
        """Yields (row, number, cosine) of the nearest candidate of those vectors [n, d] fp32 that have some.

        Cosines are computed from the vectors of the parts, which are those that have been added.
        """
        pairs = np.unique(np.concatenate([np.zeros(0, np.int64), *self._candidates(keys)]))
        rows, numbers = np.divmod(pairs, max(1, self.total))
        cosines = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), BLOCK):
            at = slice(start, start + BLOCK)
            cosines[at] = np.einsum("nd,nd->n", vectors[rows[at]], _vectors(parts, numbers[at]))
        order = np.lexsort((numbers, -cosines, rows))
        _, first = np.unique(rows[order], return_index=True)
        for place in order[first].tolist():
            yield int(rows[place]), int(numbers[place]), float(cosines[place])

    def _candidates(self, keys: Keys) -> Iterator[np.ndarray]:
        """Yields row * total + number of those in one bucket, the latest ones first, whose sketches are alike."""
        for latest, before, buckets in zip(self._latest, self._before, keys.buckets.T, strict=True):
            numbers = latest[buckets]
            for _ in range(_CHAIN):
                rows = np.flatnonzero(numbers >= 0)
                if not len(rows):
                    break
                found = numbers[rows]
                alike = _differ(self._sketches[found], keys.sketches[rows]) <= self._most
                yield rows[alike] * self.total + found[alike]
                numbers = np.full(len(numbers), -1, np.int32)
                numbers[rows] = before[found]


def _copies(vectors: np.ndarray, similarity: float, rng: np.random.Generator) -> np.ndarray:
    """A vector [n, d] for each, that is just near enough."""
    noise = rng.standard_normal(vectors.shape, np.float32)
    noise -= (noise * vectors).sum(1, keepdims=True) * vectors
    noise /= np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-12)
    copies: np.ndarray = similarity * vectors + math.sqrt(max(0.0, 1 - similarity**2)) * noise
    return copies


def _plan(vectors: np.ndarray, copies: np.ndarray, rows: int) -> tuple[float, int, int]:
    """Seconds of looking up one of so many rows, about, with the best number of bits in a key, and of tables."""

    def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Shares of random planes that do not part two vectors [n]."""
        lengths = np.maximum(np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1), 1e-12)
        shares: np.ndarray = 1 - np.arccos(np.clip((one * other).sum(1) / lengths, -1, 1)) / math.pi
        return shares

    of_copies = alike(vectors, copies)
    others = np.concatenate([alike(vectors, np.roll(vectors, shift, axis=0)) for shift in range(1, 65)])
    plans = []
    for bits in range(8, 49):
        # Tables until all but so many copies have shared a key.
        missed, low, high = np.log1p(-(of_copies.astype(float) ** bits).clip(max=1 - 1e-12)), 1, 1 << 14
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if np.exp(middle * missed).mean() <= 1 - _RECALL else (middle + 1, high)
        met = min(_CHAIN, rows * float((others.astype(float) ** bits).mean()))
        each = 2 * bits * vectors.shape[1] / _FLOPS + _LOOKUP * (1 + met)
        plans.append((low * each, bits, low))
    return min(plans)


def _differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """In how many bits sketches [n, words] differ."""
    apart = one ^ other
    bits = (  # the first since NumPy 2
        np.bitwise_count(apart)
        if hasattr(np, "bitwise_count")
        else np.unpackbits(apart.view(np.uint8), axis=1)
    )
    counts: np.ndarray = bits.sum(axis=1, dtype=np.int64)
    return counts
