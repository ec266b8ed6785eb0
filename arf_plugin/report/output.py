"""Writes a report: the page, its plots as files, ``report.json`` and ``table.md``.

The page is one HTML file that needs no network, runs no script, and shows every text as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arf_plugin import __version__
from arf_plugin.errors import MissingDependencyError
from arf_plugin.files import replacing, write_json
from arf_plugin.report import provenance, render, tables
from arf_plugin.report.answer import PARTS
from arf_plugin.report.gallery import Advance
from arf_plugin.report.plots import Panel
from arf_plugin.report.report import Options, Report, gather
from arf_plugin.report.scores import MEANINGS, Difference, Key, Score, signed

FORMAT = 1  # of report.json
TEMPLATES = Path(__file__).parent / "templates"
SIGNS = {"ahead": "▲", "ahead here": "△", "level": "≈", "behind here": "▽", "behind": "▼"}


def make_report(
    sources: Sequence[Path],
    out: Path,
    options: Options,
    *,
    on_pair: Advance = lambda: None,
    on_plot: Advance = lambda: None,
) -> Report:
    """Makes a report of grid folders, run folders and files of records, and writes it.

    Args:
        sources: These.
        out: Folder for ``index.html``, ``report.json``, ``table.md`` and ``figures/``.
        options: What else to show.
        on_pair: Called when the gallery has looked at a pair.
        on_plot: Called when a plot has been drawn.

    Raises:
        ArfError: For sources, suites, anchor sets or task data that are not what they should be.
    """
    report = gather(sources, options, on_pair)
    page = as_page(report, on_plot)
    written = set()
    for name, group in report.groups.items():
        written.update(render.save(name, group, out / "figures", report.style))
        on_plot()
    for path in (out / "figures").glob("*"):
        if (
            path.suffix in (".svg", ".png") and path.name not in written
        ):  # of an earlier report in this folder
            path.unlink()
    write_json(out / "report.json", as_json(report))
    markdown = tables.markdown(report.found, report.slices, report.results.unit)
    for name, text in (("table.md", markdown), ("index.html", page)):
        with replacing(out / name) as temporary:
            # Names in tars and JSON may hold lone surrogates, which are no text.
            temporary.write_bytes(text.encode("utf-8", "replace"))
    return report


def as_page(report: Report, on_plot: Advance = lambda: None) -> str:
    """Renders a report as HTML.

    Raises:
        MissingDependencyError: Without jinja2.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingDependencyError("jinja2", "A report", "evaluation") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"about": _about, "signed": signed, "one": lambda value: f"{value:.1f}"}
    found, results = report.found, report.results

    def draw(panel: Panel, name: str) -> str:
        """The page shows it as markup: it is written by matplotlib, which escapes the names in it."""
        svg = render.for_page(panel, report.style, name)
        on_plot()
        return svg

    sentences, kinds = provenance.manifest_rows(report.anchors) if report.anchors else ([], {})
    by_set = results.by_set()
    pairs = [item for one in report.slices for by in one.pairs.values() for item in by.values()]
    sections: dict[str, tuple[str, Any]] = {
        "results": ("Results", report.slices),
        "curves": ("Along α", "curves" in report.groups),
        "domains": ("Accuracy per domain", results.averages.suites and by_set),
        "anchors": ("Anchors", report.gallery),
        "calibration": ("Calibration", "calibration" in report.groups),
        "training": ("Training", "training" in report.groups),
        "runs": ("Runs", True),
    }
    values = vars(report) | {
        "version": __version__,
        "css": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "draw": draw,
        "part_names": PARTS,
        "sections": {name: title for name, (title, shown) in sections.items() if shown},
        "lines": [found.arms[arm].label for arm in (found.before, found.baseline) if arm],
        "arms": found.arms,
        "reference": found.arms.get(found.reference or ""),
        "before": found.before,
        "signs": SIGNS,
        "meanings": MEANINGS,
        "comparisons": len(pairs),
        "paired": any(item.paired for item in pairs),
        "all_paired": all(item.paired for item in pairs),
        "by_set": {arm: by_set[arm, None] for arm in found.arms if by_set.get((arm, None))},
        "alphas": [f"{alpha:g}" for alpha in results.alphas()],
        "anchors": {"sentences": sentences, "kinds": kinds},
        "runs": provenance.run_rows(found),
        "choices": provenance.choice_rows(found),
        "evaluation": provenance.evaluation_rows(found),
        "averages": results.averages,
    }
    html = environment.get_template("report.html").render(values)
    return re.sub(r"\n\s*\n+", "\n", html)


