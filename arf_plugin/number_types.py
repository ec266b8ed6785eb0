"""Types for argparse: numbers that must lie in a range. The trainer's flags and the commands' share them."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def number_type(
    kind: Callable[[str], Number], allows: Callable[[Number], bool], expected: str
) -> Callable[[str], Number]:
    """Makes a type for argparse.

    Args:
        kind: `int` or `float`.
        allows: whether a number is in the range.
        expected: the range in words, for the error: "'x' is not EXPECTED".
    """

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            if allows(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    return parse
