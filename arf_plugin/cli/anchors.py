"""``arf anchors``: all stages in order, from task data and a pool to an anchor set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options, processes
from arf_plugin.cli.caption import add_captioner_options, caption_stage
from arf_plugin.cli.embed import add_model_options
from arf_plugin.cli.pack import add_pack_options
from arf_plugin.cli.retrieve import add_search_options, add_selection_options, settings

if TYPE_CHECKING:
    from arf_plugin.pipeline.stage import Stage

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


class Build:
    """What the flags ask for."""

    def __init__(self, args: argparse.Namespace) -> None:
        from arf_plugin.anchors.task import expand_urls, require_files
        from arf_plugin.errors import PoolError, StageError
        from arf_plugin.pipeline.embed import PromptTexts
        from arf_plugin.pipeline.embedder import ClipModel

        self.args, self.out, self.work = args, args.out, args.work or args.out / "work"
        if args.pool:
            require_files(args.pool, PoolError)  # hours before it is searched
        self.task = options.task_source(args)
        # Made without --captioner, too: it refuses flags that need one.
        caption = caption_stage(args, self.task, self.work / "caption")
        self.caption = caption if args.captioner else None
        self.pool = expand_urls(args.pool, PoolError) if args.pool else None
        self.model = ClipModel(args.model, args.pretrained, args.precision) if args.model else None
        self.prompts = PromptTexts(args.classnames, args.templates) if args.classnames else None
        self.how = settings(args)
        if self.caption is None and self.pool is None:
            raise StageError("Nothing to build: give --captioner for captions, --pool for pairs, or both.")
        if self.pool is not None and self.model is None:
            raise StageError(
                "Pairs are found with an open_clip model: add --model (and --pretrained) to --pool."
            )
        if (args.query_by == "prompt") != (self.prompts is not None):
            raise StageError("--query-by prompt and --classnames belong together: give both, or neither.")

    def stages(self) -> Iterator[Stage]:
        """Yields the stages in order; each is made when it is asked for, which is after the one before has run."""
        from arf_plugin.pipeline.embeddings import Embeddings
        from arf_plugin.pipeline.features import FeaturesStage
        from arf_plugin.pipeline.pack import PackStage
        from arf_plugin.pipeline.retrieve import RetrieveStage

        if self.caption is not None:
            yield self.caption
        if self.pool is not None:
            embed_queries, embed_pool = self.embeddings(self.pool)
            yield embed_queries
            yield embed_pool
            queries = Embeddings(embed_queries.out, "image" if self.args.query_by == "image" else "text")
            hits, pool = self.work / "retrieve", Embeddings(embed_pool.out)
            yield RetrieveStage(hits, queries, pool, **self.how)
            yield PackStage(self.out, hits, self.pool, self.args.shard_size, work_folder=self.work / "pack")
        if self.args.features and self.model is not None:
            yield FeaturesStage(self.out, self.model, work_folder=self.work / "features")

    def embeddings(self, pool: list[str]) -> tuple[Stage, Stage]:
        """The stages embed of the queries (the task's images, or texts in their place) and of the pool."""
        from arf_plugin.errors import PoolError
        from arf_plugin.pipeline.embed import CaptionTexts, EmbedStage, EmbedTextsStage
        from arf_plugin.pipeline.source import TarSource

        assert self.model is not None
        source = TarSource(pool, PoolError, self.args.salvage)
        embed_pool = EmbedStage(self.work / "pool", source, self.model, require_text=True)
        if self.args.query_by == "image":
            return EmbedStage(self.work / "task", self.task, self.model), embed_pool
        out = self.work / ("prompts" if self.prompts else "captions")
        return EmbedTextsStage(out, self.prompts or CaptionTexts(self.out), self.model), embed_pool

    def plan(self) -> dict[str, Any]:
        """What would be done, with counts, from the headers of all tars."""
        from arf_plugin.anchors.scan import scan_shard
        from arf_plugin.console import progress
        from arf_plugin.errors import PoolError
        from arf_plugin.pipeline.estimate import estimate
        from arf_plugin.pipeline.runner import describe

        execution = options.execution(self.args)

        def described(stage: Stage) -> dict[str, Any]:
            return describe(stage) | estimate(stage, execution)

        result: dict[str, Any] = {"out": str(self.out), "work": str(self.work)}
        plans = [described(self.caption)] if self.caption else []
        # What there will be at most; None if that is not known.
        captions = _times(plans[0]["samples"], self.args.captions_per_image) if self.caption else 0
        pairs: int | None = 0
        if self.pool is not None:
            in_pool = 0
            with progress("pool", "tars") as bar:
                for url in self.pool:
                    scan = scan_shard(url, PoolError)
                    in_pool += len(scan.keys) - scan.without_text
                    bar.update()
            embed_queries, embed_pool = self.embeddings(self.pool)
            if self.args.query_by == "caption":  # they may not have been generated yet
                counts = [shard.samples for shard in self.task.shards()]
                known = None if None in counts else sum(count or 0 for count in counts)
                queries = _times(known, self.args.captions_per_image)
                out, shards = str(embed_queries.out), len(counts)
                plans.append({"stage": "embed", "out": out, "shards": shards, "samples": queries})
            else:
                plans.append(described(embed_queries))
                queries = plans[-1]["samples"]
            plans.append(described(embed_pool))
            result["pool"] = {"tars": len(self.pool), "pairs": in_pool}
            pairs = None
            if queries is not None:
                pairs = min(self.args.k * queries, self.args.max_pairs or in_pool, in_pool)
                result["pairs_at_most"] = pairs
        if self.args.features and self.model is not None:  # of what is still to be made
            samples = None if pairs is None or captions is None else pairs + captions
            plans.append({"stage": "features", "out": str(self.out), "samples": samples})
        for plan in plans:
            plan.pop("config", None)
        return result | {"stages": plans}


def run(args: argparse.Namespace) -> int:
    """Runs all stages, or shows the plan."""
    from arf_plugin.errors import FlagError
    from arf_plugin.pipeline.anchors import build_anchors
    from arf_plugin.pipeline.estimate import readable

    build = Build(args)
    if args.dry_run:
        plan = build.plan()
        stages = plan["stages"] if args.json else plan.pop("stages")
        options.show(plan, args.json, "plan")
        if not args.json:
            columns = ("stage", "shards", "shards_done", "samples", "seconds", "memory", "disk", "out")
            _table([readable(stage) for stage in stages], columns)
        return 0
    if processes.wanted(args):
        if args.restart:
            raise FlagError(
                "--restart with --processes: start again with --restart alone, or give another --out."
            )
        processes.share(args, stop_together=True)
    if build.pool is not None and not (build.work / "retrieve/work/retrieve/finished.json").exists():
        build.how["search"].check()
    again = RESTART.get(args.restart, ())
    summaries = build_anchors(build.stages(), options.execution(args), args.caption_batch_size, again)
    if args.json:
        options.show({"out": str(args.out), "stages": summaries}, True, "done")
        return 0
    _table(summaries, ("stage", "samples", "kept", "rejected", "captions", "pairs", "out"))
    print(
        f"The anchor set is in {args.out}. Look at it with: arf check {args.out} --train-data DATA",
        file=sys.stderr,
    )
    return 0


def _times(count: int | None, factor: int) -> int | None:
    return None if count is None else count * factor


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Prints one row per stage; what a stage does not have is left blank."""
    from arf_plugin.console import text_table

    print(text_table(columns, [[row.get(column, "") for column in columns] for row in rows]))
