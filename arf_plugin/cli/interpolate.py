"""``arf interpolate``."""

from __future__ import annotations

import argparse


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf interpolate``."""
