"""The task data, as open_clip's ``--train-data`` names it: ids, labels, and what training would pass over."""

from __future__ import annotations

import contextlib
import glob
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from arf_plugin.anchors.ids import sample_id, shard_name
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, decode_image
from arf_plugin.anchors.scan import ShardScan, require_unique_keys, scan_shard
from arf_plugin.anchors.tars import is_remote, local_path, scan_samples
from arf_plugin.anchors.task_csv import CLASS_COLUMN, file_problem, label_text, read_csv, unreadable_files
from arf_plugin.errors import ArfError, TaskDataError
from arf_plugin.files import not_there
from arf_plugin.untrusted import utf8

if TYPE_CHECKING:
    import pandas as pd

CSV_SUFFIXES = (".csv", ".tsv")
MOST_SHARDS = 10_000_000  # of one range in braces


class ShardCount(NamedTuple):
    """How many samples of a shard training could use, by what they have beside a readable image."""

    with_text: int
    with_class_or_text: int


@dataclass
class TaskScan:
    """What the task data holds; what has no image, or an unreadable one, is passed over by training."""

    ids: list[str] = field(default_factory=list)  # of the samples that have an image, in order
    shards: int = 0  # 0 for a CSV
    without_image: list[str] = field(default_factory=list)  # ids
    without_text: int = 0  # samples with an image but without txt
    without_class: int = 0  # samples with an image but without cls
    without_both: list[str] = field(default_factory=list)  # ids of samples with an image but neither
    mixed_shards: list[str] = field(default_factory=list)  # with a cls in some samples, and none in others
    unreadable: dict[str, str] = field(default_factory=dict)  # reason per id of a damaged image
    labels: dict[str, tuple[int, str]] = field(default_factory=dict)  # per cls: how often, id of the first
    counts: list[ShardCount] = field(default_factory=list)  # of each shard; empty for a CSV

    def add(self, shard: ShardScan) -> None:
        """Adds the samples of a shard."""
        names = {key: sample_id(shard.url, key) for key in (*shard.keys, *shard.without_image)}
        self.shards += 1
        self.ids += [names[key] for key in shard.keys]
        self.without_image += [names[key] for key in shard.without_image]
        self.unreadable |= {names[key]: reason for key, reason in shard.unreadable.items()}
        self.without_text += shard.without_text
        self.without_class += shard.without_class
        self.without_both += [names[key] for key in shard.without_both]
        for label, (count, key) in shard.labels.items():
            self.note_label(label, names[key], count)
        readable = len(shard.keys) - len(shard.unreadable)
        with_text, with_either = readable - shard.without_text, readable - len(shard.without_both)
        self.counts.append(ShardCount(max(0, with_text), max(0, with_either)))
        if 0 < shard.without_class < len(shard.keys):
            self.mixed_shards.append(shard.url)

    def note_label(self, label: str, identity: str, count: int = 1) -> None:
        """Counts samples with a label."""
        before, first = self.labels.get(label, (0, identity))
        self.labels[label] = (before + count, first)


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


def expand_urls(data: str, error: type[ArfError] = TaskDataError, *, unique: bool = True) -> list[str]:
    """Expands ``::`` and braces as open_clip does.

    Args:
        data: what a flag names.
        error: family of the errors.
        unique: refuses a shard that is named twice; without it, open_clip's own way, it counts twice.

    Raises:
        error: if nothing is left, braces do not match, or a shard is named twice.
    """
    from webdataset.shardlists import expand_urls as expand

    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", data)
    if any(len(a) + len(b) > 36 or abs(int(a) - int(b)) >= MOST_SHARDS for a, b in ranges):
        raise error(f"{data!r} names more than {MOST_SHARDS:,} shards. Are the braces right?")
    try:
        urls = [url for url in expand(data) if url]
    except ValueError as cause:  # of the library for braces
        raise error(f"{data!r} cannot be expanded: {cause}. Expected braces such as {{000..099}}.") from cause
    if not urls:
        raise error(f"{data!r} names no shard. Expected tars such as 'data/{{000..099}}.tar'.")
    url, count = Counter(urls).most_common(1)[0]
    if unique and count > 1:
        raise error(f"{url} is named {count} times in {data!r}. Each shard counts once; name it once.")
    return urls


def require_files(data: str, error: type[ArfError] = TaskDataError, *, csv: bool = False) -> None:
    """Refuses data that are not there, as far as they are on this machine, and says how they would be named.

    Raises:
        error: The first file that is missing.
    """
    for url in [data] if csv else expand_urls(data, error, unique=False):
        path = local_path(url)
        folder = path.is_dir()
        if is_remote(url) or (path.exists() and not folder):
            continue
        if found := sorted(glob.glob(f"{glob.escape(url)}/*.tar" if folder else url)):
            what = "is a folder" if folder else f"is a glob ({len(found)} files)"
            raise error(f"{url} {what}; expected tars by name, in quotes: '{in_braces(found)}'")
        if folder:
            raise error(
                f"{url} is a folder without tars. Of images they are made with: arf data {url} --out task"
            )
        raise error(not_there(url))