def _about(score: Score) -> str:
    """What stands behind a score or a difference, in words."""
    parts = []
    if isinstance(score, Difference):
        parts.append(MEANINGS[score.verdict])
        if score.interval is not None:
            low, high = map(signed, score.interval)
            seeds = "one seed" if len(score.seeds) == 1 else f"{len(score.seeds)} seeds"
            over = f"images and {seeds}" if score.paired else seeds
            parts.append(f"95 % interval over {over} {low} to {high}")
        if score.paired is not None:
            return "; ".join([*parts, f"p = {score.paired.corrected:.2g}, corrected"])
    elif set(score.seeds) != {None}:
        of_seeds = (f"seed {seed}: {value:.1f}" for seed, value in score.seeds.items() if seed is not None)
        parts.append(", ".join(of_seeds))
    return "; ".join([*parts, f"error of the test images at most {score.image_error:.1f}"])


def as_json(report: Report) -> dict[str, Any]:
    """Returns what report.json holds: the aggregated scores for programs, in percent."""
    found, results, averages = report.found, report.results, report.results.averages
    calibration = _records(results.by_average("ece"))
    for (
        record
    ) in calibration:  # a calibration error is no share of images, so the binomial one says nothing of it
        del record["image_error"]
    return {
        "format": FORMAT,
        "made_by": f"arf-plugin {__version__}",
        "title": report.title,
        "unit": results.unit,
        "suites": [suite.name for suite in averages.suites],
        "reference": found.reference,
        "before": found.before,
        "arms": [asdict(arm) for arm in found.arms.values()],
        "averages": [
            {"name": name, "kind": entry.kind, "sets": list(averages.sets(name))}
            for name, entry in averages.known.items()
        ],
        "images": results.images,
        "results": _records(results.by_average()),
        "sets": _records(results.by_set()),
        "calibration": calibration,
        "chosen_alphas": next((one.alphas for one in report.slices if one.key == "chosen"), {}),
        "differences": [
            {
                "table": one.key,
                "arm": arm,
                "against": other,
                "name": name,
                **_numbers(item),
                "standard_error": _rounded(item.error),
                "interval95": None if item.interval is None else [_rounded(end) for end in item.interval],
                "paired": None if item.paired is None else item.paired.as_json(),
                "verdict": item.verdict,
            }
            for one in report.slices
            for (arm, other), by_average in one.pairs.items()
            for name, item in by_average.items()
        ],
        "answer": {
            name: getattr(report.answer, name)
            for name in ("word", "headline", "sentence", "advice", "command")
        },
        "notes": report.notes,
        "missing": report.missing,
    }


def _records(by_key: Mapping[Key, Mapping[str, Score]]) -> list[dict[str, Any]]:
    ordered = sorted(by_key, key=lambda key: (key[0], -1.0 if key[1] is None else key[1]))
    return [
        {"arm": arm, "alpha": alpha, "name": name, **_numbers(score), "sd": _rounded(score.deviation)}
        for arm, alpha in ordered
        for name, score in by_key[arm, alpha].items()
    ]


def _numbers(score: Score) -> dict[str, Any]:
    return {
        "mean": _rounded(score.mean),
        "n": len(score.seeds),
        "image_error": _rounded(score.image_error),
        "seeds": {str(seed): _rounded(value) for seed, value in score.seeds.items()},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
