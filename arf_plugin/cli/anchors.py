"""``arf anchors``: all stages in order, from task data and a pool to an anchor set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from arf_plugin.cli import options, processes
from arf_plugin.cli.caption import add_captioner_options, caption_stage
from arf_plugin.cli.embed import add_model_options
from arf_plugin.cli.pack import add_pack_options
from arf_plugin.cli.retrieve import add_search_options, add_selection_options, exclusion, search, selection

EXAMPLES = """\
  arf anchors --train-data 'task/{000..099}.tar' --captioner Salesforce/blip-image-captioning-base \\
      --pool 'pool/{0000..0331}.tar' --model ViT-B-16-quickgelu --pretrained openai --k 10 --out ANCHORS
  arf anchors ... --backend service --service-url http://127.0.0.1:1234   its index: that of WORK/pool (arf embed)
  arf anchors ... --dry-run                   what would be done, with counts
  arf anchors --train-data ... --captioner ... --out ANCHORS            captions alone
  arf anchors ... --no-features               not the features of --model: another one will be fine-tuned
"""

# What to do again when a stage is: itself and all that comes after it. Features notice by themselves.
RESTART = {
    "all": ("caption", "embed", "retrieve", "pack", "features"),
    "caption": ("caption",),
    "embed": ("embed", "retrieve", "pack"),
    "retrieve": ("retrieve", "pack"),
    "pack": ("pack",),
    "features": ("features",),
}


def register(subparsers: options.Subparsers) -> None:
    """Adds the parser of ``arf anchors``."""
    parser = options.add_parser(
        subparsers,
        "anchors",
        "build an anchor set: caption, embed, retrieve, pack, features",
        "Builds an anchor set with one command: captions of the task images, the pool pairs nearest\n"
        "to them, and what --model gives both. Run the same command again to resume; start it on several\n"
        "ranks to share the work.",
        EXAMPLES,
    )
    options.add_task_options(parser)
    add = parser.add_argument
    add("--pool", metavar="DATA", help="pool tars with braces and ::; without it, no pair anchors")
    add("--out", type=Path, required=True, metavar="ANCHORS", help="the anchor set")
    add("--work", type=Path, metavar="DIR", help="embeddings and bookkeeping (ANCHORS/work)")
    add_captioner_options(parser, required=False)
    add_model_options(parser, required=False)
    add("--salvage", action="store_true", help="take what is whole of damaged pool tars, and go on")
    query_by = "search the pool by task image (default), by its captions, or by class prompt"
    add("--query-by", choices=("image", "caption", "prompt"), default="image", help=query_by)
    add("--classnames", metavar="FILE", help="of --query-by prompt: class names, or imagenet")
    add("--templates", default="imagenet", metavar="FILE", help="of --query-by prompt (imagenet)")
    add_selection_options(parser)
    add_search_options(parser)
    add_pack_options(parser)
    options.add_device_options(parser, batch_size=256)
    features = "write the features of --model, for losses that compare features (default: yes, with --model)"
    add("--features", action=argparse.BooleanOptionalAction, default=True, help=features)
    add("--caption-batch-size", type=options.positive, default=32, metavar="N", help="default: %(default)s")
    options.add_run_options(parser, restart_stages=RESTART)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs all stages, or shows the plan."""
    from arf_plugin.anchors.task import expand_urls
    from arf_plugin.console import progress
    from arf_plugin.errors import FlagError, PoolError
    from arf_plugin.pipeline.anchors import Build, build_anchors, plan_anchors
    from arf_plugin.pipeline.embedder import ClipModel
    from arf_plugin.pipeline.text_queries import PromptTexts

    work, task = args.work or args.out / "work", options.task_source(args)
    caption = caption_stage(args, task, work / "caption")
    build = options.from_args(
        Build,
        args,
        work=work,
        task=task,
        caption=caption if args.captioner else None,
        pool=expand_urls(args.pool, PoolError) if args.pool else None,
        model=ClipModel(args.model, args.pretrained, args.precision) if args.model else None,
        selection=selection(args),
        prompts=PromptTexts(args.classnames, args.templates) if args.classnames else None,
        exclusion=exclusion(args),
        search=search(args),
    )
    if args.dry_run:
        with progress("pool", "tars") as bar:
            plan = plan_anchors(build, advance=bar.update)
        stages = plan["stages"] if args.json else plan.pop("stages")
        options.show(plan, args.json, "plan")
        if not args.json:
            _table(stages, ("stage", "shards", "shards_done", "samples", "out"))
        return 0
    if processes.wanted(args):
        if args.restart:
            raise FlagError(
                "--restart with --processes: start again with --restart alone, or give another --out."
            )
        processes.share(args, stop_together=True)
    summaries = build_anchors(build, options.execution(args), RESTART.get(args.restart, ()))
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
    from arf_plugin.console import text_table

    print(text_table(columns, [[row.get(column, "") for column in columns] for row in rows]))