def in_braces(paths: Sequence[str]) -> str:
    """Some files as open_clip names them: ``folder/{000..009}.tar`` for numbers without a gap, else with ``::``."""
    first, last = (re.fullmatch(r"(.*?)(\d+)(\D*)", path) for path in (paths[0], paths[-1]))
    if first and last and len(paths) > 1 and (first[1], first[3]) == (last[1], last[3]):
        low, high = first[2], last[2]
        if len(low) == len(high) and int(high) - int(low) + 1 == len(paths):
            return f"{first[1]}{{{low}..{high}}}{first[3]}"
    return "::".join(paths)


def scan_task_ids(
    train_data: str,
    dataset_type: str = "auto",
    csv_img_key: str = "filepath",
    csv_separator: str = "\t",
    *,
    images: bool = False,
    decode: bool = False,
    unique: bool = True,
    advance: Callable[[str], object] | None = None,
) -> TaskScan:
    """Lists the ids of the task data by the headers of its tars, or by the rows of its CSV.

    Damaged images of tars are always noted; their end markers lie on the way.

    Args:
        train_data: WebDataset URLs with braces and ``::``, or a CSV/TSV file.
        dataset_type: ``webdataset``, ``csv`` or ``auto``.
        csv_img_key: column of the image paths.
        csv_separator: separator of the columns.
        images: also looks at the image files that a CSV names.
        decode: decodes every image rather than look at its end markers.
        unique: refuses an id that occurs twice; needed where captions are joined by it.
        advance: called with the URL of each shard when it is done.

    Raises:
        TaskDataError: for data that is missing, damaged or not as expected, and for an id that occurs twice, with
            both its places.
    """
    if is_csv(train_data, dataset_type):
        frame = read_csv(train_data, csv_img_key, csv_separator)
        return scan_csv(frame, train_data, csv_img_key, images=images, decode=decode, unique=unique)
    scan = TaskScan()
    urls = expand_urls(train_data, unique=unique)
    keys_of: dict[str, tuple[str, set[str]]] = {}
    repeated = {name for name, n in Counter(map(shard_name, urls)).items() if n > 1}
    for url in urls:
        shard = scan_shard(url, decode=decode)
        if unique:
            require_unique_keys(shard)
        name = shard_name(url)
        if unique and name in repeated:
            other, known = keys_of.setdefault(name, (url, set()))
            shared = next((key for key in shard.keys if key in known), None)
            if shared is not None:
                raise TaskDataError(
                    f"The id {sample_id(url, shared)!r} occurs twice in the task data: in {other} and in {url}.\n"
                    "An id is <shard file name>/<key>, so shards need different names or different keys; rename one."
                )
            known.update(shard.keys)
        scan.add(shard)
        if advance is not None:
            advance(url)
    if not scan.ids:
        raise TaskDataError(
            f"{train_data} holds no sample with an image. Expected members KEY.jpg, .jpeg, .png or .webp."
        )
    return scan


def scan_csv(
    frame: pd.DataFrame,
    path: str,
    image_column: str,
    *,
    images: bool = False,
    decode: bool = False,
    unique: bool = True,
) -> TaskScan:
    """What a CSV of `read_csv` holds; see `scan_task_ids` for arguments and errors."""
    ids = [utf8(str(value)) for value in frame[image_column]]
    first: dict[str, int] = {}
    for row, value in enumerate(ids if unique else (), start=1):
        if first.setdefault(value, row) != row:
            raise TaskDataError(
                f"The id {value!r} occurs twice in the task data: in rows {first[value]} and {row} of {path}.\n"
                "An id is an image path; keep one row for each."
            )
    scan = TaskScan(ids)
    if CLASS_COLUMN in frame.columns:
        for identity, value in zip(ids, frame[CLASS_COLUMN], strict=True):
            scan.note_label(label_text(value), identity)
    if images or decode:
        scan.unreadable = unreadable_files(list(dict.fromkeys(ids)), decode)
    return scan


def read_csv_ids(path: str, image_column: str, separator: str, *, unique: bool = True) -> list[str]:
    """Returns the image paths of a CSV file, exactly as it has them: the ids of its samples.

    Raises:
        TaskDataError: see `read_csv`; also for a path that occurs twice, if they are to be unique.
    """
    return scan_csv(read_csv(path, image_column, separator), path, image_column, unique=unique).ids


def decodable(train_data: str, csv: bool, ids: Sequence[str]) -> list[str]:
    """Those of some samples whose images really decode: end markers cannot tell, and a captioner had to know.

    Args:
        train_data: the task data, local.
        csv: whether it is a CSV.
        ids: the samples; few, since each is decoded.
    """
    if csv:
        return [identity for identity in ids if file_problem(identity, decode=True) is None]
    wanted, good = set(ids), []
    shards = {identity.rsplit("/", 1)[0] for identity in wanted}
    for url in expand_urls(train_data, unique=False):
        if is_remote(url) or not any(shard.startswith(shard_name(url)) for shard in shards):
            continue
        for sample in scan_samples(url, read=IMAGE_EXTENSIONS):
            identity = sample_id(url, sample.key)
            if identity in wanted and sample.image is not None:
                with contextlib.suppress(ValueError):
                    decode_image(sample.image.data or b"")
                    good.append(identity)
    return good
