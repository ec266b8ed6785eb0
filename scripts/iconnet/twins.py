"""Measures which icon sets' drawings are near-copies of each other, so that twins do not straddle pool and tests.

python scripts/iconnet/twins.py --cache data/emojinet-cache

Compared are the plain line drawings, and where a set has none of a concept, its solid one. `FAMILIES` in split.py keeps
the sets together that this shows to be close.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.twins import print_pairs

from iconnet.build import prepare
from iconnet.sources import ICON_SETS
from iconnet.split import FAMILIES


def main() -> int:
    """Prints the pairs of sets, the closest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=Path("data/emojinet-cache"), help="build.py's cache")
    content = prepare(parser.parse_args().cache, ICON_SETS)
    drawn: dict[str, dict[str, bytes]] = defaultdict(dict)
    for drawing in sorted(content.places, key=lambda d: (d.style == "line", d.key)):
        if drawing.concept and not drawing.variant and drawing.style in ("line", "solid"):
            drawn[drawing.set][drawing.concept] = content.pngs[drawing.key]
    print_pairs(drawn, FAMILIES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
