"""``arf check``'s report: all that the rules find in an anchor set, alone and against task data, and counts beside it.

Training stops at the first error of the same rules (:mod:`arf_plugin.data.startup`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arf_plugin.anchors.manifest import read_manifest
from arf_plugin.anchors.scan import ShardScan
from arf_plugin.anchors.tars import is_remote
from arf_plugin.checks.inputs import Inputs, Unknown
from arf_plugin.checks.rules import NAMED, findings
from arf_plugin.errors import ArfError

SHOWN = 20  # errors in the report for people; the JSON report has them all


@dataclass
class Report:
    """What :func:`check_anchor_set` found; its counts are None for what is not there."""

    anchors: str
    manifest: dict[str, Any] | None = None
    captions: dict[str, Any] | None = None
    pairs: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    task: dict[str, Any] | None = None
    coverage: dict[str, Any] | None = None
    errors: list[str] = field(default_factory=list)  # what would stop training, or spoil it
    warnings: list[str] = field(default_factory=list)  # what training would work around

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"anchor set   {self.anchors}"]
        for name, (_, label, text) in _COUNTS.items():
            if found := getattr(self, name):
                megabytes = found.get("image_bytes", 0) / 1e6
                lines.append(f"{label:<13}" + text.format(**found, image_megabytes=megabytes))
            elif name in ("captions", "pairs"):
                lines.append(f"{label:<13}none: the {name.removesuffix('s')} term is off")
        if self.task and self.pairs and self.pairs["count"]:
            times = self.task["samples"] / self.pairs["count"]
            lines.append(
                f"epoch        shows each pair {times:.2g} times, if pair and task batches are of one size"
            )
        lines += [f"warning      {text}" for text in self.warnings]
        lines += [f"error        {text}" for text in self.errors[:SHOWN]]
        if len(self.errors) > SHOWN:
            lines.append(f"             ... {len(self.errors)} errors in all; --json lists them")
        lines.append("training would refuse this set" if self.errors else "all good")
        return lines


def check_anchor_set(inputs: Inputs) -> Report:
    """Checks a set, and its captions against task data if that is given.

    Args:
        inputs: the set, and what is known of a run with it.
    """
    assert inputs.anchors is not None
    report = Report(inputs.anchors)
    for finding in findings(inputs):
        {"error": report.errors, "warning": report.warnings}.get(finding.level, []).append(finding.text)
    if not is_remote(inputs.anchors):
        with contextlib.suppress(ArfError):  # it is among the findings
            report.manifest = read_manifest(Path(inputs.anchors))
    for name, (count, _, _) in _COUNTS.items():
        with contextlib.suppress(ArfError, Unknown):
            setattr(report, name, count(inputs))
    return report


def _captions(inputs: Inputs) -> dict[str, Any] | None:
    if not inputs.caption_files:
        return None
    found = inputs.captions
    shown = {name: getattr(found, name) for name in ("samples", "mean_length", "repeated")}
    return {"rows": len(found), **shown}


def _pairs(inputs: Inputs) -> dict[str, Any] | None:
    if not inputs.pair_shards:
        return None
    scans = [scan for _, scan in inputs.pairs if isinstance(scan, ShardScan)]
    digests = [digest for scan in scans for digest in scan.digests]
    return {
        "count": sum(len(scan.keys) for scan in scans),
        "shards": len(inputs.pair_shards),
        "image_bytes": sum(scan.image_bytes for scan in scans),
        "repeated": len(digests) - len(set(digests)) if inputs.full else None,  # known if images were read
    }


def _features(inputs: Inputs) -> dict[str, Any] | None:
    if (header := inputs.features) is None:
        return None
    counts = {kind: header.rows(kind) for kind in ("pairs", "captions")}
    return {"model": header.model, "weights_sha256": header.weights_sha256, "dim": header.dim, **counts}


def _task(inputs: Inputs) -> dict[str, Any] | None:
    if not inputs.has_task:
        return None
    task = inputs.task
    return {
        "samples": len(task.ids),
        "shards": task.shards,
        "without_image": len(task.without_image),
        "without_text": task.without_text,
        "without_class": task.without_class,
        "unreadable": len(task.unreadable),
    }


def _coverage(inputs: Inputs) -> dict[str, Any] | None:
    if not (inputs.has_task and inputs.caption_files):
        return None
    samples, missing = len(inputs.task.ids), inputs.without_caption
    covered = samples - len(missing)
    return {
        "samples": samples,
        "covered": covered,
        "percent": 100 * covered / samples,
        "missing": len(missing),
        "missing_examples": missing[:NAMED],
        "unused": inputs.captions.samples - covered,
    }


# By attribute of the report: what counts it, and its line for people.
_COUNTS: dict[str, tuple[Callable[[Inputs], dict[str, Any] | None], str, str]] = {
    "captions": (_captions, "captions", "{rows:,} for {samples:,} samples, {mean_length:.0f} characters"),
    "pairs": (_pairs, "pairs", "{count:,} in {shards:,} shards, {image_megabytes:.1f} MB of images"),
    "features": (
        _features,
        "features",
        "of {pairs:,} pairs and {captions:,} captions by {model} ({weights_sha256:.12}), D {dim}",
    ),
    "task": (_task, "task data", "{samples:,} samples"),
    "coverage": (_coverage, "coverage", "{covered:,} of {samples:,} samples have a caption ({percent:.1f}%)"),
}
