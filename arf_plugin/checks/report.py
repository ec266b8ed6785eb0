"""``arf check``'s report: all that the rules find in an anchor set, alone and against task data, and counts beside it.

Training stops at the first error of the same rules (:mod:`arf_plugin.data.startup`).
"""

from __future__ import annotations

import contextlib
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
    """What :func:`check_anchor_set` found.

    Attributes:
        anchors: the set.
        captions, pairs, features, task, coverage: counts, as JSON; None for what is not there.
        errors: what would stop training, or spoil it.
        warnings: what training would work around.
    """

    anchors: str
    manifest: dict[str, Any] | None = None
    captions: dict[str, Any] | None = None
    pairs: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    task: dict[str, Any] | None = None
    coverage: dict[str, Any] | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"anchor set   {self.anchors}"]
        for name, found, text in (
            ("captions", self.captions, "{rows:,} for {samples:,} samples, {mean_length:.0f} characters"),
            ("pairs", self.pairs, "{count:,} in {shards:,} shards, {image_megabytes:.1f} MB of images"),
            (
                "features",
                self.features,
                "of {pairs:,} pairs and {captions:,} captions by {model} ({weights_sha256:.12}), D {dim}",
            ),
            ("task data", self.task, "{samples:,} samples"),
            ("coverage", self.coverage, "{covered:,} of {samples:,} samples have a caption ({percent:.1f}%)"),
        ):
            if found:
                megabytes = found.get("image_bytes", 0) / 1e6
                lines.append(f"{name:<13}" + text.format(**found, image_megabytes=megabytes))
            elif name in ("captions", "pairs"):
                lines.append(f"{name:<13}none: the {name.removesuffix('s')} term is off")
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
    for name, count in _COUNTS.items():
        with contextlib.suppress(ArfError, Unknown):
            setattr(report, name, count(inputs))
    return report


def _count_captions(inputs: Inputs) -> dict[str, Any] | None:
    if not inputs.caption_files:
        return None
    captions = inputs.captions
    return {
        "rows": len(captions),
        "samples": captions.samples,
        "mean_length": captions.mean_length,
        "repeated": captions.repeated,
    }


def _count_pairs(inputs: Inputs) -> dict[str, Any] | None:
    """Repeated images are known if they were read."""
    if not inputs.pair_shards:
        return None
    scans = [scan for _, scan in inputs.pairs if isinstance(scan, ShardScan)]
    digests = [digest for scan in scans for digest in scan.digests]
    return {
        "count": sum(len(scan.keys) for scan in scans),
        "shards": len(inputs.pair_shards),
        "image_bytes": sum(scan.image_bytes for scan in scans),
        "repeated": len(digests) - len(set(digests)) if inputs.full else None,
    }


def _count_features(inputs: Inputs) -> dict[str, Any] | None:
    if (header := inputs.features) is None:
        return None
    counts = {kind: header.rows(kind) for kind in ("pairs", "captions")}
    return {"model": header.model, "weights_sha256": header.weights_sha256, "dim": header.dim, **counts}


def _count_task(inputs: Inputs) -> dict[str, Any] | None:
    if inputs.train_data is None:
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


def _count_coverage(inputs: Inputs) -> dict[str, Any] | None:
    if inputs.train_data is None or not inputs.caption_files:
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


_COUNTS = {
    "captions": _count_captions,
    "pairs": _count_pairs,
    "features": _count_features,
    "task": _count_task,
    "coverage": _count_coverage,
}
