"""What determines which data a run sees, in which order and shape: compared when a deterministic run is resumed.

Data are told apart by the contents of their files, never by names, sizes or times. Every byte is read for it once; then
the digests are found in the cache for as long as no file is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from arf_plugin.anchors.features import read_header
from arf_plugin.anchors.tars import is_remote, local_path
from arf_plugin.anchors.task import expand_urls, is_csv
from arf_plugin.anchors.task_csv import read_csv
from arf_plugin.checks.inputs import Run
from arf_plugin.config import ArfConfig
from arf_plugin.console import progress
from arf_plugin.errors import CheckpointError
from arf_plugin.files import content_digest, digest, file_digest, list_files_of
from arf_plugin.trainer_args import TrainerArgs

TRAINER_FLAGS = (
    *("seed", "world_size", "batch_size", "accum_freq", "train_data", "train_num_samples", "dataset_type"),
    *("dataset_resampled", "train_data_upsampling_factors", "csv_img_key", "csv_caption_key", "aug_cfg"),
)


_FILES_AT_ONCE = 1000  # images of a CSV whose digest is cached together


def data_identity(
    args: TrainerArgs, config: ArfConfig, shape: Run, contents: dict[str, str | None]
) -> dict[str, Any]:
    """Collects it, as numbers and texts by name.

    ``contents`` are what `content_of_data` found; empty where the order of data is fresh in each run.
    """
    return {
        **{name: _plain(getattr(args, name, None)) for name in TRAINER_FLAGS},
        **{"task_workers": shape.task_workers, "pair_workers": shape.pair_workers},
        "pair_batch_size": shape.pair_batch,
        **contents,
        "missing_caption": config.missing_caption,
        "caption_loss": config.caption_loss if config.caption_features else None,
        "pair_loss": config.pair_loss if config.pair_features else None,
        **{"every": config.every, "trim_text": config.trim_text},
        "classnames": _file(config.classnames),
        "templates": _file(config.templates),
    }


def content_of_data(args: TrainerArgs, config: ArfConfig) -> dict[str, str | None]:
    """Digests of the contents of task data, captions and pairs; None for what the run does not use.

    Raises:
        CheckpointError: A file cannot be read.
    """
    logging.info("ARF: reading all data once, to know them when the run is resumed (cached)")
    try:
        with progress("contents", "B") as bar:
            bar.unit_scale = True
            if is_csv(args.train_data, args.dataset_type):
                frame = read_csv(args.train_data, args.csv_img_key, args.csv_separator)
                images = [str(path) for path in frame[args.csv_img_key]]
                task = _contents([args.train_data, *dict.fromkeys(images)], bar.update)
            else:
                task = _contents(expand_urls(args.train_data, unique=False), bar.update)
            captions = _anchors(config, "captions", ".parquet", bar.update) if config.caption_weight else None
            pairs = _anchors(config, "pairs", ".tar", bar.update) if config.pair_weight else None
    except OSError as cause:
        raise CheckpointError(
            f"Data cannot be read, so that a resumed run could not know them: {cause}"
        ) from cause
    header = read_header(config.anchors or "") if config.by_feature else None
    return {
        **{"task contents": task, "caption contents": captions, "pair contents": pairs},
        "feature contents": f"sha256 {digest(header.model_dump())}" if header else None,
    }


def _anchors(config: ArfConfig, folder: str, suffix: str, advance: Any) -> str | None:
    if config.anchors is None:
        return None
    fs, names = list_files_of(config.anchors, folder, suffix)
    if is_remote(config.anchors):
        names = [fs.unstrip_protocol(name) for name in names]
    return _contents(names, advance) if names else None


def _contents(urls: Sequence[str], advance: Any) -> str:
    """One digest over the contents of files in order; of remote files, over what their store says to tell versions."""
    if any(map(is_remote, urls)):
        parts = [_remote(url) if is_remote(url) else content_digest([local_path(url)]) for url in urls]
    else:
        paths = [local_path(url) for url in urls]
        step = 1 if len(paths) <= _FILES_AT_ONCE else _FILES_AT_ONCE
        starts = range(0, len(paths), step)
        parts = [content_digest(paths[start : start + step], advance=advance) for start in starts]
    return "sha256 " + digest(parts)


def _remote(url: str) -> list[str]:
    if url.startswith("pipe:"):
        return [url]
    fs, path = fsspec.core.url_to_fs(url)
    return [url, str(fs.ukey(path))]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _file(name: str | None) -> str | None:
    """A file's digest; a built-in list's name."""
    if name is None or not Path(name).is_file():
        return name
    return "sha256 " + file_digest(Path(name))
