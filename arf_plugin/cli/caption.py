"""``arf caption``: captions for the task data by a pretrained captioner."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.pipeline.caption_cleaning import Cleaning
    from arf_plugin.pipeline.caption_score import Scoring
    from arf_plugin.pipeline.generation import Generation

EXAMPLES = """\
  arf caption --train-data 'task/{000..099}.tar' --captioner Salesforce/blip-image-captioning-base --out ANCHORS
  arf caption --train-data train.csv --csv-separator , --captioner ./my-captioner --num-beams 3 --out ANCHORS
  arf caption ... --top-p 0.9 --captions-per-image 5       five sampled captions per image
  arf caption ... --captioner open_clip:coca_ViT-L-14@mscoco_finetuned_laion2b_s13b_b90k
  arf caption ... --score-model ViT-B-16-quickgelu --score-pretrained openai --min-score 0.2
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf caption``."""
    parser = options.add_parser(
        subparsers,
        "caption",
        "describe every task image with a captioner (TCAG)",
        "Writes ANCHORS/captions/part-NNNNN.parquet with a caption for every image of the task data.\n"
        "Run the same command again to resume; start it on several ranks to share the work.",
        EXAMPLES,
    )
    options.add_task_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="ANCHORS", help="the anchor set")
    add_captioner_options(parser, required=True)
    options.add_device_options(parser, batch_size=32)
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def add_captioner_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the flags of the captioner and its generation."""
    group = parser.add_argument_group("captioner")
    group.add_argument(
        "--captioner",
        required=required,
        metavar="NAME",
        help="folder in the Hugging Face layout, or a model name on the hub: BLIP, GIT, VisionEncoderDecoder, ...; or "
        "open_clip:MODEL@PRETRAINED, a CoCa model of open_clip",
    )
    group.add_argument("--prompt", default="", help="text before the caption, for models that take one")
    group.add_argument(
        "--num-beams", type=options.positive, default=1, metavar="N", help="1: greedy (default)"
    )
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling instead of beam search")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the sampling")
    group.add_argument("--min-new-tokens", type=int, default=0, metavar="N")
    group.add_argument(
        "--max-new-tokens", type=options.positive, default=30, metavar="N", help="default: %(default)s"
    )
    group.add_argument("--captions-per-image", type=options.positive, default=1, metavar="N")
    group.add_argument("--caption-seed", type=int, default=0, metavar="N", help="of the sampling")
    group = parser.add_argument_group("caption clean-up and score")
    group.add_argument(
        "--strip-prefix",
        action="append",
        default=[],
        metavar="TEXT",
        help="remove this at the front of captions, beside 'there is', 'this is', 'the image shows' and the like; may "
        "be given several times",
    )
    group.add_argument(
        "--raw-captions",
        action="store_true",
        help="keep boilerplate and repeated words as the captioner says them",
    )
    group.add_argument(
        "--min-words",
        type=options.positive,
        default=1,
        metavar="N",
        help="drop shorter captions (%(default)s)",
    )
    group.add_argument(
        "--score-model",
        metavar="M",
        help="open_clip model that adds the column score: the cosine to the image",
    )
    group.add_argument("--score-pretrained", metavar="P", help="its open_clip tag or checkpoint file")
    group.add_argument("--min-score", type=float, metavar="COS", help="drop captions that score less")


def generation(args: argparse.Namespace) -> Generation:
    """Generation settings from the command line."""
    from arf_plugin.pipeline.generation import Generation

    return Generation(
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        top_p=args.top_p,
        temperature=args.temperature,
        captions_per_image=args.captions_per_image,
        prompt=args.prompt,
        seed=args.caption_seed,
    )


def cleaning(args: argparse.Namespace) -> Cleaning:
    """Clean-up settings from the command line."""
    from arf_plugin.pipeline.caption_cleaning import Cleaning

    clean = not args.raw_captions
    return Cleaning(clean, tuple(args.strip_prefix), clean, args.min_words)


def scoring(args: argparse.Namespace) -> Scoring | None:
    """Score settings from the command line."""
    from arf_plugin.errors import FlagError
    from arf_plugin.pipeline.caption_score import Scoring

    if args.score_model:
        return Scoring(args.score_model, args.score_pretrained, args.min_score)
    if args.min_score is not None or args.score_pretrained:
        raise FlagError("--min-score and --score-pretrained need --score-model, the model that scores.")
    return None


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    from arf_plugin.pipeline.caption import CaptionStage

    stage = CaptionStage(
        args.out,
        options.task_source(args),
        args.captioner,
        generation(args),
        cleaning=cleaning(args),
        scoring=scoring(args),
        batch_size=args.batch_size,
        device=args.device,
        precision=args.precision,
        workers=args.workers,
        rank=options.local_rank(),
    )
    return options.execute(stage, args)
