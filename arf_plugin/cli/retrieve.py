"""``arf retrieve``: the pool pairs nearest to the task images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.pipeline.duplicates import Exclusion
    from arf_plugin.pipeline.selection import Selection

EXAMPLES = """\
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --min-similarity 0.25 --max-pairs 500000 --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --random --out CONTROL      as many random pairs
  arf retrieve ... --max-pairs 100000 --near-duplicates 0.97 --exclude EMB/test EMB/shift
  arf retrieve --queries EMB/captions --query-modality text --pool EMB/pool --out HITS    by caption or prompt
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf retrieve``."""
    parser = options.add_parser(
        subparsers,
        "retrieve",
        "find the pool pairs nearest to the task images (ITAR)",
        "Searches the pool's embeddings exactly for the nearest neighbours of each task image and\n"
        "writes hits/ (query, row, similarity), pairs.parquet (each chosen pair once) and\n"
        "dropped.parquet (duplicates and pairs near excluded images).",
        EXAMPLES,
    )
    parser.add_argument(
        "--queries", type=Path, required=True, metavar="DIR", help="embedding folder of the task data"
    )
    parser.add_argument(
        "--query-modality",
        choices=("image", "text"),
        default="image",
        help="which vectors of --queries to search with; text: captions or prompts (default: image)",
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
        "--max-per-query", type=options.positive, metavar="N", help="pairs that a query may choose (all k)"
    )
    group.add_argument("--max-pairs", type=options.positive, metavar="N", help="pairs in all")
    group.add_argument(
        "--cap-by",
        choices=("queries", "similarity"),
        default="queries",
        help="fill --max-pairs with every query's nearest pair before any query's second (queries, the default), or "
        "with the most similar pairs",
    )
    group.add_argument(
        "--near-duplicates",
        type=float,
        metavar="COS",
        help="drop pairs whose image is this similar to a better placed one (exact duplicates always are)",
    )
    group.add_argument(
        "--exclude",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="embedding folders of evaluation images; pairs near one of them are kept out of the anchors",
    )
    group.add_argument(
        "--exclude-similarity",
        type=float,
        default=0.95,
        metavar="COS",
        help="cosine from which a pair is near an excluded image (default: %(default)s)",
    )
    group.add_argument(
        "--memory",
        type=options.byte_size,
        default="1G",
        metavar="SIZE",
        help="what the search may allocate, such as 500M or 4G; the program itself takes some 400M more (%(default)s)",
    )
    group.add_argument(
        "--random", action="store_true", help="control: as many pairs, drawn at random from the pool"
    )
    group.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")


def selection(args: argparse.Namespace) -> Selection:
    """Selection settings from the command line."""
    from arf_plugin.pipeline.selection import Selection

    return Selection(
        k=args.k,
        min_similarity=args.min_similarity,
        max_pairs=args.max_pairs,
        random=args.random,
        seed=args.seed,
        max_per_query=args.max_per_query,
        cap_by=args.cap_by,
        near_duplicates=args.near_duplicates,
    )


def exclusion(args: argparse.Namespace) -> Exclusion | None:
    """Excluded images from the command line."""
    from arf_plugin.pipeline.duplicates import Exclusion
    from arf_plugin.pipeline.embeddings import Embeddings

    return Exclusion(tuple(map(Embeddings, args.exclude)), args.exclude_similarity) if args.exclude else None


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.pipeline.embeddings import Embeddings
    from arf_plugin.pipeline.retrieve import RetrieveStage

    stage = RetrieveStage(
        args.out,
        Embeddings(args.queries, args.query_modality),
        Embeddings(args.pool),
        selection(args),
        exclusion=exclusion(args),
        memory=args.memory,
        device=args.device,
        rank=options.local_rank(),
    )
    return options.execute(stage, args)
