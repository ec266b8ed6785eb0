"""The ids of the task data, as open_clip's ``--train-data`` names it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from arf_plugin.anchors.ids import sample_id, shard_name
from arf_plugin.anchors.images import image_problem
from arf_plugin.anchors.scan import require_unique_keys, scan_shard
from arf_plugin.errors import ArfError, TaskDataError

CSV_SUFFIXES = (".csv", ".tsv")


@dataclass
class TaskScan:
    """What the task data holds.

    Attributes:
        ids: ids of the samples that have an image, in order.
        shards: number of shards; 0 for a CSV.
        without_image: ids of samples without an image, which training passes over.
        without_text: number of samples with an image but without ``txt``.
        without_class: number of samples with an image but without ``cls``.
        without_both: ids of samples with an image but neither.
        half_classed: shards in which some samples have a ``cls`` and some have none.
        unreadable: reason per id of a damaged image, which training passes over with a warning.
    """

    ids: list[str] = field(default_factory=list)
    shards: int = 0
    without_image: list[str] = field(default_factory=list)
    without_text: int = 0
    without_class: int = 0
    without_both: list[str] = field(default_factory=list)
    half_classed: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def is_csv(data: str, dataset_type: str = "auto") -> bool:
    """True if open_clip takes the data for a CSV, by its name or by ``--dataset-type``.

    Raises:
        TaskDataError: if it is of neither kind.
    """
    if dataset_type in ("csv", "webdataset"):
        return dataset_type == "csv"
    if dataset_type != "auto":
        raise TaskDataError(
            f"Task data of type {dataset_type!r} has no ids to join captions with (csv, webdataset)."
        )
    return data.lower().endswith(CSV_SUFFIXES)


def expand_urls(data: str, error: type[ArfError] = TaskDataError) -> list[str]:
    """Expands ``::`` and braces as open_clip does.

    Raises:
        error: if nothing is left, or a shard is named twice.
    """
    from webdataset.shardlists import expand_urls as expand

    urls = [url for url in expand(data) if url]
    if not urls:
        raise error(f"{data!r} names no shard. Expected tars such as 'data/{{000..099}}.tar'.")
    url, count = Counter(urls).most_common(1)[0]
    if count > 1:
        raise error(f"{url} is named {count} times in {data!r}. Each shard counts once; name it once.")
    return urls


def scan_task_ids(
    train_data: str,
    dataset_type: str = "auto",
    csv_img_key: str = "filepath",
    csv_separator: str = "\t",
    *,
    images: bool = False,
    decode: bool = False,
    advance: Callable[[str], object] | None = None,
) -> TaskScan:
    """Lists the ids of the task data by the headers of its tars, or by the rows of its CSV.

    Arguments are named after open_clip's flags. Damaged images of tars are always noted; their end markers lie on
    the way.

    Args:
        train_data: WebDataset URLs with braces and ``::``, or a CSV/TSV file.
        dataset_type: ``webdataset``, ``csv`` or ``auto``.
        csv_img_key: column of the image paths.
        csv_separator: separator of the columns.
        images: also looks at the image files that a CSV names.
        decode: decodes every image rather than look at its end markers.
        advance: called with the URL of each shard when it is done.

    Raises:
        TaskDataError: for data that is missing, damaged or not as expected, and for an id that occurs twice, with
            both its places.
    """
    if is_csv(train_data, dataset_type):
        scan = TaskScan(read_csv_ids(train_data, csv_img_key, csv_separator))
        if images or decode:
            scan.unreadable = _unreadable_files(scan.ids, decode)
        return scan
    scan = TaskScan()
    keys_of: dict[str, tuple[str, set[str]]] = {}
    repeated = {name for name, n in Counter(map(shard_name, expand_urls(train_data))).items() if n > 1}
    for url in expand_urls(train_data):
        shard = scan_shard(url, decode=decode)
        require_unique_keys(shard)
        name = shard_name(url)
        if (
            name in repeated
        ):  # shards of one name in two folders: the only way to equal ids in different shards
            other, known = keys_of.setdefault(name, (url, set()))
            shared = next((key for key in shard.keys if key in known), None)
            if shared is not None:
                raise TaskDataError(
                    f"The id {sample_id(url, shared)!r} occurs twice in the task data: in {other} and in {url}.\n"
                    "An id is <shard file name>/<key>, so shards need different names or different keys; rename one."
                )
            known.update(shard.keys)
        scan.ids += [sample_id(url, key) for key in shard.keys]
        scan.without_image += [sample_id(url, key) for key in shard.without_image]
        scan.unreadable |= {sample_id(url, key): reason for key, reason in shard.unreadable.items()}
        scan.without_text += shard.without_text
        scan.without_class += shard.without_class
        scan.without_both += [sample_id(url, key) for key in shard.without_both]
        if 0 < shard.without_class < len(shard.keys):
            scan.half_classed.append(url)
        scan.shards += 1
        if advance is not None:
            advance(url)
    if not scan.ids:
        raise TaskDataError(
            f"{train_data} holds no sample with an image. Expected members KEY.jpg, .jpeg, .png or .webp."
        )
    return scan


def read_csv_ids(path: str, image_column: str, separator: str) -> list[str]:
    """Returns the image paths of a CSV file, exactly as it has them: the ids of its samples.

    Raises:
        TaskDataError: if the file is missing or no table, if it lacks the column, for a row without a path, and for
            a path that occurs twice.
    """
    import pandas as pd

    if not Path(path).is_file():
        raise TaskDataError(f"{path} does not exist. Expected a CSV or TSV file with image paths.")
    try:
        frame = pd.read_csv(path, sep=separator)  # as open_clip reads it
    except (ValueError, OSError) as cause:  # pandas' ParserError and UnicodeDecodeError are ValueErrors
        raise TaskDataError(
            f"{path} cannot be read as a table separated by {separator!r}: {cause}"
        ) from cause
    if image_column not in frame.columns:
        found = ", ".join(map(str, frame.columns))
        raise TaskDataError(
            f"{path} has no column {image_column!r} (found: {found}; separator {separator!r}).\n"
            "Name the right ones with --csv-img-key and --csv-separator."
        )
    column = frame[image_column]
    if column.empty:
        raise TaskDataError(
            f"{path} has no rows. Expected one image path per row in column {image_column!r}."
        )
    empty = column.index[column.isna()]
    if len(empty):
        raise TaskDataError(f"{path} has no image path in row {empty[0] + 1} (column {image_column!r}).")
    ids = [str(value) for value in column]
    first: dict[str, int] = {}
    for row, value in enumerate(ids, start=1):
        if first.setdefault(value, row) != row:
            raise TaskDataError(
                f"The id {value!r} occurs twice in the task data: in rows {first[value]} and {row} of {path}.\n"
                "An id is an image path; keep one row for each."
            )
    return ids


def _unreadable_files(paths: list[str], decode: bool) -> dict[str, str]:
    problems = {}
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                problem = image_problem(file, 0, Path(path).stat().st_size, decode)
        except OSError as cause:
            problem = f"cannot be opened ({cause.strerror or cause})"
        if problem:
            problems[path] = problem
    return problems
