"""What a rule finds."""

from __future__ import annotations

from dataclasses import dataclass

from arf_plugin.errors import AnchorSetError, ArfError

NAMED = 5  # examples of a kind in a message


@dataclass(frozen=True)
class Finding:
    """What a rule has found.

    Attributes:
        level: ``error``, ``warning`` or ``note``.
        text: a sentence or two.
        error: family of an error.
    """

    level: str
    text: str
    error: type[ArfError] = AnchorSetError
