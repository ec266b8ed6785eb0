"""A whole grid, from its file to its table; started again, it goes on where it was.

::

    check -> anchors -> candidates -> validation -> choices -> runs -> test and validation sets -> table

Files of GRID: grid.json (the grid as it was resolved), anchors/, candidates/, choices.json, runs/, validation.jsonl,
results.jsonl (see :mod:`arf_plugin.evaluation.records`), results.json and table.md.
"""

from __future__ import annotations

import fcntl
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arf_plugin.ablation import table
from arf_plugin.ablation.anchors import build, needed
from arf_plugin.ablation.choose import Choices, promote, settled
from arf_plugin.ablation.config import AnchorSet, Arm, Grid
from arf_plugin.ablation.evaluate import measure, open_sets
from arf_plugin.ablation.plan import Run, before, candidate_runs, final_runs, known, missing_inputs
from arf_plugin.ablation.runs import changes, discard, is_finished, save_before, versions
from arf_plugin.ablation.schedule import Places, run_all
from arf_plugin.anchors.files import write_json
from arf_plugin.errors import GridError


@dataclass(frozen=True)
class Selection:
    """What of a grid is to be done.

    Attributes:
        arms: names of the arms; None for all. Probes that they start from come along.
        seeds: seeds; None for all.
        restart: names of the arms whose earlier work is thrown away.
        processes: torchrun's --nproc_per_node; None for the grid's.
    """

    arms: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    restart: Sequence[str] = ()
    processes: int | None = None


