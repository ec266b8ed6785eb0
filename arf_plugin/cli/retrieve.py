"""``arf retrieve``: the pool pairs nearest to the task images."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from arf_plugin.cli import options
from arf_plugin.flags import number_type

EXAMPLES = """\
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --min-similarity 0.25 --max-pairs 500000 --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --k 10 --random --out CONTROL      as many random pairs
  arf retrieve ... --max-pairs 100000 --near-duplicates 0.97 --exclude EMB/test EMB/shift
  arf retrieve --queries EMB/captions --query-modality text --pool EMB/pool --out HITS    by caption or prompt
  arf retrieve --queries EMB/task --pool EMB/pool --backend faiss --index INDEX --out HITS
  arf retrieve --queries EMB/task --pool EMB/pool --backend service --service-url http://127.0.0.1:1234 --out HITS
  arf retrieve --queries EMB/task --pool DATACOMP --over 2.5 --out HITS --urls-out hits.parquet    links to download
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    add = parser.add_argument
    add("--queries", type=Path, required=True, metavar="DIR", help="embedding folder of the task data")
    modality = "which vectors of --queries to search with; text: captions or prompts (default: image)"
    add("--query-modality", choices=("image", "text"), default="image", help=modality)
    pool = (
        "embedding folder of the pool, or DataComp's metadata with their .npz files; for faiss and service, its index "
        "folder will do; for service with --urls-out, none is needed"
    )
    add("--pool", type=Path, metavar="DIR", help=pool)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of hits and pairs")
    urls = "also list the chosen pairs' links (url, caption, pool_id, ...), for: arf download"
    add("--urls-out", type=Path, metavar="FILE", help=urls)
    over = number_type(float, lambda value: 1 <= value < 1000, "a factor of 1 or more")
    dead = "choose so many times as many (--k, --max-per-query, --max-pairs), as some links will be dead"
    add("--over", type=over, default=1.0, metavar="FACTOR", help=dead)
    add_selection_options(parser)
    add_search_options(parser)
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which hits become pair anchors."""
    positive = options.positive
    add = parser.add_argument_group("selection").add_argument
    add("--k", type=positive, default=10, help="neighbours per image (default: %(default)s)")
    add("--min-similarity", type=float, metavar="COS", help="drop hits below this cosine")
    add("--max-per-query", type=positive, metavar="N", help="pairs that a query may choose (all k)")
    add("--max-pairs", type=positive, metavar="N", help="pairs in all")
    cap = (
        "fill --max-pairs with every query's nearest pair before any query's second (queries, the default), or with "
        "the most similar pairs"
    )
    add("--cap-by", choices=("queries", "similarity"), default="queries", help=cap)
    near = "drop pairs whose image is this similar to a better placed one (exact duplicates always are)"
    add("--near-duplicates", type=float, metavar="COS", help=near)
    exclude = "embedding folders of evaluation images; pairs near one of them are kept out of the anchors"
    add("--exclude", type=Path, nargs="+", default=[], metavar="DIR", help=exclude)
    similarity = "cosine from which a pair is near an excluded image (default: %(default)s)"
    add("--exclude-similarity", type=float, default=0.95, metavar="COS", help=similarity)
    add("--random", action="store_true", help="control: as many pairs, drawn at random from the pool")
    add("--seed", type=int, default=0, help="of --random (default: %(default)s)")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how to search."""
    positive = options.positive
    add = parser.add_argument_group("search").add_argument
    how = "exact: compare with every pair (default); faiss: use an index; service: ask clip-retrieval back"
    add("--backend", choices=("exact", "faiss", "service"), default="exact", help=how)
    memory = (
        "what exact search may allocate, such as 500M or 4G; the program itself takes some 400M more "
        "(default: %(default)s)"
    )
    add("--memory", type=options.byte_size, default="1G", metavar="SIZE", help=memory)
    add("--index", type=Path, metavar="DIR", help="faiss: index of the pool (default: the one in --pool)")
    parameters = "faiss: search parameters such as nprobe=64 (IVF) or efSearch=200 (HNSW)"
    add("--search-parameters", metavar="P", help=parameters)
    hits = "faiss: hits per query of an approximate index that are ranked on the stored vectors (4 times --k)"
    add("--candidates", type=positive, metavar="N", help=hits)
    add("--service-url", metavar="URL", help="service: its address, such as http://127.0.0.1:1234")
    add("--service-index", metavar="NAME", help="service: the index's name, if it serves several")
    add("--service-threads", type=positive, default=4, metavar="N", help="requests at once (%(default)s)")
    timeout = "seconds to wait for a whole reply (%(default)s)"
    add("--service-timeout", type=float, default=60, metavar="S", help=timeout)
    patience = "seconds without any answer until the service is given up (%(default)s)"
    add("--service-patience", type=float, default=300, metavar="S", help=patience)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Search, selection and exclusion from the command line, as RetrieveStage calls them."""
    from arf_plugin.pipeline.embeddings import Embeddings
    from arf_plugin.pipeline.knn_backends import Search
    from arf_plugin.pipeline.near import Exclusion
    from arf_plugin.pipeline.retrieve import Selection

    excluded = tuple(map(Embeddings, args.exclude))
    return {
        "search": options.from_args(Search, args),
        "selection": options.from_args(Selection, args),
        "exclusion": Exclusion(excluded, args.exclude_similarity) if excluded else None,
    }


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.pipeline.embeddings import Embeddings
    from arf_plugin.pipeline.links import write_links
    from arf_plugin.pipeline.retrieve import RetrieveStage

    for name in ("k", "max_per_query", "max_pairs"):
        if (count := getattr(args, name)) is not None:
            setattr(args, name, math.ceil(count * args.over))
    how = settings(args)
    queries = Embeddings(args.queries, args.query_modality)
    stage = RetrieveStage(args.out, queries, how["search"].pool(args.pool, queries, args.out), **how)
    status = options.execute(stage, args)
    if args.urls_out and not args.dry_run and (stage.work / "finished.json").exists():
        count = write_links(args.out, args.urls_out)
        print(f"{count} links: {args.urls_out}. Download them with: arf download", file=sys.stderr)
    return status
