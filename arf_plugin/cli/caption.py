"""``arf caption``: captions for the task data by a pretrained captioner."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.pipeline.caption import CaptionStage
    from arf_plugin.pipeline.source import Source

EXAMPLES = """\
  arf caption --train-data 'task/{000..099}.tar' --captioner Salesforce/blip-image-captioning-base --out ANCHORS
  arf caption --train-data train.csv --csv-separator , --captioner ./my-captioner --num-beams 3 --out ANCHORS
  arf caption ... --top-p 0.9 --captions-per-image 5       five sampled captions per image
  arf caption ... --captioner open_clip:coca_ViT-L-14@mscoco_finetuned_laion2b_s13b_b90k
  arf caption ... --captioner Qwen/Qwen2.5-VL-7B-Instruct --captioner-url http://127.0.0.1:8000/v1   a model of a server
  arf caption ... --score-model ViT-B-16-quickgelu --score-pretrained openai --min-score 0.2
"""


def register(subparsers: options.Subparsers) -> None:
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
    """Adds the flags of the captioner, its generation, and what is done with what it says."""
    positive = options.positive
    add = parser.add_argument_group("captioner").add_argument
    kinds = (
        "folder in the Hugging Face layout, or a model name on the hub: BLIP, GIT, VisionEncoderDecoder, ...; or "
        "open_clip:MODEL@PRETRAINED, a CoCa model of open_clip"
    )
    add("--captioner", required=required, metavar="NAME", help=kinds)
    url = (
        "address of a server of OpenAI-compatible chat completions (vLLM, SGLang, transformers serve), of which "
        "--captioner is a model; a key that it wants is in the environment variable ARF_CAPTIONER_KEY"
    )
    add("--captioner-url", metavar="URL", help=url)
    at_once = "of --captioner-url: requests at once (%(default)s)"
    add("--captioner-threads", type=positive, default=8, metavar="N", help=at_once)
    timeout = "of --captioner-url: seconds to wait for a whole reply (%(default)s)"
    add("--captioner-timeout", type=float, default=120, metavar="S", help=timeout)
    patience = "of --captioner-url: seconds without any answer until it is given up (%(default)s)"
    add("--captioner-patience", type=float, default=300, metavar="S", help=patience)
    prompt = "text before the caption, for models that take one; what a server is asked"
    add("--prompt", default="", help=prompt)
    add("--num-beams", type=positive, default=1, metavar="N", help="1: greedy (default)")
    add("--top-p", type=float, metavar="P", help="nucleus sampling instead of beam search")
    add("--temperature", type=float, default=1.0, metavar="T", help="of the sampling")
    add("--min-new-tokens", type=int, default=0, metavar="N")
    add("--max-new-tokens", type=positive, default=30, metavar="N", help="default: %(default)s")
    add("--captions-per-image", type=positive, default=1, metavar="N")
    add("--caption-seed", type=int, default=0, metavar="N", help="of the sampling")
    add = parser.add_argument_group("caption clean-up and score").add_argument
    strip = (
        "remove this at the front of captions, beside 'there is', 'this is', 'the image shows' and the like; may be "
        "given several times"
    )
    add("--strip-prefix", action="append", default=[], metavar="TEXT", help=strip)
    raw = "keep boilerplate and repeated words as the captioner says them"
    add("--raw-captions", action="store_true", help=raw)
    add("--min-words", type=positive, default=1, metavar="N", help="drop shorter captions (%(default)s)")
    score = "open_clip model that adds the column score: the cosine to the image"
    add("--score-model", metavar="M", help=score)
    add("--score-pretrained", metavar="P", help="its open_clip tag or checkpoint file")
    add("--min-score", type=float, metavar="COS", help="drop captions that score less")


def caption_stage(args: argparse.Namespace, task: Source, work: Path | None = None) -> CaptionStage:
    """The stage, from the flags of the captioner.

    Args:
        args: the command line.
        task: task data.
        work: folder of the bookkeeping, if it is not in the anchor set.
    """
    from arf_plugin.errors import FlagError
    from arf_plugin.pipeline.caption import CaptionStage, Scoring
    from arf_plugin.pipeline.caption_cleaning import Cleaning
    from arf_plugin.pipeline.captioner import Endpoint, Generation
    from arf_plugin.pipeline.embedder import ClipModel

    generation = options.from_args(Generation, args, seed=args.caption_seed)
    clean = not args.raw_captions
    cleaning = Cleaning(clean, tuple(args.strip_prefix), clean, args.min_words)
    scoring = None
    if args.score_model:
        model = ClipModel(args.score_model, args.score_pretrained, args.precision)
        scoring = Scoring(model, args.min_score)
    elif args.min_score is not None or args.score_pretrained:
        raise FlagError("--min-score and --score-pretrained need --score-model, the model that scores.")
    endpoint = None
    if args.captioner_url:
        if not args.captioner:
            raise FlagError("--captioner-url needs --captioner, the name of a model of that server.")
        waits = (args.captioner_threads, args.captioner_timeout, args.captioner_patience)
        endpoint = Endpoint(args.captioner_url, *waits)
    made = (args.captioner, generation, cleaning, scoring, args.precision, endpoint)
    return CaptionStage(args.out, task, *made, work_folder=work)


def run(args: argparse.Namespace) -> int:
    """Runs the stage."""
    return options.execute(caption_stage(args, options.task_source(args)), args)
