"""Hyper-parameters chosen on validation sets, and the figures behind each choice, in GRID/choices.json.

Every candidate of every arm is trained with the grid's first seed and judged by the same average over the validation
sets; ties go to the candidate that is listed first. The winner's run becomes the arm's run of that seed. The test sets
play no part: they are evaluated after the choices have been written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arf_plugin.ablation.config import Arm, Grid
from arf_plugin.ablation.plan import Run
from arf_plugin.anchors.files import write_json
from arf_plugin.errors import GridError
from arf_plugin.untrusted import read_json, require_fields

_ADVICE = "Remove it, and what was chosen is chosen again from what has been measured."


class Choices:
    """The choices of a grid.

    Args:
        folder: GRID.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "choices.json"
        self.content: dict[str, Any] = {"arms": {}, "wise": {}}
        if self.path.exists():
            self.content |= read_json(self.path, GridError, advice=_ADVICE)
            require_fields(self.content, {"arms": dict, "wise": dict}, str(self.path), GridError, _ADVICE)

    def chosen(self, arm: Arm) -> int | None:
        """Number of the chosen candidate; None if the choice has not been made.

        Raises:
            GridError: it was made among other candidates.
        """
        if arm.choice is None or arm.name not in self.content["arms"]:
            return None
        entry = self.content["arms"][arm.name]
        where = f"{self.path}, arm '{arm.name}'"
        again = f"Choose again with: --restart {arm.name}"
        require_fields({"entry": entry}, {"entry": dict}, where, GridError, again)
        require_fields(entry, {"candidates": list, "by": str, "chosen": int}, where, GridError, again)
        now = _candidates(arm)
        before = [found.get("flags") if isinstance(found, dict) else found for found in entry["candidates"]]
        if before != now or entry["by"] != arm.choice.by:
            raise GridError(
                f"Arm '{arm.name}' was chosen among {json.dumps(before)} by {entry['by']}; the grid now has "
                f"{json.dumps(now)} by {arm.choice.by}.\nChoose again with: --restart {arm.name}"
            )
        if not 0 <= entry["chosen"] < len(now):
            raise GridError(f"{where}: candidate {entry['chosen']} is none of {len(now)}. {again}")
        return int(entry["chosen"])

    def decide(self, arm: Arm, seed: int, averages: Sequence[Mapping[str, float]]) -> int:
        """Chooses an arm's candidate and writes the choice down.

        Args:
            arm: the arm.
            seed: the candidates' seed.
            averages: each candidate's averages over the validation sets, percent.

        Returns:
            The winner's number.

        Raises:
            GridError: the average that decides is none of them.
        """
        assert arm.choice is not None
        for found in averages:
            if arm.choice.by not in found:
                raise GridError(
                    f"{arm.where}: the choice is by '{arm.choice.by}', which is no average of the validation sets. "
                    f"Expected one of: {', '.join(found)}."
                )
        values = [found[arm.choice.by] for found in averages]
        best = values.index(max(values))
        self.content["arms"][arm.name] = {
            "by": arm.choice.by,
            "seed": seed,
            "candidates": [
                {"flags": flags, "validation": {name: round(value, 4) for name, value in found.items()}}
                for flags, found in zip(_candidates(arm), averages, strict=True)
            ],
            "chosen": best,
        }
        write_json(self.path, self.content)
        return best

    def decide_alpha(self, arm: Arm, by: str, values: Mapping[float, float]) -> float:
        """Chooses an arm's WiSE-FT alpha by its mean over the seeds; ties go to the smaller one."""
        best = max(sorted(values), key=lambda alpha: values[alpha])
        entry = {
            "by": by,
            "validation": {f"{alpha:g}": round(value, 4) for alpha, value in sorted(values.items())},
            "chosen": best,
        }
        if self.content["wise"].get(arm.name) != entry:
            self.content["wise"][arm.name] = entry
            write_json(self.path, self.content)
        return best

    def forget(self, arm: Arm) -> None:
        """Takes an arm's choices back."""
        for kind in ("arms", "wise"):
            self.content[kind].pop(arm.name, None)
        if self.path.is_file():
            write_json(self.path, self.content)


def settled(grid: Grid, choices: Choices) -> dict[str, Arm]:
    """The arms whose flags are complete, with the chosen ones, by name."""
    found: dict[str, Arm] = {}
    for arm in grid.arms:
        if arm.choice is None:
            found[arm.name] = arm
        elif (best := choices.chosen(arm)) is not None:
            found[arm.name] = arm.with_candidate(best)
    return found


def promote(candidate: Run, final: Run) -> None:
    """Makes the winner's run the arm's run of its seed."""
    if candidate.path.is_dir() and not final.path.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        candidate.path.rename(final.path)


def _candidates(arm: Arm) -> list[dict[str, str]]:
    assert arm.choice is not None
    return [
        {name: "off" if words is None else " ".join(words) for name, words in flags.items()}
        for flags in arm.choice.over
    ]
