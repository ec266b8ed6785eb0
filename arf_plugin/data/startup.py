"""What is checked before the first step: everything that would otherwise stop a run, or spoil it, hours later.

Only headers are read, and scans are cached, so a million samples cost seconds. Remote shards would have to be
downloaded for it and are left to ``arf check``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import fsspec
import pandas as pd
from tqdm import tqdm

from arf_plugin.anchors.scan import scan_shard
from arf_plugin.anchors.tars import is_remote
from arf_plugin.anchors.task import TaskScan, expand_urls, is_csv, scan_task_ids
from arf_plugin.config import ArfConfig
from arf_plugin.data.captions import CaptionStore, open_captions
from arf_plugin.data.pairs import list_pair_shards
from arf_plugin.data.texts import missing_caption_message, missing_class_message
from arf_plugin.errors import AnchorSetError, MissingCaptionError, TaskDataError

BUILD = "Build one with `arf anchors`, look at it with `arf check`."


def check_anchor_set(config: ArfConfig) -> None:
    """Checks that the anchor set exists and holds a half that the weights leave on.

    Raises:
        AnchorSetError: It does not.
    """
    if config.anchors is None:
        return
    try:
        fs, root = fsspec.core.url_to_fs(config.anchors)
        is_folder = fs.isdir(root)
    except (OSError, ImportError, ValueError) as error:
        raise AnchorSetError(f"--arf-anchors {config.anchors} cannot be opened: {error}") from error
    if not is_folder:
        found = "is a file" if fs.exists(root) else "does not exist"
        raise AnchorSetError(
            f"--arf-anchors {config.anchors} {found}; expected a folder with captions/*.parquet, "
            f"pairs/*.tar or both.\n{BUILD}"
        )
    halves = {
        "captions/*.parquet": (
            bool(fs.glob(f"{root.rstrip('/')}/captions/*.parquet")),
            config.caption_weight,
        ),
        "pairs/*.tar": (bool(list_pair_shards(config.anchors)), config.pair_weight),
    }
    if not any(there for there, _ in halves.values()):
        content = (
            ", ".join(sorted(name.rsplit("/", 1)[-1] for name in fs.ls(root, detail=False))[:8]) or "nothing"
        )
        raise AnchorSetError(
            f"--arf-anchors {config.anchors} is empty: no captions/*.parquet and no pairs/*.tar "
            f"(found: {content}).\n{BUILD}"
        )
    if not any(there and weight for there, weight in halves.values()):
        only = next(name for name, (there, _) in halves.items() if there)
        raise AnchorSetError(
            f"--arf-anchors {config.anchors} has {only} alone, and its weight is 0: no anchors are left."
        )


def check_data(
    args: Any, config: ArfConfig, pair_shards: list[str], pair_batch: int, task_workers: int
) -> None:
    """Checks the task data, the captions against it, and the pairs.

    Args:
        args: The trainer's arguments.
        config: The ARF flags.
        pair_shards: URLs of the pair tars; empty if that term is off.
        pair_batch: A.
        task_workers: Loader workers of the task data.

    Raises:
        TaskDataError: The task data is missing, damaged, has an id twice, or not the texts that are needed.
        AnchorSetError: Captions or pairs that are damaged or belong to other data.
        MissingCaptionError: A task sample has no caption, and ``--arf-missing-caption`` is ``error``.
    """
    captions = open_captions(config.anchors) if config.anchors and config.caption_weight else None
    csv = is_csv(args.train_data, args.dataset_type)
    if not csv:
        _check_task_workers(args, task_workers)
    if csv or not any(is_remote(url) for url in expand_urls(args.train_data)):
        logging.info("ARF: looking at the task data (headers only, cached)")
        scan = scan_task_ids(args.train_data, args.dataset_type, args.csv_img_key, args.csv_separator)
        if csv:
            _check_csv_texts(args, config)
        else:
            _check_texts(args, config, scan)
        if captions is not None:
            # Training skips unreadable images, and no captioner could have described them.
            readable = [identity for identity in scan.ids if identity not in scan.unreadable]
            _check_coverage(config, readable, captions)
    else:
        logging.warning(
            "ARF: the task data is remote, so its ids are not checked before the first step; see `arf check`. With "
            "--arf-classnames, samples without 'cls' would train on their own 'txt'."
        )
    if pair_shards:
        _check_pairs(pair_shards, pair_batch * args.world_size)


def _check_task_workers(args: Any, task_workers: int) -> None:
    if getattr(args, "dataset_resampled", False):
        return
    shards, needed = len(expand_urls(args.train_data)), max(1, task_workers) * args.world_size
    if shards < needed:
        raise TaskDataError(
            f"{shards} task shards for {needed} loader workers ({args.world_size} processes x {max(1, task_workers)} "
            f"of --workers {args.workers}); expected at least one shard each.\n"
            "Lower --workers, split the shards, or use --dataset-resampled."
        )


def _check_texts(args: Any, config: ArfConfig, scan: TaskScan) -> None:
    total = len(scan.ids)
    if config.classnames:
        if scan.without_class:
            _check_mixture(config, scan)
    elif scan.without_text == total:
        hint = (
            "they have 'cls': give --arf-classnames FILE"
            if scan.without_class < total
            else "write KEY.txt beside each image"
        )
        raise TaskDataError(f"No task sample has a 'txt', so there is no text to train on; {hint}.")
    elif scan.without_text:
        logging.warning(
            f"ARF: {scan.without_text} of {total} task samples have no 'txt'; open_clip skips them."
        )
    if scan.unreadable:
        name, reason = next(iter(scan.unreadable.items()))
        logging.warning(
            f"ARF: {len(scan.unreadable)} of {total} task images are unreadable and will be skipped, "
            f"first: {name} {reason}"
        )


def _check_mixture(config: ArfConfig, scan: TaskScan) -> None:
    """Some samples have no class: plain mixing if they have a text and all their shard is like them."""
    total = len(scan.ids)
    if config.head or scan.without_class == total:
        raise TaskDataError(
            f"{scan.without_class} of {total} task samples have no 'cls', which "
            f"{'--arf-head' if config.head else '--arf-classnames'} needs.\n"
            "Write the class index beside each image (KEY.cls), or drop the flag."
        )
    if scan.without_both:
        raise TaskDataError(missing_class_message(scan.without_both[0], len(scan.without_both)))
    logging.info(
        f"ARF: plain mixing: {total - scan.without_class} task samples have a class and get class prompts, "
        f"{scan.without_class} have none and keep their own text."
    )
    if scan.half_classed:
        logging.warning(
            f"ARF: {len(scan.half_classed)} shards hold samples of both kinds, first: {scan.half_classed[0]}. Mixed "
            "data has shards of its own as a rule; did some samples lose their 'cls'?"
        )


def _check_csv_texts(args: Any, config: ArfConfig) -> None:
    column = "cls" if config.classnames else args.csv_caption_key
    frame = pd.read_csv(args.train_data, sep=args.csv_separator)
    if column not in frame:
        raise TaskDataError(
            f"{args.train_data} has no column '{column}' (found: {', '.join(map(str, frame.columns))}), which "
            f"{'--arf-classnames' if config.classnames else 'training'} needs. Add it"
            f"{'' if config.classnames else ', or name another with --csv-caption-key'}."
        )
    empty = frame.index[frame[column].isna()]
    if len(empty):
        raise TaskDataError(
            f"{args.train_data}, row {empty[0] + 1}: column '{column}' is empty ({len(empty)} rows are); open_clip "
            "would train on the text 'nan'. Fill it in or remove the row."
        )


def _check_coverage(config: ArfConfig, ids: list[str], captions: CaptionStore) -> None:
    missing = [
        identity
        for identity in tqdm(ids, "captions", disable=None, unit=" ids", leave=False)
        if identity not in captions
    ]
    if len(missing) == len(ids):
        raise AnchorSetError(
            f"The captions of {config.anchors} cover none of the {len(ids)} task samples.\n"
            f"  task samples are called like {ids[0]!r}, captions like {captions.example_id!r}\n"
            "Ids are <shard file name without .tar>/<key>, or the CSV's image path. Were the captions made from other "
            "data, or were shards renamed? Compare them with `arf check`."
        )
    if missing and config.missing_caption == "error":
        raise MissingCaptionError(missing_caption_message(missing[0], len(missing)))
    if missing:
        logging.warning(
            f"ARF: {len(missing)} of {len(ids)} task samples have no caption (first: {missing[0]}); "
            "their class prompt takes its place."
        )


def _check_pairs(shards: list[str], global_batch: int) -> None:
    local = [url for url in shards if not is_remote(url)]
    if len(local) < len(shards):
        logging.warning(
            "ARF: the pair anchors are remote, so they are not checked before the first step; see `arf check`."
        )
    count = 0
    for url in tqdm(local, "pair shards", disable=None, unit=" shards", leave=False):
        scan = scan_shard(url, AnchorSetError, texts=True)
        count += len(scan.keys)
        for problems in (scan.unreadable, scan.bad_texts, dict.fromkeys(scan.without_image, "has no image")):
            _refuse(url, problems.items())
    if local and not count:
        raise AnchorSetError(
            f"The {len(local)} pair shards hold no pair; expected KEY.jpg + KEY.txt. Run `arf pack` again."
        )
    if count < global_batch and len(local) == len(shards):
        logging.warning(
            f"ARF: {count} pairs for batches of {global_batch}: pairs will meet their own copies as negatives."
        )


def _refuse(url: str, problems: Iterable[tuple[str, str]]) -> None:
    listed = list(problems)
    if listed:
        key, reason = listed[0]
        more = f" ({len(listed) - 1} more in this shard)" if len(listed) > 1 else ""
        raise AnchorSetError(
            f"{url}, pair {key}: {reason}{more}.\nExpected a whole image and a UTF-8 text per pair: remove or replace "
            "the pair, or run `arf pack` again. `arf check` lists all of them."
        )
