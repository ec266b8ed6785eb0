"""``arf embed``: unit vectors of a pool or of task data by an open_clip model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.pipeline.stage import Stage

EXAMPLES = """\
  arf embed --pool 'pool/{0000..0331}.tar' --model ViT-B-16-quickgelu --pretrained openai --out EMB/pool
  arf embed --train-data 'task/{000..099}.tar' --model ViT-B-16-quickgelu --pretrained openai --out EMB/task
  arf embed --pool ... --model local-dir:./my-clip --modality both --out EMB/pool
  arf embed --captions ANCHORS --model ViT-B-16-quickgelu --pretrained openai --out EMB/captions  queries by caption
  arf embed --prompts imagenet --model ViT-B-16-quickgelu --pretrained openai --out EMB/prompts  queries by class prompt
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    add = parser.add_argument
    add("--pool", metavar="DATA", help="pool tars with braces and ::, instead of --train-data")
    captions = "captions of an anchor set, as text queries of arf retrieve"
    add("--captions", type=Path, metavar="ANCHORS", help=captions)
    prompts = "file of class names, or imagenet: one text query per class, the mean over --templates"
    add("--prompts", metavar="CLASSNAMES", help=prompts)
    templates = "of --prompts: file of templates, or imagenet (default)"
    add("--templates", default="imagenet", metavar="FILE", help=templates)
    add("--salvage", action="store_true", help="take what is whole of damaged pool tars, and go on")
    add("--out", type=Path, required=True, metavar="DIR", help="the embedding folder")
    add_model_options(parser, required=True)
    add("--modality", choices=("image", "text", "both"), default="image", help="default: image")
    options.add_device_options(parser, batch_size=256)
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the flags of the open_clip model."""
    add = parser.add_argument_group("model").add_argument
    add("--model", required=required, metavar="M", help="open_clip model, local-dir:FOLDER or hf-hub:NAME")
    add("--pretrained", metavar="P", help="open_clip tag or checkpoint file")


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.anchors.task import expand_urls
    from arf_plugin.errors import FlagError, PoolError
    from arf_plugin.pipeline.embed import CaptionTexts, EmbedStage, EmbedTextsStage, PromptTexts
    from arf_plugin.pipeline.embedder import ClipModel
    from arf_plugin.pipeline.source import TarSource

    if sum(given is not None for given in (args.pool, args.task_data, args.captions, args.prompts)) != 1:
        raise FlagError(
            "arf embed needs what to embed: one of --pool, --train-data, --captions and --prompts."
        )
    model = ClipModel(args.model, args.pretrained, args.precision)
    stage: Stage
    if args.captions:
        stage = EmbedTextsStage(args.out, CaptionTexts(args.captions), model)
    elif args.prompts:
        stage = EmbedTextsStage(args.out, PromptTexts(args.prompts, args.templates), model)
    elif args.task_data:
        stage = EmbedStage(args.out, options.task_source(args), model, args.modality)
    else:
        pool = TarSource(expand_urls(args.pool, PoolError), PoolError, args.salvage)
        stage = EmbedStage(args.out, pool, model, args.modality, require_text=True)
    return options.execute(stage, args)
