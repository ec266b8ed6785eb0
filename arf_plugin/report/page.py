"""Renders the page: one HTML file that needs no network, runs no script, and shows every text as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arf_plugin import __version__
from arf_plugin.errors import MissingDependencyError
from arf_plugin.report import figures, provenance
from arf_plugin.report.comparison import MEANINGS, Difference, signed
from arf_plugin.report.drawing import domain_sets
from arf_plugin.report.gallery import Advance
from arf_plugin.report.report import Report
from arf_plugin.report.results import Figure
from arf_plugin.report.tables import Slice

TEMPLATES = Path(__file__).parent / "templates"
SIGNS = {"ahead": "▲", "ahead here": "△", "level": "≈", "behind here": "▽", "behind": "▼"}


def render(report: Report, on_figure: Advance = lambda: None) -> str:
    """Renders a report as HTML.

    Args:
        report: what to show.
        on_figure: called when a figure has been drawn.

    Raises:
        MissingDependencyError: without jinja2.
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
    html = environment.get_template("report.html").render(_content(report, on_figure))
    return re.sub(r"\n\s*\n+", "\n", html)


def _content(report: Report, on_figure: Advance) -> dict[str, Any]:
    from markupsafe import Markup

    found = report.found
    arms = {
        name: {
            "label": arm.label,
            "what": arm.what,
            "colour": Markup(report.style.css_colour(name)),
            "name": name,
        }
        for name, arm in found.arms.items()
    }
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    said = report.comparisons()
    manifest = provenance.manifest_rows(report.anchors) if report.anchors else ([], {})
    return {
        "title": report.title,
        "version": __version__,
        "css": Markup(css),  # ours; the colours are those of style.py
        "light": Markup(report.style.variables()),
        "dark": Markup(report.style.variables(dark=True)),
        "first": said[0][1][:1] if said else [],
        "further": [(title, texts) for title, texts in [(said[0][0], said[0][1][1:]), *said[1:]] if texts]
        if said
        else [],
        "facts": _facts(report),
        "notes": report.notes,
        "missing": report.missing,
        "arms": arms,
        "reference": arms.get(found.reference or ""),
        "before": found.before,
        "unit": report.results.unit,
        "tables": [_table(report, one) for one in report.slices],
        "descriptions": [arm for arm in arms.values() if arm["what"]],
        "signs": [(SIGNS[verdict], _css_class(verdict), meaning) for verdict, meaning in MEANINGS.items()],
        "comparisons": sum(len(by) for one in report.slices for by in one.differences.values()),
        "groups": {name: _panels(report, name, on_figure) for name in report.groups},
        "domains": _domains(report),
        "alphas": [f"{alpha:g}" for alpha in report.results.alphas()],
        "gallery": report.gallery,
        "anchors": {"sentences": manifest[0], "halves": manifest[1]},
        "runs": provenance.run_rows(found),
        "choices": provenance.choice_rows(found),
        "evaluation": provenance.evaluation_rows(found),
        "images": [(name, report.results.images(name)) for name in report.results.sets],
        "averages": [
            {
                "name": name,
                "kind": entry.kind,
                "sets": ", ".join(report.averages.sets(name)),
                "of": entry.harmonic,
            }
            for name, entry in report.averages.known.items()
        ],
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    found = report.found
    seeds = sorted(
        {item.seed for item in found.test if item.seed is not None}
        | {r.seed for r in found.runs if r.seed is not None}
    )
    models = dict.fromkeys(str(item.row["model"]) for item in found.test if item.row.get("model"))
    counts = [count for name in report.results.sets if (count := report.results.images(name))]
    facts = [("arms", str(len(found.arms)))]
    if seeds:
        facts.append(("seeds", ", ".join(map(str, seeds))))
    if counts:
        facts.append(("test images", f"{sum(counts):,} in {len(counts)} sets"))
    if report.averages.suites and report.averages.suites[0].name:
        facts.append(("suite", ", ".join(suite.name for suite in report.averages.suites)))
    if models:
        facts.append(("model", ", ".join(name.rstrip("/").rsplit("/", 1)[-1] for name in models)))
    return facts


def _table(report: Report, one: Slice) -> dict[str, Any]:
    names = [name for name in report.averages.known if any(name in by for by in one.figures.values())]
    rows = []
    for arm, figures_of in one.figures.items():
        cells = []
        for name in names:
            figure, other = figures_of.get(name), one.differences.get(arm, {}).get(name)
            cells.append(
                None
                if figure is None
                else {**_figure(figure), "best": arm in one.best(name), "difference": _difference(other)}
            )
        rows.append(
            {"arm": arm, "cells": cells, "alpha": f"{one.alphas[arm]:g}" if arm in one.alphas else None}
        )
    labels = {name: arm.label for name, arm in report.found.arms.items()}
    further = [
        {
            "one": labels[pair[0]],
            "other": labels[pair[1]],
            "cells": [_difference(by.get(name)) for name in names],
        }
        for pair, by in one.comparisons.items()
    ]
    return {
        "title": one.title,
        "names": names,
        "rows": rows,
        "further": further,
        "has_alphas": bool(one.alphas),
    }


def _figure(figure: Figure) -> dict[str, Any]:
    seeds = ", ".join(f"seed {seed}: {value:.1f}" for seed, value in figure.seeds.items() if seed is not None)
    return {
        "mean": f"{figure.mean:.1f}",
        "deviation": None if figure.deviation is None else f"{figure.deviation:.1f}",
        "about": f"{seeds}{'; ' if seeds else ''}error of the test images at most {figure.image_error:.1f}",
    }


def _difference(item: Difference | None) -> dict[str, Any] | None:
    if item is None:
        return None
    about = MEANINGS[item.verdict]
    if item.interval is not None:
        low, high = map(signed, item.interval)
        about += f"; 95 % interval over {len(item.seeds)} seeds {low} to {high}"
    about += f"; error of the test images at most {item.image_error:.1f}"
    return {
        "mean": signed(item.mean),
        "error": None if item.error is None else f"{item.error:.1f}",
        "sign": SIGNS[item.verdict],
        "class": _css_class(item.verdict),
        "about": about,
    }


def _css_class(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _panels(report: Report, name: str, on_figure: Advance) -> list[dict[str, Any]]:
    from markupsafe import Markup

    panels = []
    for number, panel in enumerate(report.groups[name].panels):
        identity = f"{name}-{number}"
        # Written by matplotlib, which escapes the names in it.
        svg = Markup(figures.for_page(panel, report.style, identity))
        panels.append({"id": identity, "title": panel.title, "about": panel.about, "svg": svg})
        on_figure()
    return panels


def _domains(report: Report) -> dict[str, Any] | None:
    """Accuracy of every arm on every set, with the difference to the reference as a tint."""
    by_set = report.results.by_set()
    names = report.results.sets
    arms = [arm for arm in report.found.arms if (arm, None) in by_set]
    if not names or not arms:
        return None
    reference: Mapping[str, Figure] = by_set.get((report.found.reference or "", None), {})
    rows = []
    for arm in arms:
        cells = []
        for name in names:
            figure = by_set[arm, None].get(name)
            tint = 0.0
            if figure is not None and name in reference and arm != report.found.reference:
                tint = max(-1.0, min(1.0, (figure.mean - reference[name].mean) / 15.0))
            cells.append(
                None
                if figure is None
                else {**_figure(figure), "side": "up" if tint > 0 else "down", "tint": round(abs(tint) * 42)}
            )
        rows.append({"arm": arm, "cells": cells})
    shifted = set(domain_sets(report.averages, report.results))
    heads = [
        {"name": name, "images": report.results.images(name), "shifted": name in shifted} for name in names
    ]
    return {"names": heads, "rows": rows}
