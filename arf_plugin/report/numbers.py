"""Numbers and places in what others have written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finite(value: Any) -> float | None:
    """A finite number as a float; None for everything else, truth values among it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def entries(value: Any) -> list[Any]:
    """A list as it is; an empty one for everything else."""
    return value if isinstance(value, list) else []


def is_local(name: str) -> bool:
    """Whether a place that stands in data is one of this machine, and nothing that is fetched or run."""
    return bool(name) and not ("://" in name or "::" in name or name.startswith("pipe:") or "\0" in name)


def is_below(name: str, roots: Sequence[Path]) -> bool:
    """Whether a place that stands in data is one of this machine below folders that the user has named.

    No address, no link that leads out, nothing hidden.
    """
    if not is_local(name):
        return False
    try:
        place = Path(name).resolve()
    except (OSError, ValueError, RuntimeError):  # zero bytes, links in a circle
        return False
    for root in roots:
        if place.is_relative_to(root):
            return not any(part.startswith(".") for part in place.relative_to(root).parts)
    return False
