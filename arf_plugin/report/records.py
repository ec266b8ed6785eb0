"""``report.json``: the aggregated figures for programs, in percent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arf_plugin import __version__
from arf_plugin.report.comparison import Difference
from arf_plugin.report.report import Report
from arf_plugin.report.results import Figure, Key

FORMAT = 1


def as_json(report: Report) -> dict[str, Any]:
    """Returns what report.json holds."""
    found, results = report.found, report.results

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
        "calibration": [_without_image_error(record) for record in _records(results.by_average("ece"))],
        "chosen_alphas": next((one.alphas for one in report.slices if one.key == "chosen"), {}),
        "differences": _differences(report),
        "summary": report.summary(),
        "notes": report.notes,
        "missing": report.missing,
    }


def _records(by_key: Mapping[Key, Mapping[str, Figure]]) -> list[dict[str, Any]]:
    ordered = sorted(
        by_key.items(), key=lambda item: (item[0][0], -1.0 if item[0][1] is None else item[0][1])
    )
    return [
        {
            "arm": arm,
            "alpha": alpha,
            "name": name,
            "mean": round(figure.mean, 4),
            "sd": None if figure.deviation is None else round(figure.deviation, 4),
            "n": len(figure.seeds),
            "image_error": round(figure.image_error, 4),
            "seeds": {str(seed): round(value, 4) for seed, value in figure.seeds.items()},
        }
        for (arm, alpha), by_name in ordered
        for name, figure in by_name.items()
    ]


def _without_image_error(record: dict[str, Any]) -> dict[str, Any]:
    """A calibration error is no share of images, so the binomial error says nothing of it."""
    return {name: value for name, value in record.items() if name != "image_error"}


def _differences(report: Report) -> list[dict[str, Any]]:
    reference = report.found.reference
    found = []
    for one in report.slices:
        pairs = [((arm, reference), by) for arm, by in one.differences.items()] + list(
            one.comparisons.items()
        )
        for (arm, other), by_average in pairs:
            for name, item in by_average.items():
                found.append(
                    {"table": one.key, "arm": arm, "against": other, "name": name, **_difference(item)}
                )
    return found


def _difference(item: Difference) -> dict[str, Any]:
    return {
        "mean": round(item.mean, 4),
        "standard_error": None if item.error is None else round(item.error, 4),
        "interval95": None if item.interval is None else [round(end, 4) for end in item.interval],
        "image_error": round(item.image_error, 4),
        "n": len(item.seeds),
        "seeds": {str(seed): round(value, 4) for seed, value in item.seeds.items()},
        "every_seed": item.every_seed,
        "verdict": item.verdict,
    }
