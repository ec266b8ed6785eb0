"""``arf download``: the images of a list of links as a pool."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from arf_plugin.cli import options

EXAMPLES = """\
  arf retrieve --queries EMB/task --pool DATACOMP --over 2.5 --out HITS --urls-out hits.parquet
  arf download hits.parquet --out pool
  arf download hits.parquet --out pool --python IMG2DATASET-VENV/bin/python --processes 8
  arf fit my-images --pool pool ...          or, with the pairs of HITS as they were chosen:
  arf pack --retrieved HITS --pool 'pool/{00000..00041}.tar' --out ANCHORS
"""


def register(subparsers: options.Subparsers) -> None:
    """Adds the parser of ``arf download``."""
    parser = options.add_parser(
        subparsers,
        "download",
        "download a list of links as a pool, with img2dataset",
        "Opens every http and https link of the list, wherever it leads, so look at lists of others first.\n"
        "Images whose server asks that they not be used (noai, noindex) are left out, and so are those with\n"
        "another SHA-256 than the list has. OUT/download.json counts what arrived, and why the rest did not.",
        EXAMPLES,
    )
    add = parser.add_argument
    columns = "parquet file with url and caption; maybe pool_id, similarity, query_id, rank and sha256"
    add("links", type=Path, metavar="LINKS", help=columns)
    add("--out", type=Path, required=True, metavar="DIR", help="the pool")
    size = "pixels of the shorter side that larger images are resized to (default: %(default)s)"
    add("--image-size", type=options.positive, default=256, metavar="N", help=size)
    threads = "links opened at once by a process (default: %(default)s)"
    add("--threads", type=options.positive, default=64, metavar="N", help=threads)
    shard = "links per shard, which a stopped download goes on after (default: %(default)s)"
    add("--shard-size", type=options.positive, default=10_000, metavar="N", help=shard)
    python = "interpreter of an environment that has img2dataset (this one)"
    add("--python", type=Path, default=Path(sys.executable), metavar="FILE", help=python)
    options.add_run_options(parser)
    parser.set_defaults(run=run, max_bad_fraction=1.0)


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.console import text_table
    from arf_plugin.errors import PoolError
    from arf_plugin.pipeline.download import DownloadStage
    from arf_plugin.untrusted import read_json

    status = options.execute(options.from_args(DownloadStage, args, work_folder=None), args)
    counts = args.out / "download.json"
    if not args.json and not args.dry_run and counts.is_file():
        found = read_json(counts, PoolError)
        lines = [("arrived", found["arrived"]), *found["missing"].items(), ("links", found["links"])]
        print(text_table(("what became of the links", ""), lines))
    return status
