"""Writes the generated tables into README.md, or checks that they are up to date.

    python scripts/tables.py            rewrite what stands between the markers
    python scripts/tables.py --check    exit with status 1 if that would change something

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from arf_plugin.hooks.table import PACKAGE, ROWS, SUPPORTED

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "quickstart" / "results.json"
TESTED = ("2.32.0", "3.3.0")  # by every run of scripts/test.sh
COLUMNS = {"id": "ID", "shift": "shift", "mono": "mono", "zero_shot": "zero-shot", "zero_shot_fine": "zero-shot fine"}
ARMS = {"before": "before", "flyp": "FLYP", "arf": "ARF", "flyp+wise": "FLYP + WiSE-FT 0.5", "arf+wise": "ARF + WiSE-FT 0.5"}


def versions() -> str:
    """Declared and tested releases."""
    return _table(
        ["declared", "tested on every change"], [[f"`{PACKAGE}{SUPPORTED}`", ", ".join(f"`{v}`" for v in TESTED)]]
    )


def hooks() -> str:
    """Every upstream name that the plugin touches."""
    rows = [[f"`{row.id}`", f"`{row.target}`", f"`{row.versions}`", row.when, row.why] for row in ROWS]
    return _table(["hook", "upstream name", "releases", "in force", "what for"], rows)


def results() -> str:
    """The quickstart's figures: mean and sample standard deviation over seeds, and every seed."""
    found = json.loads(RESULTS.read_text())
    rows = []
    for arm, name in ARMS.items():
        per_seed = [found["per_seed"][str(seed)][arm] for seed in found["seeds"]]
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in per_seed]
            mean = sum(values) / len(values)
            deviation = (sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5
            cells.append(f"{mean:.1f}" if arm == "before" else f"{mean:.1f} ± {deviation:.1f}")
        rows.append([name, *cells])
    summary = _table(["top-1 %", *COLUMNS.values()], rows)
    each = [
        [str(seed), *(f"{run['flyp'][c]:.1f} → {run['arf'][c]:.1f}" for c in COLUMNS)]
        for seed in found["seeds"]
        for run in [found["per_seed"][str(seed)]]
    ]
    return f"{summary}\n\nFLYP → ARF, seed by seed:\n\n{_table(['seed', *COLUMNS.values()], each)}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rewritten(text: str) -> str:
    """README's text with fresh tables."""
    makers = {"versions": versions, "hooks": hooks, "results": results}
    return re.sub(
        r"(<!-- generated: (\w+) -->\n).*?(\n<!-- end -->)",
        lambda match: match[1] + makers[match[2]]() + match[3],
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    before = README.read_text(encoding="utf-8")
    after = rewritten(before)
    if "--check" in sys.argv:
        if before != after:
            print("README.md: generated tables are out of date; run: python scripts/tables.py", file=sys.stderr)
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
