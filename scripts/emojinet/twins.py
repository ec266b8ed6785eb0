"""Measures which sets' drawings are near-copies of each other, so that twins do not straddle pool and tests.

python scripts/emojinet/twins.py --cache data/emojinet-cache

`FAMILIES` in split.py keeps the sets together that this shows to be close, and the
monochrome versions of a house's set with their coloured originals.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.twins import print_pairs

from emojinet.build import draw_all
from emojinet.classes import GROUPS
from emojinet.join import join
from emojinet.sources import EMOJI_SETS
from emojinet.split import FAMILIES


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
    print_pairs(
        {
            source.name: {
                code: drawn[source.name][icon]
                for code, icon in vendors[source.name].items()
                if icon in drawn[source.name]
            }
            for source in EMOJI_SETS
        },
        FAMILIES,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
