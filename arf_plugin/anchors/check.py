"""Checks an anchor set, alone and against task data, and says what training would see.

Training makes the same checks before its first step and stops at the first error; here all errors are collected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arf_plugin.anchors.captions import read_caption_files
from arf_plugin.anchors.manifest import read_manifest
from arf_plugin.anchors.scan import scan_shard
from arf_plugin.anchors.tars import is_remote
from arf_plugin.anchors.task import TaskScan, scan_task_ids
from arf_plugin.errors import AnchorSetError, ArfError

NAMED = 5  # examples per kind of error
SHOWN = 20  # errors in the report for people; the JSON report has them all
Advance = Callable[[str], object]


@dataclass
class Captions:
    """The captions of a set: number of rows, Arrow array of their ids, and mean length in characters."""

    rows: int
    ids: Any
    mean_length: float
    repeated: int


@dataclass
class Pairs:
    """The pairs of a set: their number, shards and bytes, and the errors that were found.

    ``repeated`` counts the images whose bytes another pair has too; None if images were not read.
    """

    count: int = 0
    shards: list[str] = field(default_factory=list)
    image_bytes: int = 0
    repeated: int | None = None
    errors: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What :func:`check_anchor_set` found.

    Attributes:
        anchors: the set.
        captions, pairs, task, coverage: counts, as JSON; None for what is not there.
        errors: what would stop training, or spoil it.
        warnings: what training would work around.
    """

    anchors: str
    manifest: dict[str, Any] | None = None
    captions: dict[str, Any] | None = None
    pairs: dict[str, Any] | None = None
    task: dict[str, Any] | None = None
    coverage: dict[str, Any] | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"anchor set   {self.anchors}"]
        if self.captions:
            lines.append(
                "captions     {rows:,} for {samples:,} samples, {mean_length:.0f} characters".format(
                    **self.captions
                )
            )
        else:
            lines.append("captions     none: the caption term is off")
        if self.pairs:
            megabytes = self.pairs["image_bytes"] / 1e6
            lines.append(
                "pairs        {count:,} in {shards:,} shards".format(**self.pairs)
                + f", {megabytes:.1f} MB of images"
            )
        else:
            lines.append("pairs        none: the pair term is off")
        if self.task:
            lines.append("task data    {samples:,} samples".format(**self.task))
        if self.coverage:
            lines.append(
                "coverage     {covered:,} of {samples:,} samples have a caption ({percent:.1f}%)".format(
                    **self.coverage
                )
            )
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


def check_captions(anchors: str) -> Captions | None:
    """Reads and validates the captions of a set; None if it has none.

    Raises:
        AnchorSetError: naming the file, and the row, of what is wrong.
    """
    import pyarrow.compute as pc

    fs, files = _files(anchors, "captions/*.parquet")
    if not files:
        return None
    table = read_caption_files(fs, files)
    if not len(table):
        raise AnchorSetError(
            f"The {len(files)} files in {anchors}/captions hold no rows. Build them with: arf caption"
        )
    distinct = table.group_by(["id", "caption"]).aggregate([]).num_rows
    return Captions(
        rows=len(table),
        ids=pc.unique(table["id"]),
        mean_length=pc.mean(pc.utf8_length(table["caption"])).as_py(),
        repeated=len(table) - distinct,
    )


def check_pairs(anchors: str, *, decode: bool = False, advance: Advance | None = None) -> Pairs | None:
    """Looks at every pair of a set; None if it has none.

    Args:
        anchors: folder or fsspec URL.
        decode: decodes every image in full rather than look at its end markers.
        advance: called with the URL of each shard when it is done.

    Returns:
        The pairs with all errors found: images that are missing or unreadable, texts that are missing, empty or not
        UTF-8, damaged tars.
    """
    fs, files = _files(anchors, "pairs/*.tar")
    if not files:
        return None
    shards = [fs.unstrip_protocol(name) if is_remote(anchors) else name for name in files]
    pairs = Pairs(shards=shards)
    digests: set[str] = set()
    for url in shards:
        try:
            scan = scan_shard(url, AnchorSetError, texts=True, decode=decode)
        except AnchorSetError as cause:
            pairs.errors.append(str(cause))
            continue
        finally:
            if advance is not None:
                advance(url)
        pairs.count += len(scan.keys)
        pairs.image_bytes += scan.image_bytes
        digests.update(scan.digests)
        for key in scan.without_image:
            pairs.errors.append(f"{url}, pair {key}: has no image (KEY.jpg, .jpeg, .png or .webp)")
        for problems in (scan.unreadable, scan.bad_texts):
            pairs.errors += [f"{url}, pair {key}: {reason}" for key, reason in problems.items()]
    if decode:
        pairs.repeated = pairs.count - len(digests)
    if not pairs.count and not pairs.errors:
        pairs.errors.append(
            f"The {len(shards)} tars in {anchors}/pairs hold no pair. Build them with: arf pack"
        )
    return pairs


