"""``arf retrieve``: the pool pairs nearest to the task images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.pipeline.duplicates import Exclusion
    from arf_plugin.pipeline.knn_backends import Search
    from arf_plugin.pipeline.selection import Selection

EXAMPLES = """\
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --min-similarity 0.25 --max-pairs 500000 --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --random --out CONTROL      as many random pairs
  arf retrieve ... --max-pairs 100000 --near-duplicates 0.97 --exclude EMB/test EMB/shift
  arf retrieve --queries EMB/captions --query-modality text --pool EMB/pool --out HITS    by caption or prompt
  arf retrieve --queries EMB/task --pool EMB/pool --backend faiss --index INDEX --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --backend service --service-url http://127.0.0.1:1234 --out HITS
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf retrieve``."""
    parser = options.add_parser(
        subparsers,
        "retrieve",
        "find the pool pairs nearest to the task images (ITAR)",
        "Searches the pool for the nearest neighbours of each task image (exactly, through a faiss index,\n"
        "or through a clip-retrieval service that runs already) and\n"
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
        "--pool",
        type=Path,
        required=True,
        metavar="DIR",
        help="embedding folder of the pool; for faiss and service, its index folder will do",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of hits and pairs")
    add_selection_options(parser)
    add_search_options(parser)
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
        "--random", action="store_true", help="control: as many pairs, drawn at random from the pool"
    )
    group.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how to search."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--backend",
        choices=("exact", "faiss", "service"),
        default="exact",
        help="exact: compare with every pair (default); faiss: use an index; service: ask clip-retrieval back",
    )
    group.add_argument(
        "--memory",
        type=options.byte_size,
        default="1G",
        metavar="SIZE",
        help="what exact search may allocate, such as 500M or 4G; the program itself takes some 400M more "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--index", type=Path, metavar="DIR", help="faiss: index of the pool (default: the one in --pool)"
    )
    group.add_argument(
        "--search-parameters",
        metavar="P",
        help="faiss: search parameters such as nprobe=64 (IVF) or efSearch=200 (HNSW)",
    )
    group.add_argument(
        "--candidates",
        type=options.positive,
        metavar="N",
        help="faiss: hits per query of an approximate index that are ranked on the stored vectors (4 times --k)",
    )
    group.add_argument(
        "--service-url", metavar="URL", help="service: its address, such as http://127.0.0.1:1234"
    )
    group.add_argument(
        "--service-index", metavar="NAME", help="service: the index's name, if it serves several"
    )
    group.add_argument(
        "--service-threads",
        type=options.positive,
        default=4,
        metavar="N",
        help="requests at once (%(default)s)",
    )
    group.add_argument(
        "--service-timeout",
        type=float,
        default=60,
        metavar="S",
        help="seconds to wait for a whole reply (%(default)s)",
    )
    group.add_argument(
        "--service-patience",
        type=float,
        default=300,
        metavar="S",
        help="seconds without any answer until the service is given up (%(default)s)",
    )


def search(args: argparse.Namespace) -> Search:
    """Search settings from the command line."""
    from arf_plugin.errors import FlagError
    from arf_plugin.pipeline.knn_backends import Search
    from arf_plugin.pipeline.knn_service import Service

    service = None
    if args.service_url:
        limits = {"timeout": args.service_timeout, "patience": args.service_patience}
        service = Service(args.service_url, args.service_index, args.service_threads, **limits)
    elif args.service_index:
        raise FlagError("--service-index needs --backend service and --service-url.")
    return Search(
        args.backend,
        args.memory,
        args.device,
        options.local_rank(),
        args.index,
        args.search_parameters,
        args.candidates,
        service,
    )


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

    how = search(args)
    stage = RetrieveStage(
        args.out,
        Embeddings(args.queries, args.query_modality),
        how.pool(args.pool),
        selection(args),
        exclusion=exclusion(args),
        search=how,
    )
    return options.execute(stage, args)
