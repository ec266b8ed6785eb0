"""``arf retrieve``: the pool pairs nearest to the task images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.pipeline.retrieve import Selection

EXAMPLES = """\
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --min-similarity 0.25 --max-pairs 500000 --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --random --out CONTROL      as many random pairs
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf retrieve``."""
    parser = options.add_parser(
        subparsers,
        "retrieve",
        "find the pool pairs nearest to the task images (ITAR)",
        "Searches the pool's embeddings exactly for the nearest neighbours of each task image and\n"
        "writes hits/ (query, row, similarity) and pairs.parquet (each chosen pair once).",
        EXAMPLES,
    )
    parser.add_argument(
        "--queries", type=Path, required=True, metavar="DIR", help="embedding folder of the task data"
    )
    parser.add_argument(
        "--pool", type=Path, required=True, metavar="DIR", help="embedding folder of the pool"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of hits and pairs")
    add_selection_options(parser)
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which hits become pair anchors."""
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--k", type=options.positive, default=10, help="neighbours per image (default: %(default)s)"
    )
    group.add_argument("--min-similarity", type=float, metavar="COS", help="drop hits below this cosine")
    group.add_argument(
        "--max-pairs", type=options.positive, metavar="N", help="keep the N most similar pairs"
    )
    group.add_argument(
        "--random", action="store_true", help="control: as many pairs, drawn at random from the pool"
    )
    group.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")


def selection(args: argparse.Namespace) -> Selection:
    """Selection settings from the command line."""
    from arf_plugin.pipeline.retrieve import Selection

    return Selection(args.k, args.min_similarity, args.max_pairs, args.random, args.seed)


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.pipeline.embeddings import Embeddings
    from arf_plugin.pipeline.retrieve import RetrieveStage

    stage = RetrieveStage(
        args.out,
        Embeddings(args.queries),
        Embeddings(args.pool),
        selection(args),
        device=args.device,
        rank=options.local_rank(),
    )
    return options.execute(stage, args)
