"""The grid's results: mean and standard deviation over seeds, for people and for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.ablation.choose import Choices
from arf_plugin.ablation.config import Arm, Grid, deciding
from arf_plugin.ablation.plan import Merged, Run
from arf_plugin.console import markdown_table, text_table
from arf_plugin.files import replacing, write_json

if TYPE_CHECKING:
    from pandas import DataFrame

_AGAINST = {"": "arm", "_label": "label", "_alpha": "alpha"}
VERDICTS = (
    "points, ± half of the 95 % interval, paired by image and seed; ▲ ahead, ▼ behind, ≈ level (after Holm)"
)


def scores(grid: Grid, runs: Sequence[Run | Merged], records: Path) -> DataFrame:
    """Reads records of runs, merged ones among them, and reduces them to the suite's averages.

    Returns:
        A row per run and alpha, with a column per average, in percent; see :func:`scores_table`. What has not been
        measured is left out.
    """
    from arf_plugin.evaluation.records import by_set, read_records
    from arf_plugin.evaluation.suites import average, load_suite

    suite = load_suite(grid.evaluation.suite)
    grouped: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for record in read_records(records) if records.is_file() else ():
        grouped.setdefault((record["checkpoint"], record.get("alpha")), []).append(record)
    by_name = {run.listed: run for run in runs}
    found = [
        (by_name[name].arm.name, by_name[name].seed, alpha, averages)
        for (name, alpha), group in grouped.items()
        if name in by_name and (averages := average(suite, by_set(group)))
    ]
    return scores_table(found, list(suite.averages))


def scores_table(
    found: Sequence[tuple[str, int, float | None, Mapping[str, float]]], names: Sequence[str]
) -> DataFrame:
    """Scores as a table, indexed by arm, alpha (-1: the run itself) and seed, with a column per average found."""
    import pandas as pd

    index = ["arm", "alpha", "seed"]
    rows = [{"arm": arm, "alpha": _key(alpha), "seed": seed, **by} for arm, seed, alpha, by in found]
    table = pd.DataFrame(rows, columns=[*index, *names]).set_index(index)
    return table.astype(float).dropna(axis=1, how="all").sort_index()


def scores_of(table: DataFrame, arm: str, alpha: float | None) -> DataFrame:
    """An arm's scores at an alpha, a row per seed; only averages that every seed has."""
    arms, alphas = (table.index.get_level_values(name) for name in ("arm", "alpha"))
    return table[(arms == arm) & (alphas == _key(alpha))].droplevel(["arm", "alpha"]).dropna(axis=1)


def _key(alpha: float | None) -> float:
    return -1.0 if alpha is None else alpha


def drop_records(path: Path, gone: re.Pattern[str]) -> None:
    """Removes the records of checkpoints whose paths begin like this."""
    from arf_plugin.evaluation.records import read_records

    records = read_records(path, whole=False) if path.is_file() else []
    kept = [record for record in records if not gone.match(str(record["checkpoint"]))]
    if len(kept) < len(records):
        with replacing(path) as temporary:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            temporary.write_text("".join(lines), encoding="utf-8")


def choose_alphas(
    grid: Grid, choices: Choices, arms: Sequence[Arm], validation: DataFrame
) -> dict[str, float]:
    """Chooses every arm's alpha by the mean over seeds of an average of the validation sets."""
    chosen: dict[str, float] = {}
    if grid.wise.by is None:
        return chosen
    names = deciding(grid.wise.by)
    for arm in arms:
        seeds = len(scores_of(validation, arm.name, None))
        measured = {alpha: scores_of(validation, arm.name, alpha) for alpha in grid.wise.alphas}
        means = {
            alpha: float(found[names].mean(axis=1).mean()) if set(names) <= set(found) else 0.0
            for alpha, found in measured.items()
            if seeds and len(found) == seeds
        }
        if means:
            chosen[arm.name] = choices.decide_alpha(arm, grid.wise.by, means)
    return chosen


def summarize(
    grid: Grid,
    runs: Sequence[Run],
    test: DataFrame,
    alphas: Mapping[str, float],
    merges: Sequence[Merged] = (),
) -> dict[str, Any]:
    """Builds the content of results.json.

    Args:
        grid: The grid.
        runs: The finished runs.
        test: Scores on the test sets.
        alphas: That were chosen, by arm.
        merges: What was merged.

    Returns:
        ``rows``: one per line of the table (arm, alpha, mean, std, per_seed; percent); merged seeds have one score
        alone, and ARM+METHOD as ``arm``. ``against_reference``: the difference to the reference arm, paired by seed.
        All scores are of the test sets.
    """
    lines = []
    for arm in grid.arms:
        lines.append(_line(arm, None, test))
        if arm.name in alphas:
            lines.append(_line(arm, alphas[arm.name], test))
        lines += [_line(one.arm, None, test) for one in merges if one.runs[0].arm.name == arm.name]
    wise = {
        arm.name: {f"{alpha:g}": _line(arm, alpha, test) for alpha in grid.wise.alphas}
        for arm in grid.arms
        if arm.is_trained
    }
    of_arm = {run.arm.name: run for run in runs}
    reference = of_arm[grid.reference].images() if grid.reference in of_arm else None
    cost = {}
    for name, run in of_arm.items():
        images = run.images()
        relative = round(images / reference, 2) if images is not None and reference else None
        cost[name] = {"steps": run.steps(), "images": images, "relative": relative}
    return {
        "grid": grid.name,
        "seeds": sorted({run.seed for run in runs if run.arm.is_trained}),
        "suite": grid.evaluation.suite,
        "reference": grid.reference,
        "rows": list(filter(None, lines)),
        "against_reference": _against(grid.reference, test),
        "wise": {name: {alpha: line for alpha, line in of.items() if line} for name, of in wise.items()},
        "cost": cost,
    }


