"""``arf data``: images in any usual form as task data, or as a pool."""

from __future__ import annotations

import argparse
from pathlib import Path

from arf_plugin.cli import options

EXAMPLES = """\
  arf data my-images --out task                    folders of images, one per class
  arf data images.csv --val 0.2 --out task         a table of paths and classes
  arf data train-images --val val-images --out task
  arf data 'shards/{000..099}.tar' --out task      WebDataset; also parquet, metadata.jsonl, train/ and val/
  arf data captioned --pool --out pool             images with texts: a pool for pair anchors
  arf data hf://datasets/NAME/data/train-*.parquet --pool --out pool       copied to pool/source first, with fsspec

What follows:
  arf caption --train-data 'task/train/{...}.tar' ...      arf train --train-data 'task/train/{...}.tar' \\
      --arf-classnames task/classnames.txt --arf-templates task/templates.txt      arf evaluate --data task/val ...
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the parser of ``arf data``."""
    parser = options.add_parser(
        subparsers,
        "data",
        "make task data, or a pool, of images in any usual form",
        "Writes WebDataset shards, class names, prompts and a stratified validation split. Equal images give equal "
        "bytes, whatever form they come in. Broken images are set aside and listed in OUT/rejected.tsv.",
        EXAMPLES,
    )
    add = parser.add_argument
    add(
        "source", metavar="SOURCE", help="folder of class folders, CSV, metadata.jsonl, parquet files or tars"
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where shards go")
    val = "part of each class for validation, if the source has no validation split (default: %(default)s), or a source"
    add("--val", type=options.part_or_source, default=0.15, metavar="PART|SOURCE", help=val)
    names = "class names by class index, or in the order of the folders' names, one per line"
    add("--classnames", metavar="FILE", help=names)
    add(
        "--templates",
        metavar="FILE",
        help="prompts, {c} for the name, one per line (default: OpenAI's seven)",
    )
    add("--pool", action="store_true", help="images with texts rather than classes")
    size = f"samples per shard (default: an eighth of the images, at most {1000})"
    add("--shard-size", type=options.positive, metavar="N", help=size)
    add(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="threads that look at images (default: %(default)s)",
    )
    options.add_run_options(parser)
    parser.set_defaults(run=run, max_bad_fraction=0.1)


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.anchors.tars import is_remote
    from arf_plugin.datasets.remote import fetched
    from arf_plugin.datasets.stage import DataStage

    if is_remote(args.source) and not args.dry_run:
        args.source = str(fetched(args.source, args.out / "source"))
    return options.execute(options.from_args(DataStage, args, work_folder=None), args)
