"""The checks of scripts/gpu_check.py. Each module has functions that take a `Context` and return an `Outcome`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for _folder in (ROOT, ROOT / "tests", ROOT / "scripts" / "bench"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
