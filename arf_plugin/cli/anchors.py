"""``arf anchors``: all stages in order, from task data and a pool to an anchor set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from arf_plugin.cli import options, processes
from arf_plugin.cli.caption import add_captioner_options, cleaning, generation, scoring
from arf_plugin.cli.embed import add_model_options
from arf_plugin.cli.pack import add_pack_options
from arf_plugin.cli.retrieve import add_search_options, add_selection_options, exclusion, search, selection
from arf_plugin.untrusted import printable

EXAMPLES = """\
  arf anchors --train-data 'task/{000..099}.tar' --captioner Salesforce/blip-image-captioning-base \\
      --pool 'pool/{0000..0331}.tar' --model ViT-B-16-quickgelu --pretrained openai --k 10 --out ANCHORS
  arf anchors ... --backend service --service-url http://127.0.0.1:1234   its index: that of WORK/pool (arf embed)
  arf anchors ... --dry-run                   what would be done, with counts
  arf anchors --train-data ... --captioner ... --out ANCHORS             captions alone
"""

# What to do again when a stage is: itself and all that comes after it.
RESTART = {
    "all": ("caption", "embed", "retrieve", "pack"),
    "caption": ("caption",),
    "embed": ("embed", "retrieve", "pack"),
    "retrieve": ("retrieve", "pack"),
    "pack": ("pack",),
}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf anchors``."""
    parser = options.add_parser(
        subparsers,
        "anchors",
        "build an anchor set: caption, embed, retrieve, pack",
        "Builds an anchor set with one command: captions of the task images, and the pool pairs nearest\n"
        "to them. Run the same command again to resume; start it on several ranks to share the work.",
        EXAMPLES,
    )
    options.add_task_options(parser)
    parser.add_argument(
        "--pool", metavar="DATA", help="pool tars with braces and ::; without it, no pair anchors"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="ANCHORS", help="the anchor set")
    parser.add_argument("--work", type=Path, metavar="DIR", help="embeddings and bookkeeping (ANCHORS/work)")
    add_captioner_options(parser, required=False)
    add_model_options(parser, required=False)
    parser.add_argument(
        "--salvage", action="store_true", help="take what is whole of damaged pool tars, and go on"
    )
    parser.add_argument(
        "--query-by",
        choices=("image", "caption", "prompt"),
        default="image",
        help="search the pool by task image (default), by its captions, or by class prompt",
    )
    parser.add_argument("--classnames", metavar="FILE", help="of --query-by prompt: class names, or imagenet")
    parser.add_argument(
        "--templates", default="imagenet", metavar="FILE", help="of --query-by prompt (imagenet)"
    )
    add_selection_options(parser)
    add_search_options(parser)
    add_pack_options(parser)
    options.add_device_options(parser, batch_size=256)
    parser.add_argument(
        "--caption-batch-size", type=options.positive, default=32, metavar="N", help="default: %(default)s"
    )
    options.add_run_options(parser, restart_stages=RESTART)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs all stages, or shows the plan."""
    from tqdm import tqdm

    from arf_plugin.anchors.task import expand_urls
    from arf_plugin.errors import FlagError, PoolError
    from arf_plugin.pipeline.anchors import Build, build_anchors, plan_anchors
    from arf_plugin.pipeline.text_queries import PromptTexts

    build = Build(
        out=args.out,
        work=args.work or args.out / "work",
        task=options.task_source(args),
        captioner=args.captioner,
        generation=generation(args),
        cleaning=cleaning(args),
        scoring=scoring(args),
        pool=expand_urls(args.pool, PoolError) if args.pool else None,
        model=args.model or "",
        pretrained=args.pretrained,
        selection=selection(args),
        query_by=args.query_by,
        prompts=PromptTexts(args.classnames, args.templates) if args.classnames else None,
        exclusion=exclusion(args),
        search=search(args),
        salvage=args.salvage,
        shard_size=args.shard_size,
        caption_batch_size=args.caption_batch_size,
        embed_batch_size=args.batch_size,
        device=args.device,
        precision=args.precision,
        workers=args.workers,
        local_rank=options.local_rank(),
    )
    if args.dry_run:
        with tqdm(desc="pool", unit=" tars", disable=not sys.stderr.isatty(), leave=False) as bar:
            plan = plan_anchors(build, advance=lambda url: bar.update(1))
        if args.json:
            options.show(plan, True, "plan")
            return 0
        stages = plan.pop("stages")
        options.show(plan, False, "plan")
        _table(stages, ("stage", "shards", "shards_done", "samples", "out"))
        return 0
    if processes.wanted(args):
        if args.restart:
            raise FlagError(
                "--restart with --processes: start again with --restart alone, or give another --out."
            )
        processes.share(args, stop_together=True)
    summaries = build_anchors(build, options.run_options(args), RESTART.get(args.restart, ()))
    if args.json:
        options.show({"out": str(args.out), "stages": summaries}, True, "done")
        return 0
    _table(summaries, ("stage", "samples", "kept", "rejected", "captions", "pairs", "out"))
    print(
        f"The anchor set is in {args.out}. Look at it with: arf check {args.out} --train-data DATA",
        file=sys.stderr,
    )
    return 0


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Prints one row per stage; what a stage does not have is left blank."""
    cells = [list(columns), *([printable(str(row.get(column, ""))) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
