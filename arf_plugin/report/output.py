"""Writes a report: the page, its plots as files, ``report.json`` and ``table.md``.

The page is one HTML file that needs no network, runs no script, and shows every text as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arf_plugin import __version__
from arf_plugin.errors import MissingDependencyError
from arf_plugin.files import replacing, write_json
from arf_plugin.report import provenance, render, tables
from arf_plugin.report.gallery import Advance
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
    """Makes a report and writes it.

    Args:
        sources: Grid folders, run folders, files of records.
        out: Folder for ``index.html``, ``report.json``, ``table.md`` and ``figures/``.
        options: See :class:`Options`.
        on_pair: Called when the gallery has looked at a pair.
        on_plot: Called when a plot has been drawn.

    Raises:
        ArfError: For sources, suites, anchor sets or task data that are not what they should be.
    """
    report = gather(sources, options, on_pair)
    page = as_page(report, on_plot)
    written = set()
    for group in report.groups.values():
        written.update(render.save(group, out / "figures", report.style))
        on_plot()
    for stale in (out / "figures").glob(
        "*"
    ):  # of an earlier report in this folder, and no longer on the page
        if stale.suffix in (".svg", ".png") and stale.name not in written:
            stale.unlink()
    write_json(out / "report.json", as_json(report))
    markdown = tables.markdown(report.found, report.slices, report.averages, report.results.unit)
    for name, text in (("table.md", markdown), ("index.html", page)):
        with replacing(out / name) as temporary:
            # Names in tars and JSON may hold lone surrogates, which are no text.
            temporary.write_bytes(text.encode("utf-8", "replace"))
    return report


def as_page(report: Report, on_plot: Advance = lambda: None) -> str:
    """Renders a report as HTML.

    Args:
        report: What to show.
        on_plot: Called when a plot has been drawn.

    Raises:
        MissingDependencyError: Without jinja2.
    """
    try:
        import jinja2
        from markupsafe import Markup
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
    found, averages, results = report.found, report.averages, report.results
    arms = {
        # The colours and the style sheet are ours.
        name: {
            "name": name,
            "label": arm.label,
            "what": arm.what,
            "colour": Markup(report.style.css_colour(name)),
        }
        for name, arm in found.arms.items()
    }
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, group in report.groups.items():
        for number, panel in enumerate(group.panels):
            # Written by matplotlib, which escapes the names in it.
            svg = Markup(render.for_page(panel, report.style, f"{name}-{number}"))
            shown = {"id": f"{name}-{number}", "title": panel.title, "about": panel.about, "svg": svg}
            groups.setdefault(name, []).append(shown)
            on_plot()
    said = report.comparisons()
    first, further = ([], []) if not said else (said[0][1][:1], [(said[0][0], said[0][1][1:]), *said[1:]])
    sentences, kinds = provenance.manifest_rows(report.anchors) if report.anchors else ([], {})
    by_set = results.by_set()
    pairs = [item for one in report.slices for _, by in one.pairs(found.reference) for item in by.values()]
    html = environment.get_template("report.html").render(
        title=report.title,
        version=__version__,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        light=Markup(report.style.variables()),
        dark=Markup(report.style.variables(dark=True)),
        first=first,
        further=[(title, texts) for title, texts in further if texts],
        facts=_facts(report),
        notes=report.notes,
        missing=report.missing,
        arms=arms,
        reference=arms.get(found.reference or ""),
        before=found.before,
        unit=results.unit,
        tables=[(one, one.names(averages)) for one in report.slices],
        signs=SIGNS,
        meanings=MEANINGS,
        comparisons=len(pairs),
        paired=any(item.paired for item in pairs),
        all_paired=all(item.paired for item in pairs),
        groups=groups,
        by_set={arm: by_set[arm, None] for arm in found.arms if by_set.get((arm, None))},
        alphas=[f"{alpha:g}" for alpha in results.alphas()],
        gallery=report.gallery,
        anchors={"sentences": sentences, "kinds": kinds},
        runs=provenance.run_rows(found),
        choices=provenance.choice_rows(found),
        evaluation=provenance.evaluation_rows(found),
        images={name: results.images(name) for name in results.sets},
        averages=[(name, averages.sets(name), entry.harmonic) for name, entry in averages.known.items()],
    )
    return re.sub(r"\n\s*\n+", "\n", html)


def _facts(report: Report) -> list[tuple[str, str]]:
    found = report.found
    seeds = {one.seed for one in found.test} | {run.seed for run in found.runs}
    models = dict.fromkeys(str(one.record["model"]) for one in found.test if one.record.get("model"))
    counts = [count for name in report.results.sets if (count := report.results.images(name))]
    facts = {
        "arms": str(len(found.arms)),
        "seeds": ", ".join(str(seed) for seed in sorted(seed for seed in seeds if seed is not None)),
        "test images": f"{sum(counts):,} in {len(counts)} sets" if counts else "",
        "suite": ", ".join(suite.name for suite in report.averages.suites if suite.name),
        "model": ", ".join(name.rstrip("/").rsplit("/", 1)[-1] for name in models),
    }
    return [(name, text) for name, text in facts.items() if text]


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
        parts.append(
            ", ".join(f"seed {seed}: {value:.1f}" for seed, value in score.seeds.items() if seed is not None)
        )
    return "; ".join([*parts, f"error of the test images at most {score.image_error:.1f}"])


def as_json(report: Report) -> dict[str, Any]:
    """Returns what report.json holds: the aggregated scores for programs, in percent."""
    found, results = report.found, report.results
    calibration = _records(results.by_average("ece"))
    for record in calibration:
        del record[
            "image_error"
        ]  # a calibration error is no share of images, so the binomial one says nothing of it
    return {
        "format": FORMAT,
        "made_by": f"arf-plugin {__version__}",
        "title": report.title,
        "unit": results.unit,
        "suites": [suite.name for suite in report.averages.suites if suite.name],
        "reference": found.reference,
        "before": found.before,
        "arms": [
            {"name": arm.name, "label": arm.label, "what": arm.what, "kind": arm.kind}
            for arm in found.arms.values()
        ],
        "averages": [
            {"name": name, "kind": entry.kind, "sets": list(report.averages.sets(name))}
            for name, entry in report.averages.known.items()
        ],
        "images": {name: results.images(name) for name in results.sets},
        "results": _records(results.by_average()),
        "sets": _records(results.by_set()),
        "calibration": calibration,
        "chosen_alphas": next((one.alphas for one in report.slices if one.key == "chosen"), {}),
        "differences": _differences(report),
        "summary": report.summary(),
        "notes": report.notes,
        "missing": report.missing,
    }


def _records(by_key: Mapping[Key, Mapping[str, Score]]) -> list[dict[str, Any]]:
    ordered = sorted(by_key, key=lambda key: (key[0], -1.0 if key[1] is None else key[1]))
    return [
        {
            "arm": key[0],
            "alpha": key[1],
            "name": name,
            **_numbers(score),
            "sd": None if score.deviation is None else round(score.deviation, 4),
        }
        for key in ordered
        for name, score in by_key[key].items()
    ]


def _numbers(score: Score) -> dict[str, Any]:
    return {
        "mean": round(score.mean, 4),
        "n": len(score.seeds),
        "image_error": round(score.image_error, 4),
        "seeds": {str(seed): round(value, 4) for seed, value in score.seeds.items()},
    }


def _differences(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "table": one.key,
            "arm": arm,
            "against": other,
            "name": name,
            **_numbers(item),
            "standard_error": None if item.error is None else round(item.error, 4),
            "interval95": None if item.interval is None else [round(end, 4) for end in item.interval],
            "every_seed": item.every_seed,
            "paired": None if item.paired is None else item.paired.as_json(),
            "verdict": item.verdict,
        }
        for one in report.slices
        for (arm, other), by_average in one.pairs(report.found.reference)
        for name, item in by_average.items()
    ]
