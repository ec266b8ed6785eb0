"""``arf features``: the starting model's features of an anchor set's pairs and captions."""

from __future__ import annotations

import argparse
from pathlib import Path

from arf_plugin.cli import options
from arf_plugin.cli.embed import add_model_options

EXAMPLES = """\
  arf features ANCHORS --model ViT-B-16-quickgelu --pretrained openai
  arf features ANCHORS --model local-dir:./my-clip --batch-size 512 --workers 8
  arf features ANCHORS --model ViT-B-16 --pretrained start.pt --processes 4     shared by four processes
  arf features ANCHORS --model ViT-L-14 --pretrained openai --restart           of another model
"""


def register(subparsers: options.Subparsers) -> None:
    """Adds the parser of ``arf features``."""
    parser = options.add_parser(
        subparsers,
        "features",
        "write what the starting model gives an anchor set's pairs and captions",
        "Writes ANCHORS/features/ for --arf-pair-loss and --arf-caption-loss that compare features: name the\n"
        "model and the weights that fine-tuning starts from. Works for sets made by hand, too. Run the same command\n"
        "again to resume, and when pairs or captions have changed: what has not is kept.",
        EXAMPLES,
    )
    parser.add_argument("anchors", metavar="ANCHORS", help="the anchor set, a folder")
    add_model_options(parser, required=True)
    options.add_device_options(parser, batch_size=256)
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.anchors.tars import is_remote
    from arf_plugin.errors import FlagError
    from arf_plugin.pipeline.embedder import ClipModel
    from arf_plugin.pipeline.features import FeaturesStage

    if is_remote(args.anchors):
        raise FlagError(
            f"{args.anchors} is remote. Write the features of a local copy, and upload its features/."
        )
    model = ClipModel(args.model, args.pretrained, args.precision)
    return options.execute(FeaturesStage(Path(args.anchors), model), args)