class Ablation:
    """A grid in its folder.

    Args:
        grid: the grid.
        folder: GRID.
        selection: what of it is to be done.

    Raises:
        GridError: an arm or a seed that is not in the grid.
    """

    def __init__(self, grid: Grid, folder: Path, selection: Selection) -> None:
        self.grid, self.folder = grid, folder
        names = [arm.name for arm in grid.arms]
        wanted = set(known(selection.arms, names, "--arms"))
        wanted |= {arm.head for arm in grid.arms if arm.name in wanted and arm.head is not None}
        self.names = [name for name in names if name in wanted]
        seeds = known([str(s) for s in selection.seeds or ()], [str(s) for s in grid.seeds], "--seeds")
        self.seeds = [int(seed) for seed in seeds]
        self.restart = (
            [grid.arm(name) for name in known(selection.restart, names, "--restart")]
            if selection.restart
            else []
        )
        self.processes = selection.processes or grid.processes
        self.choices = Choices(folder)
        self._check_averages()
        self.failures: dict[str, str] = {}

    def candidates(self, arms: Collection[str] | None = None) -> list[Run]:
        """The runs that choices among the wanted arms are made from."""
        return list(candidate_runs(self.grid, self.folder, arms or self.names, self.processes))

    def planned(self) -> list[Run]:
        """The runs there would be: the winners among the candidates take the place of their arms' first runs."""
        undecided = set(self.names) - set(settled(self.grid, self.choices))
        candidates = self.candidates(undecided) if undecided else []
        finals = self.finals()
        return [
            *candidates,
            *(run for run in finals if run.arm.name not in undecided or run.seed != self.grid.seeds[0]),
        ]

    def finals(self) -> list[Run]:
        """The wanted runs of the grid; arms whose choice has not been made yet have their common flags alone."""
        arms = settled(self.grid, self.choices)
        return [
            Run(self.grid, self.folder, arms.get(run.arm.name, run.arm), run.seed, None, self.processes)
            for run in final_runs(self.grid, self.folder, self.names, self.seeds, self.processes)
        ]

    def anchor_sets(self) -> list[AnchorSet]:
        """The anchor sets that the grid makes for the wanted arms, in order."""
        names = {anchors for name in self.names if (anchors := self.grid.arm(name).anchors) is not None}
        return needed(self.grid, names)

    def check(self) -> None:
        """Refuses what cannot run, before anything does.

        Raises:
            GridError: inputs are missing, or runs in the folder were started with other settings.
        """
        everything = [before(self.grid, self.folder), *self.candidates(), *self.finals()]
        missing = missing_inputs(everything)
        if missing:
            more = f" (and {len(missing) - 5} more)" if len(missing) > 5 else ""
            raise GridError(
                f"The grid '{self.grid.name}' needs files that are not there: {', '.join(missing[:5])}{more}.\n"
                "Make them first, or give the right place with --set NAME=VALUE (see the file's 'variables')."
            )
        open_sets(self.grid, "test")
        if self.grid.evaluation.validation is not None:
            open_sets(self.grid, "validation")
        restarted = {arm.name for arm in self.restart}
        open_choices = {arm.name for arm in self.grid.arms if arm.choice is not None} - set(
            settled(self.grid, self.choices)
        )
        found = {
            run.name: (run.arm.name, different)
            for run in everything
            if run.arm.name not in restarted
            and not (run.candidate is None and run.arm.name in open_choices)
            and (different := changes(run))
        }
        if found:
            listed = "\n".join(f"  {name}: {'; '.join(different)}" for name, (_, different) in found.items())
            arms = " ".join(dict.fromkeys(arm for arm, _ in found.values()))
            raise GridError(
                f"The grid has changed since these runs in {self.folder} began:\n{listed}\n"
                f"Change it back, give another --out, or throw these runs away with: --restart {arms}"
            )

    def run(self, where: Places) -> dict[str, Any]:
        """Does everything that is left.

        Args:
            where: where runs may be.

        Returns:
            The content of results.json.

        Raises:
            GridError: something cannot run at all. Single runs that fail are in `failures` instead.
        """
        with self._only_one():
            self._forget_restarted()
            self.check()
            write_json(self.folder / "grid.json", self.resolved())
            save_before(before(self.grid, self.folder))
            environment = {"OMP_WAIT_POLICY": "passive"}
            for chosen in self.anchor_sets():
                build(self.grid, chosen, _say, environment)
            self._choose(where)
            arms_by_name = settled(self.grid, self.choices)
            runs = [run for run in self.finals() if run.arm.name in arms_by_name]
            self.failures |= run_all(runs, where, self.grid.name)
            write_json(self.folder / "grid.json", self.resolved())
            return self.results(evaluate=True)

    def results(self, evaluate: bool) -> dict[str, Any]:
        """Evaluates what is finished and writes table and results; without `evaluate`, from the rows that are there."""
        grid, folder = self.grid, self.folder
        arms = settled(grid, self.choices)
        runs = [
            run for run in table.all_runs(grid, folder, arms, grid.seeds, self.processes) if is_finished(run)
        ]
        halves = {"validation": "validation.jsonl"} if grid.evaluation.validation is not None else {}
        for split, rows in {**halves, "test": "results.jsonl"}.items() if evaluate else ():
            measure(grid, folder, runs, open_sets(grid, split), folder / rows, grid.wise)
        mixed = [arm for arm in arms.values() if arm.is_trained and not arm.probe]
        validation = table.figures(grid, folder, runs, folder / "validation.jsonl")
        test = table.figures(grid, folder, runs, folder / "results.jsonl")
        alphas = table.choose_alphas(grid, self.choices, mixed, validation)
        result = table.summarize(grid, folder, arms, runs, test, alphas)
        table.write(folder, result)
        return result

    def resolved(self) -> dict[str, Any]:
        """The content of grid.json."""
        grid = self.grid
        arms = settled(grid, self.choices)

        def described(arm: Arm) -> dict[str, Any]:
            complete = arms.get(arm.name, arm)
            flags = {name: " ".join(words or ()) for name, words in complete.flags.items()}
            entry = {"name": arm.name, "label": arm.label, "what": arm.what, "kind": arm.kind, "flags": flags}
            anchors = grid.anchors[arm.anchors].path if arm.anchors is not None else None
            return entry | {"anchors": str(anchors) if anchors else None, "mix": arm.mix, "head": arm.head}

        used = [arm.anchors for arm in grid.arms if arm.anchors is not None and arm.kind == "arf"]
        return {
            "name": grid.name,
            "arms": [described(arm) for arm in grid.arms],
            "seeds": list(grid.seeds),
            "model": grid.model,
            "pretrained": grid.pretrained,
            "suite": grid.evaluation.suite,
            "data": {
                "task": grid.task.data,
                "test": grid.evaluation.test,
                "validation": grid.evaluation.validation,
            },
            "anchors": str(grid.anchors[used[0]].path) if used else None,
            "reference": grid.reference,
            "wise": list(grid.wise),
            "wise_by": grid.wise_by,
            "versions": versions(),
        }

    def _check_averages(self) -> None:
        """Refuses choices by averages that the suite does not have."""
        from arf_plugin.evaluation.suites import load_suite

        known_averages = load_suite(self.grid.evaluation.suite).averages
        deciding = {
            arm.choice.by: f"{arm.where}: 'choose'" for arm in self.grid.arms if arm.choice is not None
        }
        if self.grid.wise_by is not None:
            deciding[self.grid.wise_by] = "'wise'"
        for name, place in deciding.items():
            if name not in known_averages:
                raise GridError(
                    f"{place} is by '{name}', which is no average of the suite '{self.grid.evaluation.suite}'. "
                    f"Expected one of: {', '.join(known_averages)}."
                )

    def _choose(self, where: Places) -> None:
        """Trains the candidates of arms that have no choice yet, judges them on validation, and writes the choices."""
        arms = settled(self.grid, self.choices)
        undecided = [name for name in self.names if name not in arms]
        if not undecided:
            return
        runs = self.candidates(undecided)
        heads = {run.head.name: run.head for run in runs if run.head is not None}
        self.failures |= run_all([*heads.values(), *runs], where, "candidates")
        rows = self.folder / "candidates" / "validation.jsonl"
        finished = [run for run in runs if is_finished(run)]
        measure(self.grid, self.folder, finished, open_sets(self.grid, "validation"), rows, ())
        for name in undecided:
            own = [run for run in runs if run.arm.name == name]
            if not all(is_finished(run) for run in own):
                _say(
                    f"{name}: not all of its candidates could be trained, so nothing was chosen and it is left out"
                )
                continue
            arm, seed = self.grid.arm(name), self.grid.seeds[0]
            averages = [
                table.figures(self.grid, self.folder, [run], rows).get((name, seed), {}).get(None, {})
                for run in own
            ]
            best = self.choices.decide(arm, seed, averages)
            promote(own[best], Run(self.grid, self.folder, own[best].arm, seed, None, self.processes))

    def _forget_restarted(self) -> None:
        for arm in self.restart:
            for run in self.candidates([arm.name]):
                discard(run)
            for seed in self.grid.seeds:
                discard(Run(self.grid, self.folder, arm, seed))
            self.choices.forget(arm)
        if self.restart:
            names = "|".join(re.escape(arm.name) for arm in self.restart)
            gone = re.compile(rf"(runs|candidates)/({names})(\.\d+)?-\d+/")
            for rows in ("results.jsonl", "validation.jsonl", "candidates/validation.jsonl"):
                table.drop_rows(self.folder / rows, gone)

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        """Lets one `arf ablate` at a time work in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GridError(
                    f"Another `arf ablate` is at work in {self.folder}. Wait for it, or give another --out."
                ) from None
            yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
