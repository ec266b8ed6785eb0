"""What the commands show while they work and when they are done: progress bars, aligned tables, Markdown tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from arf_plugin.untrusted import printable

if TYPE_CHECKING:
    from tqdm import tqdm


def progress(what: str, unit: str, total: int | None = None, *, quiet: bool = False) -> tqdm[Any]:
    """A progress bar with a rate, on stderr; it only counts where nobody watches, as in the logs of a cluster.

    Args:
        what: What is being done, in one or two words.
        unit: What is counted, such as ``images``.
        total: How many there are; None if that is not known.
        quiet: Show nothing.
    """
    from tqdm import tqdm  # not at the top: `arf --help` imports this module

    hidden = quiet or not sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=f" {unit}", disable=hidden, leave=False, file=sys.stderr)


def text_table(header: Sequence[str], lines: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """A table in columns of equal width.

    Args:
        header: Names of the columns.
        lines: Their cells; what they hold may come from outside.
        left: So many columns are aligned to the left; the others, which hold numbers, to the right.
    """
    cells = [[printable(str(cell)) for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; a bar within a cell is escaped."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
