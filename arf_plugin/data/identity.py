"""What determines which data a run sees, in which order and shape: compared when a deterministic run is resumed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import fsspec

from arf_plugin.config import ArfConfig

TRAINER_FLAGS = (
    *("seed", "world_size", "batch_size", "accum_freq", "train_data", "train_num_samples", "dataset_type"),
    *("dataset_resampled", "train_data_upsampling_factors", "csv_img_key", "csv_caption_key", "aug_cfg"),
)


def data_identity(
    args: Any, config: ArfConfig, *, task_workers: int, pair_workers: int, pairs: int
) -> dict[str, Any]:
    """Collects it.

    Args:
        args: The trainer's arguments.
        config: The ARF flags.
        task_workers: Loader workers of the task data.
        pair_workers: Loader workers of the pair anchors.
        pairs: A, pair anchors per process and micro-batch.

    Returns:
        Numbers and texts by name.
    """
    return {
        **{name: _plain(getattr(args, name, None)) for name in TRAINER_FLAGS},
        **{"task_workers": task_workers, "pair_workers": pair_workers, "pair_batch_size": pairs},
        "anchors": _anchor_set(config) if config.anchors else None,
        "missing_caption": config.missing_caption,
        **{"every": config.every, "trim_text": config.trim_text},
        **{"pair_patch_dropout": config.pair_patch_dropout, "pair_image_size": config.pair_image_size},
        "classnames": _file(config.classnames),
        "templates": _file(config.templates),
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _file(name: str | None) -> str | None:
    """A file's digest; a built-in list's name."""
    if name is None or not Path(name).is_file():
        return name
    return "sha256 " + hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]


def _anchor_set(config: ArfConfig) -> str:
    """A digest of names and sizes: it stays when the set is copied, and changes when the set is built anew."""
    fs, root = fsspec.core.url_to_fs(config.anchors)
    listing = []
    for pattern, weight in (
        ("captions/*.parquet", config.caption_weight),
        ("pairs/*.tar", config.pair_weight),
    ):
        if weight:
            found = fs.glob(f"{root.rstrip('/')}/{pattern}", detail=True)
            listing += sorted((name.rsplit("/", 1)[-1], info["size"]) for name, info in found.items())
    return "sha256 " + hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
