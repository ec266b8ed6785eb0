"""``arf pack``: the chosen pairs as WebDataset shards of an anchor set."""

from __future__ import annotations

import argparse
from pathlib import Path

from arf_plugin.cli import options

EXAMPLES = """\
  arf pack --retrieved HITS --out ANCHORS
  arf pack --retrieved HITS --pool '/new/place/{0000..0331}.tar' --shard-size 5000 --out ANCHORS
"""


def register(subparsers: options.Subparsers) -> None:
    """Adds the parser of ``arf pack``."""
    parser = options.add_parser(
        subparsers,
        "pack",
        "copy the chosen pairs into the anchor set",
        "Writes ANCHORS/pairs/NNNNNN.tar from the pool's tars; opens only those that hold a chosen pair.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("--retrieved", type=Path, required=True, metavar="DIR", help="output folder of: arf retrieve")
    add("--out", type=Path, required=True, metavar="ANCHORS", help="the anchor set")
    pool = "pool tars; needed if they have moved, or if clip-retrieval made the embeddings"
    add("--pool", metavar="DATA", help=pool)
    add_pack_options(parser)
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def add_pack_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the output shards."""
    size = "pairs per shard (default: %(default)s)"
    parser.add_argument("--shard-size", type=options.positive, default=1000, metavar="N", help=size)


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.anchors.task import expand_urls
    from arf_plugin.errors import PoolError
    from arf_plugin.pipeline.pack import PackStage

    pool = expand_urls(args.pool, PoolError) if args.pool else None
    return options.execute(PackStage(args.out, args.retrieved, pool, args.shard_size), args)
