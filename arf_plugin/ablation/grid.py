"""A whole grid, from its file to its table; started again, it goes on where it was.

::

    check -> anchors -> candidates -> validation -> choices -> runs -> test and validation sets -> table

Files of GRID: grid.json (the grid as it was resolved), anchors/, candidates/, choices.json, runs/, validation.jsonl,
results.jsonl (see :mod:`arf_plugin.evaluation.records`), results.json and table.md.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.ablation import table
from arf_plugin.ablation.anchors import build, needed
from arf_plugin.ablation.choose import Choices
from arf_plugin.ablation.config import AnchorSet, Arm, Grid, deciding
from arf_plugin.ablation.launch import take
from arf_plugin.ablation.plan import (
    Merged,
    Run,
    before,
    candidate_runs,
    final_runs,
    merged_arm,
    missing_inputs,
)
from arf_plugin.ablation.plan import merged as merges_of
from arf_plugin.ablation.runs import changes, is_finished, run_all, save_before, versions
from arf_plugin.errors import GridError
from arf_plugin.files import write_json

if TYPE_CHECKING:
    from arf_plugin.evaluation.sets import EvaluationSet


class Ablation:
    """A grid in its folder.

    Args:
        grid: The grid.
        folder: GRID.
        arms: Names of the arms that are to be done; None for all. Probes that they start from come along.
        seeds: Seeds; None for all.
        restart: Names of the arms whose earlier work is thrown away.
        processes: torchrun's --nproc_per_node; None for the grid's.

    Raises:
        GridError: An arm or a seed that is not in the grid.
    """

    def __init__(
        self,
        grid: Grid,
        folder: Path,
        arms: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        restart: Sequence[str] = (),
        processes: int | None = None,
    ) -> None:
        self.grid, self.folder = grid, folder
        names = [arm.name for arm in grid.arms]
        wanted = set(_known(arms or names, names, "--arms"))
        wanted |= {arm.head for arm in grid.arms if arm.name in wanted and arm.head is not None}
        self.names = [name for name in names if name in wanted]
        self.seeds = _known(seeds or grid.seeds, grid.seeds, "--seeds")
        self.restart = [grid.arm(name) for name in _known(restart, names, "--restart")]
        self.processes = processes or grid.processes
        self.choices = Choices(folder)
        self._check_averages()
        self.failures: dict[str, str] = {}

    def candidates(self, arms: Collection[str] | None = None) -> list[Run]:
        """The runs that choices among the wanted arms are made from."""
        return candidate_runs(self.grid, self.folder, self.names if arms is None else arms, self.processes)

    def planned(self) -> list[Run]:
        """The runs there would be: the winners among the candidates take the place of their arms' first runs."""
        undecided, first = self.undecided(), self.grid.seeds[0]
        final = [run for run in self.finals() if run.arm.name not in undecided or run.seed != first]
        return [*self.candidates(undecided), *final]

    def undecided(self) -> list[str]:
        """The wanted arms whose choice has not been made yet."""
        settled = self.choices.settled(self.grid)
        return [name for name in self.names if name not in settled]

    def finals(self) -> list[Run]:
        """The wanted runs of the grid; arms whose choice has not been made yet have their common flags alone."""
        settled = self.choices.settled(self.grid)
        return final_runs(self.grid, self.folder, self.names, self.seeds, self.processes, settled)

    def anchor_sets(self) -> list[AnchorSet]:
        """The anchor sets that the grid makes for the wanted arms, in order."""
        names = {anchors for name in self.names if (anchors := self.grid.arm(name).anchors) is not None}
        return needed(self.grid, names)

    def check(self) -> None:
        """Refuses what cannot run, before anything does.

        Raises:
            GridError: Inputs are missing, or runs in the folder were started with other settings.
        """
        everything = [before(self.grid, self.folder), *self.candidates(), *self.finals()]
        missing = missing_inputs(everything)
        if missing:
            more = f" (and {len(missing) - 5} more)" if len(missing) > 5 else ""
            raise GridError(
                f"The grid '{self.grid.name}' needs files that are not there: {', '.join(missing[:5])}{more}.\n"
                "Make them first, or give the right place with --set NAME=VALUE (see the file's 'variables')."
            )
        for split in self._records():
            open_sets(self.grid, split)
        left_out = {arm.name for arm in self.restart}
        open_choices = {arm.name for arm in self.grid.arms} - set(self.choices.settled(self.grid))
        started = [
            run
            for run in everything
            if run.arm.name not in left_out and not (run.candidate is None and run.arm.name in open_choices)
        ]
        found = [(run, different) for run in started if (different := changes(run))]
        if found:
            listed = "\n".join(f"  {run.name}: {'; '.join(different)}" for run, different in found)
            arms = " ".join(dict.fromkeys(run.arm.name for run, _ in found))
            raise GridError(
                f"The grid has changed since these runs in {self.folder} began:\n{listed}\n"
                f"Change it back, give another --out, or throw these runs away with: --restart {arms}"
            )

    def run(self, where: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """Does everything that is left, and returns the content of results.json.

        Args:
            where: The environments of the runs that may be under way at a time.

        Raises:
            GridError: Something cannot run at all. Single runs that fail are in `failures` instead.
        """
        with self._only_one():
            self._forget_restarted()
            self.check()
            write_json(self.folder / "grid.json", self.resolved())
            save_before(before(self.grid, self.folder))
            for chosen in self.anchor_sets():
                build(self.grid, chosen, _say)
            self._choose(where)
            undecided = self.undecided()
            runs = [run for run in self.finals() if run.arm.name not in undecided]
            self.failures |= run_all(runs, where, self.grid.name)
            write_json(self.folder / "grid.json", self.resolved())
            return self._results()

    def _results(self) -> dict[str, Any]:
        """Evaluates what is finished, of all arms and seeds, and writes table and results."""
        grid, folder = self.grid, self.folder
        arms = self.choices.settled(grid)
        trained = [arm for arm in arms.values() if arm.is_trained]
        runs = [Run(grid, folder, arm, seed, None, self.processes) for arm in trained for seed in grid.seeds]
        runs = [run for run in (before(grid, folder), *runs) if is_finished(run)]
        merges = merges_of(grid, runs)
        scores = {}
        # What earlier starts have merged of fewer seeds, or of an arm's runs before they were thrown away.
        gone = re.compile("".join(f"(?!{re.escape(one.listed)}$)" for one in merges) + "merged/")
        for split, records in self._records().items():
            table.drop_records(folder / records, gone)
            measure(grid, folder, runs, open_sets(grid, split), folder / records, grid.wise.alphas, merges)
            scores[split] = table.scores(grid, [*runs, *merges], folder / records)
        alphas = {}
        if "validation" in scores:
            mixed = [arm for arm in trained if arm.is_mixable]
            alphas = table.choose_alphas(grid, self.choices, mixed, scores["validation"])
        result = table.summarize(grid, runs, scores["test"], alphas, merges)
        result["verdicts"] = table.verdicts(grid, [*runs, *merges], folder / "results.jsonl", result["rows"])
        table.write(folder, result)
        return result

    def _records(self) -> dict[str, str]:
        """Files of records by split."""
        validation = {"validation": "validation.jsonl"} if self.grid.evaluation.validation is not None else {}
        return {**validation, "test": "results.jsonl"}

    def resolved(self) -> dict[str, Any]:
        """The content of grid.json."""
        grid, evaluation = self.grid, self.grid.evaluation
        arms = self.choices.settled(grid)

        def folder_of(arm: Arm) -> str | None:
            return str(grid.anchors[arm.anchors].path) if arm.anchors is not None else None

        def described(arm: Arm) -> dict[str, Any]:
            flags = arms.get(arm.name, arm).flags
            return {
                **{name: getattr(arm, name) for name in ("name", "label", "what", "kind", "mix", "head")},
                "flags": {name: " ".join(words or ()) for name, words in flags.items()},
                "anchors": folder_of(arm),
            }

        merges = [merged_arm(arm, method) for arm in grid.arms if arm.is_mixable for method in grid.merge]
        used = (folder_of(arm) for arm in grid.arms if arm.kind == "arf")
        return {
            "name": grid.name,
            "arms": [described(arm) for arm in (*grid.arms, *merges)],
            "seeds": list(grid.seeds),
            "model": grid.model,
            "pretrained": grid.pretrained,
            "suite": evaluation.suite,
            "data": {"task": grid.task.data, "test": evaluation.test, "validation": evaluation.validation},
            "anchors": next(filter(None, used), None),
            "reference": grid.reference,
            "wise": list(grid.wise.alphas),
            "wise_by": grid.wise.by,
            "versions": versions(),
            **({"merge": list(grid.merge)} if grid.merge else {}),
        }

    def _check_averages(self) -> None:
        """Refuses choices by averages that the suite does not have."""
        from arf_plugin.evaluation.suites import load_suite

        known = load_suite(self.grid.evaluation.suite).averages
        judges = {arm.choice.by: f"{arm.where}: 'choose'" for arm in self.grid.arms if arm.choice is not None}
        if self.grid.wise.by is not None:
            judges[self.grid.wise.by] = "'wise'"
        for name, place in judges.items():
            if not set(deciding(name)) <= known.keys():
                raise GridError(
                    f"{place} is by '{name}', which is no average of the suite '{self.grid.evaluation.suite}'. "
                    f"Expected one of: {', '.join(known)}."
                )

    def _choose(self, where: Sequence[Mapping[str, str]]) -> None:
        """Trains the candidates of arms that have no choice yet, judges them on validation, and writes the choices."""
        undecided = self.undecided()
        if not undecided:
            return
        runs = self.candidates(undecided)
        heads = {run.head.name: run.head for run in runs if run.head is not None}
        self.failures |= run_all([*heads.values(), *runs], where, "candidates")
        records = self.folder / "candidates" / "validation.jsonl"
        finished = [run for run in runs if is_finished(run)]
        measure(self.grid, self.folder, finished, open_sets(self.grid, "validation"), records, ())
        for name in undecided:
            own = [run for run in runs if run.arm.name == name]
            if not all(map(is_finished, own)):
                said = "not all of its candidates could be trained, so nothing was chosen and it is left out"
                _say(f"{name}: {said}")
                continue
            scores = [table.scores(self.grid, [run], records) for run in own]
            averages = [{} if found.empty else found.iloc[0].to_dict() for found in scores]
            best = own[self.choices.decide(self.grid.arm(name), self.grid.seeds[0], averages)]
            final = Run(self.grid, self.folder, best.arm, best.seed, None, self.processes)
            if best.path.is_dir() and not final.path.exists():  # the winner's run becomes the arm's
                final.path.parent.mkdir(parents=True, exist_ok=True)
                best.path.rename(final.path)

    def _forget_restarted(self) -> None:
        for arm in self.restart:
            runs = [Run(self.grid, self.folder, arm, seed) for seed in self.grid.seeds]
            for run in [*self.candidates([arm.name]), *runs]:
                shutil.rmtree(run.path, ignore_errors=True)
            self.choices.forget(arm)
        if self.restart:
            names = "|".join(re.escape(arm.name) for arm in self.restart)
            gone = re.compile(rf"(runs|candidates)/({names})(\.\d+)?-\d+/|merged/({names})\+\w+/")
            for records in ("results.jsonl", "validation.jsonl", "candidates/validation.jsonl"):
                table.drop_records(self.folder / records, gone)

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        """Lets one `arf ablate` at a time work in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            if not take(lock.fileno()):
                busy = f"Another `arf ablate` is at work in {self.folder}."
                raise GridError(f"{busy} Wait for it, or give another --out.")
            yield


def open_sets(grid: Grid, split: str) -> list[EvaluationSet]:
    """Opens what is there of the suite's sets for "test" or "validation"; missing test sets are named on stderr.

    Raises:
        GridError: Not one is there.
        EvaluationError: A set that is malformed.
    """
    from arf_plugin.evaluation.sources import find_suite, missing_text
    from arf_plugin.evaluation.suites import load_suite

    suite, evaluation = load_suite(grid.evaluation.suite), grid.evaluation
    if split == "test":
        found = find_suite(suite, Path(evaluation.test), "test")
    else:
        found = find_suite(suite, Path(evaluation.validation or ""), evaluation.validation_split)
    if not found.sets:
        raise GridError(f"The {split} sets of the grid '{grid.name}': {missing_text(suite, found)}")
    if found.missing and split == "test":
        _say(f"{missing_text(suite, found)}\nThe grid goes on without them.")
    return found.sets


def measure(
    grid: Grid,
    folder: Path,
    runs: Sequence[Run],
    sets: Sequence[EvaluationSet],
    records: Path,
    alphas: Sequence[float],
    merges: Sequence[Merged] = (),
) -> None:
    """Measures what the records do not hold yet; images are decoded once for all checkpoints.

    Args:
        grid: The grid.
        folder: GRID, which the records' paths are relative to.
        runs: Finished runs.
        sets: What to measure them on.
        records: File of records; new ones are appended.
        alphas: WiSE-FT: each run is also mixed with the weights it started from; 0 and 1 are these and the run itself.
        merges: Arms whose seeds are also merged. Model Stock's start is that of the first seed, which differs from the
            others' only where each seed has a probe's head of its own.
    """
    from arf_plugin.evaluation.candidates import Candidate
    from arf_plugin.evaluation.merging import Merge
    from arf_plugin.evaluation.run import evaluate

    candidates = []
    for run in runs:
        name = run.listed
        candidates.append(Candidate(run.weights, name=name))
        if run.arm.is_mixable:
            original = str(run.original.relative_to(folder))
            candidates += [Candidate(run.weights, run.original, alpha, name, original) for alpha in alphas]
    for one in merges:
        first, *others = one.runs
        start = None if one.method == "soup" else first.original
        candidates.append(
            Candidate(
                first.weights,
                start,
                name=one.listed,
                original_name=str(start.relative_to(folder)) if start else None,
                merge=Merge(one.method),
                others=tuple(run.weights for run in others),
            )
        )
    if candidates:
        evaluate(
            candidates,
            grid.model,
            sets,
            suite=grid.evaluation.suite,
            pretrained=grid.pretrained,
            out=records,
            batch_size=grid.evaluation.batch_size,
        )


def _known(names: Sequence[Any], known: Sequence[Any], option: str) -> list[Any]:
    """The names that an option gives, each of which the grid has."""
    for name in names:
        if name not in known:
            expected = ", ".join(map(str, known))
            raise GridError(f"{option} {name}: not in this grid. Expected some of: {expected}.")
    return list(names)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
