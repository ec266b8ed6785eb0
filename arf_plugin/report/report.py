"""Makes a report: gathers everything that can be shown, and says of the rest what would make it appear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arf_plugin.errors import ReportError
from arf_plugin.report import plots, provenance, tables
from arf_plugin.report.answer import Answer, find_answer
from arf_plugin.report.gallery import Advance, Gallery, build_gallery
from arf_plugin.report.logs import Curves, read_curves, watched_scores
from arf_plugin.report.plots import Group
from arf_plugin.report.scores import Averages, Results, suites_of
from arf_plugin.report.sources import Collected, collect, entries, is_local
from arf_plugin.report.style import Style
from arf_plugin.report.tables import Slice

_MISSING = {
    "curves": "No mixtures have been measured: arf interpolate --alphas does it, and arf ablate for its grid (wise).",
    "calibration": "The records hold no calibration error (metric 'ece'): arf evaluate measures it.",
}


@dataclass(frozen=True)
class Options:
    """What to report, beside the runs: the flags of ``arf report`` by their names, see :mod:`arf_plugin.cli.report`."""

    anchors: Path | None = None
    task_data: str | None = None
    classnames: Path | None = None
    title: str | None = None
    suite: Sequence[str] = ()
    reference: str | None = None
    compare: Sequence[tuple[str, str]] = ()
    cards: int = 12
    dataset_type: str = "auto"
    csv_img_key: str = "filepath"
    csv_separator: str = "\t"


@dataclass
class Report:
    """Everything that the page shows.

    Attributes:
        missing: by section, the line that says what would make it appear.
        groups: Plots by section.
        answer: Whether it forgot.
        notes: What a reader must know before believing the scores.
    """

    title: str
    found: Collected
    results: Results
    slices: list[Slice]
    style: Style
    answer: Answer
    groups: dict[str, Group] = field(default_factory=dict)
    gallery: Gallery | None = None
    anchors: Path | None = None
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def gather(sources: Sequence[Path], options: Options, on_pair: Advance = lambda: None) -> Report:
    """Reads and computes everything that the report shows."""
    found = collect(sources, options.reference)
    for arm in (arm for pair in options.compare for arm in pair):
        if arm not in found.arms:
            raise ReportError(f"--compare: there is no arm '{arm}' (found: {', '.join(found.arms)}).")
    named = (grid.get("suite") for grid in found.grids)
    of_grids = [name for name in named if isinstance(name, str) and is_local(name)]
    suites = suites_of(found.test, options.suite, of_grids)
    results = Results(found.test, Averages(suites, sorted({one.record["set"] for one in found.test})))
    # The subject beside the baseline and each control: that is what they are for.
    others = [found.baseline, *found.of_kind("control")]
    pairs = [(found.subject or "", arm) for arm in filter(None, others) if arm != found.subject]
    comparisons = dict.fromkeys([*pairs, *found.comparisons, *options.compare])
    names = [str(grid["name"]) for grid in found.grids if grid.get("name")] or [
        suite.name for suite in suites
    ]
    title = f"Robust fine-tuning: {', '.join(names)}" if names else "Robust fine-tuning"
    report = Report(
        options.title or title,
        found,
        results,
        tables.build_slices(found, results, comparisons) if found.test else [],
        Style(list(found.arms), found.baseline, found.before, found.subject),
        find_answer(found, results, tables.chosen_alphas(found, results.averages)),
    )
    _add_results(report)
    _add_training(report)
    _add_anchors(report, options, on_pair)
    _add_notes(report)
    return report


def _add_results(report: Report) -> None:
    found, results, missing = report.found, report.results, report.missing
    if not found.test:
        missing["results"] = "No checkpoint has been measured: arf evaluate CHECKPOINT... --out results.jsonl"
        return
    averages, errors = results.averages, results.by_average("ece")
    of_arms = {arm: errors[arm, None] for arm in found.arms if errors.get((arm, None))}
    drawn = {
        "curves": plots.curves_group(found, results),
        # Without a suite, each set is a column of the table and a panel of the results.
        "domains": plots.domains_group(found, results) if averages.suites else None,
        "calibration": plots.dots_group(found, averages, of_arms, "Expected calibration error, %", True),
    }
    for tuned in report.slices[:1]:
        title = f"Results {tuned.title}, {results.unit}"
        drawn["results"] = plots.dots_group(found, averages, tuned.scores, title)
    report.groups |= {name: group for name, group in drawn.items() if group is not None}
    missing |= {name: text for name, text in _MISSING.items() if drawn[name] is None}


def _add_training(report: Report) -> None:
    curves: dict[str, list[Curves]] = {}
    for arm in report.found.arms.values():
        for run in (run for run in report.found.runs if run.arm == arm.name):
            for read in [*map(read_curves, run.logs), Curves(watched_scores(run.watched))]:
                if read.terms:
                    curves.setdefault(arm.name, []).append(read)
                if read.faults:
                    seed = "" if run.seed is None else f", seed {run.seed}"
                    report.notes.append(
                        f"{arm.label}{seed}: the loss was not a finite number in {len(read.faults)} "
                        f"logged steps, first after {read.faults[0]:.2f} passes over the data."
                    )
    if curves:
        report.groups["training"] = plots.training_group(report.found, curves)
    else:
        report.missing["training"] = (
            "No training log (open_clip's out.log) was found: give the runs' folders, too."
        )


def _add_anchors(report: Report, options: Options, on_pair: Advance) -> None:
    anchors = options.anchors or provenance.anchors_folder(report.found)
    if anchors is None:
        report.missing["anchors"] = "No anchor set is at hand. Name its folder with --anchors ANCHORS."
        return
    task = options.task_data or provenance.task_data(report.found)
    names = provenance.class_names(report.found, options.classnames)
    report.anchors = anchors
    report.gallery = build_gallery(
        anchors,
        task,
        names,
        count=options.cards,
        csv=(options.csv_img_key, options.csv_separator),
        dataset_type=options.dataset_type,
        advance=on_pair,
    )
    if task is None:
        report.missing["task images"] = "The task images are not at hand. Name them with --task-data DATA."


def _add_notes(report: Report) -> None:
    report.notes += report.results.truncated()
    unpaired = report.results.unpaired
    for reason in dict.fromkeys(unpaired.values()):
        names = ", ".join(name for name, why in unpaired.items() if why == reason)
        report.notes.append(f"Differences on {names} are not all paired by image: {reason}.")
    seeds = (seed for grid in report.found.grids for seed in entries(grid.get("seeds")))
    wanted = sorted({seed for seed in seeds if type(seed) is int})
    for arm, by_average in report.slices[0].scores.items() if report.slices else ():
        measured = set.intersection(*(set(score.seeds) for score in by_average.values()))
        lacking = [str(seed) for seed in wanted if seed not in measured]
        if lacking and measured != {None}:  # the model before, and merged seeds, have none
            label = report.found.arms[arm].label
            report.notes.append(f"{label}: seed {', '.join(lacking)} has not been measured on every average.")
    scores = (score for one in report.slices for by in one.scores.values() for score in by.values())
    if {len(score.seeds) for score in scores} == {1}:
        report.notes.append(
            "One seed per arm: nothing here says how much of a difference is chance of training."
        )
