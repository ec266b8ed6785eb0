"""``arf index``: a faiss index of an embedding folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from arf_plugin.cli import options

EXAMPLES = """\
  arf index --embeddings EMB/pool --out INDEX
  arf index --embeddings EMB/pool --factory HNSW32 --out INDEX
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the parser of ``arf index``."""
    parser = options.add_parser(
        subparsers,
        "index",
        "build a faiss index of an embedding folder",
        "Writes image.index and metadata/ in clip-retrieval's layout. Optional: arf retrieve searches\n"
        "embedding folders without an index. Needs faiss: pip install 'arf-plugin[retrieval]'.",
        EXAMPLES,
    )
    parser.add_argument("--embeddings", type=Path, required=True, metavar="DIR", help="embedding folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="index folder")
    factory = "faiss's description of the index (default: Flat, exact)"
    parser.add_argument("--factory", default="Flat", help=factory)
    parser.add_argument("--modality", choices=("image", "text"), default="image", help="default: image")
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.pipeline.embeddings import Embeddings
    from arf_plugin.pipeline.index import IndexStage

    embeddings = Embeddings(args.embeddings, args.modality)
    return options.execute(IndexStage(args.out, embeddings, args.factory), args)
