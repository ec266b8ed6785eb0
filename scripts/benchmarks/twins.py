"""Measures which sets' drawings are near-copies of each other.

For two sets, the mean correlation between their drawings of the same concept (16 x 16 grey pixels), less that between
drawings of different concepts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np


def thumbnail(png: bytes) -> np.ndarray:
    """A drawing as 256 grey values of zero mean and unit norm."""
    from PIL import Image

    grey = np.asarray(Image.open(io.BytesIO(png)).convert("L").resize((16, 16)), dtype=np.float64).ravel()
    grey -= grey.mean()
    return grey / (np.linalg.norm(grey) or 1.0)


def likeness(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Mean correlation over common concepts, less the mean over pairs of different concepts."""
    common = sorted(first.keys() & second.keys())
    a = np.stack([first[code] for code in common])
    b = np.stack([second[code] for code in common])
    products = a @ b.T
    same = float(np.trace(products)) / len(common)
    return same - (float(products.sum()) / len(common) - same) / (len(common) - 1)


def print_pairs(drawn: Mapping[str, Mapping[str, bytes]], families: Mapping[str, str]) -> None:
    """Prints the pairs of sets, the closest first.

    Args:
        drawn: PNGs by set and concept.
        families: the family of a set, where that is not the set alone.
    """
    thumbnails = {
        name: {concept: thumbnail(png) for concept, png in images.items()} for name, images in drawn.items()
    }
    names = list(thumbnails)
    pairs = [
        (likeness(thumbnails[a], thumbnails[b]), a, b) for i, a in enumerate(names) for b in names[i + 1 :]
    ]
    for value, a, b in sorted(pairs, reverse=True):
        together = families.get(a, a) == families.get(b, b)
        print(f"{value:.3f}  {a} / {b}{'  (one family)' if together else ''}")
