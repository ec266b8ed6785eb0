"""Hyper-parameters chosen on validation sets, and the scores behind each choice, in GRID/choices.json.

Every candidate of every arm is trained with the grid's first seed and judged by the same average over the validation
sets; ties go to the candidate that is listed first. The winner's run becomes the arm's run of that seed. The test sets
play no part: they are evaluated after the choices have been written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from arf_plugin.ablation.config import Arm, Grid, deciding
from arf_plugin.errors import GridError
from arf_plugin.files import write_json
from arf_plugin.untrusted import read_json
from arf_plugin.validation import Listed, Strict, validated

_ADVICE = "Remove it, and what was chosen is chosen again from what has been measured."


class _Candidate(Strict):
    flags: dict[str, str]
    validation: dict[str, float]


class _Chosen(Strict):
    by: str
    seed: int
    candidates: Listed[_Candidate]
    chosen: int


class _ChosenAlpha(Strict):
    by: str
    validation: dict[str, float]
    chosen: float


class _File(Strict):
    arms: dict[str, _Chosen] = Field(default_factory=dict)
    wise: dict[str, _ChosenAlpha] = Field(default_factory=dict)


class Choices:
    """The choices of the grid in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "choices.json"
        found = read_json(self.path, GridError, advice=_ADVICE) if self.path.exists() else {}
        self.content = validated(_File, found, str(self.path), GridError, _ADVICE).model_dump(mode="json")

    def chosen(self, arm: Arm) -> int | None:
        """Number of the chosen candidate; None if the choice has not been made.

        Raises:
            GridError: It was made among other candidates.
        """
        entry = self.content["arms"].get(arm.name)
        if arm.choice is None or entry is None:
            return None
        now, before = _candidates(arm), [found["flags"] for found in entry["candidates"]]
        if before != now or entry["by"] != arm.choice.by or not 0 <= entry["chosen"] < len(now):
            raise GridError(
                f"Arm '{arm.name}' was chosen among {json.dumps(before)[:300]} by {entry['by'][:80]} (number "
                f"{entry['chosen']}); the grid now has {json.dumps(now)[:300]} by {arm.choice.by}.\n"
                f"Choose again with: --restart {arm.name}"
            )
        return int(entry["chosen"])

    def decide(self, arm: Arm, seed: int, averages: Sequence[Mapping[str, float]]) -> int:
        """Chooses an arm's candidate, writes the choice down, and returns its number.

        Args:
            arm: The arm.
            seed: The candidates' seed.
            averages: Each candidate's averages over the validation sets, percent.

        Raises:
            GridError: The average that decides is none of them.
        """
        assert arm.choice is not None
        by = arm.choice.by
        for found in averages:
            if not found.keys() >= set(deciding(by)):
                raise GridError(
                    f"{arm.where}: the choice is by '{by}', which is no average of the validation sets. "
                    f"Expected one of: {', '.join(found)}."
                )
        means = [fmean(found[name] for name in deciding(by)) for found in averages]
        best = means.index(max(means))
        listed = [
            {"flags": flags, "validation": {name: round(value, 4) for name, value in found.items()}}
            for flags, found in zip(_candidates(arm), averages, strict=True)
        ]
        self._write("arms", arm, {"by": by, "seed": seed, "candidates": listed, "chosen": best})
        return best

    def decide_alpha(self, arm: Arm, by: str, values: Mapping[float, float]) -> float:
        """Chooses an arm's WiSE-FT alpha by its mean over the seeds; ties go to the smaller one."""
        best = max(sorted(values), key=lambda alpha: values[alpha])
        validation = {f"{alpha:g}": round(value, 4) for alpha, value in sorted(values.items())}
        self._write("wise", arm, {"by": by, "validation": validation, "chosen": best})
        return best

    def forget(self, arm: Arm) -> None:
        """Takes an arm's choices back."""
        for kind in ("arms", "wise"):
            self._write(kind, arm, None)

    def settled(self, grid: Grid) -> dict[str, Arm]:
        """The arms whose flags are complete, with the chosen ones, by name."""
        chosen = {arm.name: self.chosen(arm) for arm in grid.arms}
        settled = (arm for arm in grid.arms if arm.choice is None or chosen[arm.name] is not None)
        return {arm.name: arm.with_candidate(chosen[arm.name]) for arm in settled}

    def _write(self, kind: str, arm: Arm, entry: dict[str, Any] | None) -> None:
        if self.content[kind].get(arm.name) != entry:
            self.content[kind].pop(arm.name, None)
            self.content[kind] |= {} if entry is None else {arm.name: entry}
            write_json(self.path, self.content)


def _candidates(arm: Arm) -> list[dict[str, str]]:
    assert arm.choice is not None
    return [
        {name: "off" if words is None else " ".join(words) for name, words in flags.items()}
        for flags in arm.choice.over
    ]