def _line(arm: Arm, alpha: float | None, test: DataFrame) -> dict[str, Any] | None:
    found = scores_of(test, arm.name, alpha)
    if found.empty:
        return None
    return {
        "arm": arm.name,
        "label": arm.label if alpha is None else f"{arm.label} + WiSE-FT {alpha:g}",
        "alpha": alpha,
        "mean": found.mean().round(3).to_dict(),
        "std": found.std().round(3).to_dict() if len(found) > 1 else None,
        "per_seed": {str(seed): values.round(3).to_dict() for seed, values in found.iterrows() if seed >= 0},
    }


def _against(reference: str | None, test: DataFrame) -> dict[str, Any]:
    """Differences to the reference, seed by seed, for every arm that shares seeds with it."""
    result: dict[str, Any] = {}
    base = scores_of(test, reference or "", None)
    for name in test.index.get_level_values("arm").unique():
        less = (scores_of(test, name, None) - base).dropna(how="all").dropna(axis=1)
        if name != reference and not less.empty:
            result[name] = {
                average: {"mean": round(float(values.mean()), 3), "per_seed": values.round(3).to_list()}
                for average, values in less.items()
            }
    return result


def verdicts(
    grid: Grid, runs: Sequence[Run | Merged], records: Path, lines: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Compares every line of the table (``rows`` of :func:`summarize`) by image with those of the reference arm.

    Returns:
        An entry per pair of lines (arm, label, alpha; against, against_label, against_alpha), with ``averages``: the
        suite's and their ``mean``, see :class:`arf_plugin.evaluation.verdicts.Verdict`; and ``unpaired``: why others
        are missing.
    """
    from arf_plugin.evaluation.records import read_records
    from arf_plugin.evaluation.suites import load_suite
    from arf_plugin.evaluation.verdicts import compare

    averages = load_suite(grid.evaluation.suite).averages
    by_name = {run.listed: run for run in runs}
    measured: dict[tuple[str, float | None], dict[int | None, dict[str, Any]]] = {}
    for record in read_records(records) if records.is_file() else ():
        if (run := by_name.get(record["checkpoint"])) is not None:
            has_seed = isinstance(run, Run) and run.arm.is_trained  # merges, and the model before, have none
            by_seed = measured.setdefault((run.arm.name, record.get("alpha")), {})
            by_seed.setdefault(run.seed if has_seed else None, {})[record["set"]] = record
    found = []
    for other in [line for line in lines if line["arm"].split("+")[0] == grid.reference]:
        for line in [line for line in lines if line is not other]:
            one, reference = (measured.get((each["arm"], each["alpha"]), {}) for each in (line, other))
            compared = compare(one, reference, averages, mean=True)
            found.append(
                {
                    **{name: line[name] for name in ("arm", "label", "alpha")},
                    **{f"against{end}": other[name] for end, name in _AGAINST.items()},
                    "averages": {name: verdict.as_json() for name, verdict in compared.verdicts.items()},
                    "unpaired": compared.unpaired,
                }
            )
    return found


def _tables(
    result: Mapping[str, Any], corner: str, write: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
) -> list[str]:
    """The table of scores, with `corner` above the arms; then those of verdicts, one per arm that is compared with."""
    from arf_plugin.evaluation.verdicts import as_cell

    names = list(dict.fromkeys(name for line in result["rows"] for name in line["mean"]))
    lines = []
    for line in result["rows"]:
        mean, spread, cost = line["mean"], line["std"] or {}, result["cost"].get(line["arm"], {})
        shown = {name: f"{mean[name]:.1f}" for name in mean}
        shown |= {name: f"{shown[name]} ± {spread[name]:.1f}" for name in spread}
        images = "" if line["alpha"] is not None or not cost.get("images") else f"{cost['images']:,}"
        relative = f" ({cost['relative']:g}x)" if images and cost["relative"] else ""
        lines.append([line["label"], *(shown.get(name, "") for name in names), images + relative])
    tables = [write([corner, *names, "images forwarded"], lines)]
    entries = [entry for entry in result.get("verdicts", ()) if entry["averages"]]
    for other in dict.fromkeys(entry["against_label"] for entry in entries):
        of_other = [entry for entry in entries if entry["against_label"] == other]
        names = list(dict.fromkeys(name for entry in of_other for name in entry["averages"]))
        lines = []
        for entry in of_other:
            cells = {name: as_cell(verdict) for name, verdict in entry["averages"].items()}
            lines.append([entry["label"], *(cells.get(name, "") for name in names)])
        tables.append(write([f"less {other}", *names], lines))
    return tables


def as_text(result: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    first, *paired = _tables(result, "", text_table)
    count = len(result["seeds"])
    title = f"test sets, percent, mean ± standard deviation over {count} seed{'s' if count != 1 else ''}"
    return "\n\n".join([f"{title}\n{first}", *([f"{VERDICTS}\n{paired[0]}", *paired[1:]] if paired else [])])


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table of scores for a page of documentation."""
    return _tables(result, "%", markdown_table)[0] + "\n"


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes results.json and table.md."""
    write_json(folder / "results.json", result)
    first, *paired = _tables(result, "%", markdown_table)
    with replacing(folder / "table.md") as temporary:
        text = "\n\n".join([first, *([f"{VERDICTS}:", *paired] if paired else [])])
        temporary.write_text(f"{text}\n", encoding="utf-8")