def check_anchor_set(
    anchors: str,
    train_data: str | None = None,
    dataset_type: str = "auto",
    csv_img_key: str = "filepath",
    csv_separator: str = "\t",
    *,
    missing_caption: str = "error",
    full: bool = False,
    advance: Advance | None = None,
) -> Report:
    """Checks a set, and its captions against task data if that is given.

    Args:
        anchors: folder or fsspec URL.
        train_data: as open_clip's flag, like the next three; see :func:`arf_plugin.anchors.task.scan_task_ids`.
        dataset_type: ``webdataset``, ``csv`` or ``auto``.
        csv_img_key: column of the image paths.
        csv_separator: separator of the columns.
        missing_caption: as ``--arf-missing-caption``.
        full: decodes every image.
        advance: called with the URL of each shard when it is done.
    """
    report = Report(anchors)
    captions = pairs = None
    try:
        _require_folder(anchors)
        if not is_remote(anchors):
            report.manifest = read_manifest(Path(anchors))
        captions = check_captions(anchors)
    except ArfError as cause:
        report.errors.append(str(cause))
    else:
        pairs = check_pairs(anchors, decode=full, advance=advance)
        if captions is None and pairs is None:
            report.errors.append(
                f"{anchors} has neither captions/*.parquet nor pairs/*.tar. Build a set with: arf anchors"
            )
    if captions is not None:
        report.captions = {
            "rows": captions.rows,
            "samples": len(captions.ids),
            "mean_length": captions.mean_length,
            "repeated": captions.repeated,
        }
        if captions.repeated:
            report.warnings.append(f"{captions.repeated} captions repeat another one of the same sample")
    if pairs is not None:
        report.pairs = {
            "count": pairs.count,
            "shards": len(pairs.shards),
            "image_bytes": pairs.image_bytes,
            "repeated": pairs.repeated,
        }
        if pairs.repeated:
            report.warnings.append(
                f"{pairs.repeated} pairs repeat the image of another pair, so that pairs may be their own negatives"
            )
        report.errors += pairs.errors
    if train_data is not None:
        try:
            task = scan_task_ids(
                train_data,
                dataset_type,
                csv_img_key,
                csv_separator,
                images=True,
                decode=full,
                advance=advance,
            )
        except ArfError as cause:
            report.errors.append(str(cause))
        else:
            _report_task(report, task)
            if captions is not None:
                _report_coverage(report, task, captions, missing_caption)
    return report


def _files(anchors: str, pattern: str) -> tuple[Any, list[str]]:
    """The set's file system, and its files of a pattern in order."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(anchors)
    return fs, sorted(fs.glob(f"{root.rstrip('/')}/{pattern}"))


def _require_folder(anchors: str) -> None:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(anchors)
        there = fs.isdir(root)
    except (OSError, ImportError, ValueError) as cause:
        raise AnchorSetError(f"{anchors} cannot be opened: {cause}") from cause
    if not there:
        raise AnchorSetError(
            f"{anchors} is not a folder. Expected an anchor set; build one with: arf anchors"
        )


def _report_task(report: Report, task: TaskScan) -> None:
    report.task = {
        "samples": len(task.ids),
        "shards": task.shards,
        "without_image": len(task.without_image),
        "without_text": task.without_text,
        "without_class": task.without_class,
        "unreadable": len(task.unreadable),
    }
    if task.without_image:
        report.warnings.append(
            f"{len(task.without_image)} task samples have no image, the first being {task.without_image[0]}; "
            "training passes over them"
        )
    if task.unreadable:
        named = "; ".join(f"{name} {reason}" for name, reason in list(task.unreadable.items())[:NAMED])
        report.warnings.append(
            f"{len(task.unreadable)} task images are unreadable, which training passes over with a warning: {named}"
        )
    if task.shards and task.without_text and task.without_class:
        report.warnings.append(
            f"{task.without_text} task samples have no txt and {task.without_class} no cls: training needs txt, or "
            "cls with --arf-classnames"
        )


def _report_coverage(report: Report, task: TaskScan, captions: Captions, missing_caption: str) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    ids = pa.array(task.ids, pa.large_string())
    found = pc.is_in(ids, value_set=captions.ids)
    covered = pc.sum(found).as_py() or 0
    missing = ids.filter(pc.invert(found))
    unused = len(captions.ids) - covered
    report.coverage = {
        "samples": len(ids),
        "covered": covered,
        "percent": 100 * covered / len(ids),
        "missing": len(missing),
        "missing_examples": missing[:NAMED].to_pylist(),
        "unused": unused,
    }
    if not covered:
        report.errors.append(
            f"The captions cover none of the {len(ids)} task samples. Task ids look like {task.ids[0]!r}, the "
            f"captions' like {captions.ids[0].as_py()!r}. An id is <shard name>/<key>, or the image path of a CSV row."
        )
    elif len(missing):
        named = ", ".join(missing[:NAMED].to_pylist())
        text = f"{len(missing)} task samples have no caption: {named}{' ...' if len(missing) > NAMED else ''}"
        if missing_caption == "prompt":
            report.warnings.append(f"{text}; their class prompt takes its place")
        else:
            report.errors.append(
                f"{text}. Build them with arf caption, or train with --arf-missing-caption prompt"
            )
    if covered and unused:
        report.warnings.append(f"{unused} samples with captions are not in the task data")
