"""A cell of the matrix is "upstream broken" where stock open_clip ends with the same error, told in its own words."""

from __future__ import annotations

import sys
from pathlib import Path

from support.trainer import Run

from arf_plugin.errors import did_you_mean

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts" / "versions"))

import cells  # noqa: E402


def test_our_parsers_hint_makes_no_other_error(tmp_path):
    error = "usage: main.py [-h]\nmain.py: error: unrecognized arguments: --fsdq"
    hint = did_you_mean("--fsdq", ["--fsdp"])
    assert hint
    ours, stock, other = (
        cells._last_error(Run(2, output, tmp_path))
        for output in (f"{error}.{hint}\n", f"{error}\n", f"{error} x.{hint}\n")
    )
    assert ours == stock == "error: unrecognized arguments: --fsdq" != other
