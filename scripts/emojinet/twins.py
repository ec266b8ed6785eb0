"""Measures which sets' drawings are near-copies of each other, so that twins do not straddle pool and tests.

python scripts/emojinet/twins.py --cache data/emojinet-cache

For two sets, the mean correlation between their drawings of the same concept (16 x 16 grey pixels), less that between
drawings of different concepts. `FAMILIES` in split.py keeps the sets together that this shows to be close, and the
monochrome versions of a house's set with their coloured originals.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from emojinet.build import draw_all
from emojinet.classes import GROUPS
from emojinet.join import join
from emojinet.sources import EMOJI_SETS
from emojinet.split import FAMILIES


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


def main() -> int:
    """Prints the pairs of sets, the closest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=Path("data/emojinet-cache"), help="build.py's cache")
    cache = parser.parse_args().cache
    concepts, vendors = join(cache / "unpacked")
    vendors = {
        vendor: {code: icon for code, icon in icons.items() if concepts[code].group in GROUPS}
        for vendor, icons in vendors.items()
    }
    drawn = draw_all(cache / "unpacked", cache, vendors, ())
    thumbnails = {
        vendor: {
            code: thumbnail(drawn[vendor][icon]) for code, icon in icons.items() if icon in drawn[vendor]
        }
        for vendor, icons in vendors.items()
    }
    names = [source.name for source in EMOJI_SETS]
    pairs = [
        (likeness(thumbnails[a], thumbnails[b]), a, b) for i, a in enumerate(names) for b in names[i + 1 :]
    ]
    for value, a, b in sorted(pairs, reverse=True):
        together = FAMILIES.get(a, a) == FAMILIES.get(b, b)
        print(f"{value:.3f}  {a} / {b}{'  (one family)' if together else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
