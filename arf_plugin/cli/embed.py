"""``arf embed``: unit vectors of a pool or of task data by an open_clip model."""

from __future__ import annotations

import argparse
from pathlib import Path

from arf_plugin.cli import options

EXAMPLES = """\
  arf embed --pool 'pool/{0000..0331}.tar' --model ViT-B-16-quickgelu --pretrained openai --out EMB/pool
  arf embed --train-data 'task/{000..099}.tar' --model ViT-B-16-quickgelu --pretrained openai --out EMB/task
  arf embed --pool ... --model local-dir:./my-clip --modality both --out EMB/pool
  arf embed --captions ANCHORS --model ViT-B-16-quickgelu --pretrained openai --out EMB/captions  queries by caption
  arf embed --prompts imagenet --model ViT-B-16-quickgelu --pretrained openai --out EMB/prompts  queries by class prompt
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf embed``."""
    parser = options.add_parser(
        subparsers,
        "embed",
        "embed a pool, task data, captions or class prompts with an open_clip model",
        "Writes an embedding folder in clip-retrieval's layout: img_emb/, text_emb/, metadata/.\n"
        "Run the same command again to resume; start it on several ranks to share the work.",
        EXAMPLES,
    )
    options.add_task_options(parser, required=False)
    parser.add_argument(
        "--pool", metavar="DATA", help="pool tars with braces and ::, instead of --train-data"
    )
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="ANCHORS",
        help="captions of an anchor set, as text queries of arf retrieve",
    )
    parser.add_argument(
        "--prompts",
        metavar="CLASSNAMES",
        help="file of class names, or imagenet: one text query per class, the mean over --templates",
    )
    parser.add_argument(
        "--templates",
        default="imagenet",
        metavar="FILE",
        help="of --prompts: file of templates, or imagenet (default)",
    )
    parser.add_argument(
        "--salvage", action="store_true", help="take what is whole of damaged pool tars, and go on"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the embedding folder")
    add_model_options(parser, required=True)
    parser.add_argument(
        "--modality", choices=("image", "text", "both"), default="image", help="default: image"
    )
    options.add_device_options(parser, batch_size=256)
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the flags of the open_clip model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=required, metavar="M", help="open_clip model, local-dir:FOLDER or hf-hub:NAME"
    )
    group.add_argument("--pretrained", metavar="P", help="open_clip tag or checkpoint file")


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.anchors.task import expand_urls
    from arf_plugin.errors import FlagError, PoolError
    from arf_plugin.pipeline.embed import EmbedStage
    from arf_plugin.pipeline.source import Source, TarSource
    from arf_plugin.pipeline.text_queries import CaptionTexts, EmbedTextsStage, PromptTexts, TextSource

    if sum(given is not None for given in (args.pool, args.task_data, args.captions, args.prompts)) != 1:
        raise FlagError(
            "arf embed needs what to embed: one of --pool, --train-data, --captions and --prompts."
        )
    if args.captions or args.prompts:
        texts: TextSource = (
            CaptionTexts(args.captions) if args.captions else PromptTexts(args.prompts, args.templates)
        )
        queries = EmbedTextsStage(
            args.out,
            texts,
            args.model,
            args.pretrained,
            batch_size=args.batch_size,
            device=args.device,
            precision=args.precision,
            rank=options.local_rank(),
        )
        return options.execute(queries, args)
    source: Source = (
        options.task_source(args)
        if args.task_data
        else TarSource(expand_urls(args.pool, PoolError), PoolError, args.salvage)
    )
    stage = EmbedStage(
        args.out,
        source,
        args.model,
        args.pretrained,
        modality=args.modality,
        require_text=args.pool is not None,
        batch_size=args.batch_size,
        device=args.device,
        precision=args.precision,
        workers=args.workers,
        rank=options.local_rank(),
    )
    return options.execute(stage, args)
