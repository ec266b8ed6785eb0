"""What differs from what, and what is within noise: paired differences over seeds, and sentences that say so.

A difference is taken seed by seed (both arms share the seed), so what a seed does to both drops out. Its 95 % interval
is Student's, with one degree of freedom less than seeds. The test images leave an error of their own, which more
seeds do not lower; its bound here takes the two arms' mistakes for independent, though both see the same images, so the
true one is smaller. A verdict names the strictest claim that holds:

=============  =================================================================================================
``ahead``      the interval over seeds leaves out zero, and the mean exceeds 1.96 errors of the test images
``ahead here`` the interval over seeds leaves out zero: true of these test images, open for new ones
``level``      within noise, in either direction; so is every difference of a single seed below 1.96 image errors
``behind``, ``behind here``   likewise
=============  =================================================================================================

One seed alone gives no interval; its verdict is ``here`` at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arf_plugin.report.results import Figure

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond, the first terms of its expansion suffice.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

MEANINGS = {
    "ahead": "ahead, beyond both kinds of noise",
    "ahead here": "ahead over the seeds, within the error of the test images",
    "level": "level within noise",
    "behind here": "behind over the seeds, within the error of the test images",
    "behind": "behind, beyond both kinds of noise",
}


@dataclass(frozen=True)
class Difference(Figure):
    """One arm less another, in points of percent."""

    @property
    def error(self) -> float | None:
        """Standard error of the mean over seeds; None for one seed."""
        return None if self.deviation is None else self.deviation / math.sqrt(len(self.seeds))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval over seeds; None for one seed."""
        if self.error is None:
            return None
        half = t95(len(self.seeds) - 1) * self.error
        return self.mean - half, self.mean + half

    @property
    def every_seed(self) -> bool:
        """True if it has the same sign in every seed."""
        return all(value > 0 for value in self.seeds.values()) or all(
            value < 0 for value in self.seeds.values()
        )

    @property
    def verdict(self) -> str:
        """See the module's docstring."""
        side = "ahead" if self.mean > 0 else "behind"
        beyond_images = abs(self.mean) > 1.96 * self.image_error
        if self.interval is None:
            return f"{side} here" if beyond_images and self.mean else "level"
        low, high = self.interval
        if low <= 0 <= high:
            return "level"
        return side if beyond_images else f"{side} here"


def t95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t distribution."""
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96 + 2.372 / degrees + 2.823 / degrees**2


def difference(one: Figure, other: Figure) -> Difference | None:
    """One less the other over the seeds that both have; a model without a seed is compared with every seed.

    Returns:
        None if they share no seed.
    """
    if set(other.seeds) == {None}:
        pairs = {seed: value - other.seeds[None] for seed, value in one.seeds.items()}
    elif set(one.seeds) == {None}:
        pairs = {seed: one.seeds[None] - value for seed, value in other.seeds.items()}
    else:
        pairs = {seed: value - other.seeds[seed] for seed, value in one.seeds.items() if seed in other.seeds}
    return Difference(pairs, math.hypot(one.image_error, other.image_error)) if pairs else None


def signed(value: float) -> str:
    """A difference with its sign and one decimal; the minus is a minus."""
    return f"{value:+.1f}".replace("-", "−")


def sentence(one: str, other: str, differences: Mapping[str, Difference]) -> str:
    """Says in words how one arm compares with another on every average; empty if nothing compares.

    Args:
        one: label of the arm.
        other: label of the arm that it is compared with.
        differences: by average.
    """
    seeds = max((len(item.seeds) for item in differences.values()), default=0)
    parts = []
    for verdict in MEANINGS:
        group = {name: item for name, item in differences.items() if item.verdict == verdict}
        if not group:
            continue
        side = verdict.removesuffix(" here")
        text = f"{side} within noise on " if side == "level" else f"{side} on "
        text += _listed([f"{name} ({signed(item.mean)})" for name, item in group.items()])
        if (
            side != "level"
            and seeds > 1
            and all(i.every_seed and len(i.seeds) == seeds for i in group.values())
        ):
            text += ", in every seed"
        if side != verdict:
            text += f"{',' if 'every' in text else ''} but within the error of the test images"
        parts.append(text)
    if not parts:
        return ""
    return f"{one} against {other} ({'one seed' if seeds == 1 else f'{seeds} seeds'}): {'; '.join(parts)}."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
