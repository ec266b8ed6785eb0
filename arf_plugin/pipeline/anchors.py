"""All stages in order: task data and a pool in, an anchor set out.

::

    task data --caption--> ANCHORS/captions
    task data --embed----> WORK/task --+
    pool      --embed----> WORK/pool --+--retrieve--> WORK/retrieve --pack--> ANCHORS/pairs
    ANCHORS/captions and pairs --features--> ANCHORS/features

The pool may also be searched by the captions, or by class prompts; these are embedded in the task images' place. Either
kind may be left out: without a captioner there are no captions, without a pool no pairs. Features are those of the
model that the pool is searched with. They are computed again, from what is in the set, which costs what embedding as
many images of the pool does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arf_plugin.errors import PoolError, StageError
from arf_plugin.pipeline.caption import CaptionStage
from arf_plugin.pipeline.embed import EmbedStage, EmbedTextsStage
from arf_plugin.pipeline.embedder import ClipModel
from arf_plugin.pipeline.embeddings import Embeddings
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.features import FeaturesStage
from arf_plugin.pipeline.knn_backends import Search
from arf_plugin.pipeline.pack import PackStage
from arf_plugin.pipeline.retrieve import RetrieveStage
from arf_plugin.pipeline.runner import describe, run_stage
from arf_plugin.pipeline.selection import Exclusion, Selection
from arf_plugin.pipeline.source import Source, TarSource
from arf_plugin.pipeline.stage import Stage
from arf_plugin.pipeline.text_queries import CaptionTexts, PromptTexts

_WAIT = 3600  # seconds without any progress of the other ranks


@dataclass(frozen=True)
class Build:
    """What to build.

    Attributes:
        out: the anchor set.
        work: folder of embeddings, hits and bookkeeping.
        task: task data.
        caption: the stage caption; None leaves caption anchors out.
        caption_batch_size: images per batch of the captioner; that of embedding is the execution's.
        pool: URLs of the pool's tars; None leaves pair anchors out.
        model: open_clip model of the search and of the features.
        selection: which hits become pairs.
        query_by: what the pool is searched by: ``image``, ``caption`` or ``prompt``.
        prompts: class names and templates of ``prompt``.
        exclusion: images that no pair may show.
        search: how to search.
        salvage: go on past damaged pool tars; see :class:`arf_plugin.pipeline.source.TarSource`.
        shard_size: pairs per output shard.
        features: also write the features of `model`, if there is one.
    """

    out: Path
    work: Path
    task: Source
    caption: CaptionStage | None = None
    caption_batch_size: int = 32
    pool: list[str] | None = None
    model: ClipModel | None = None
    selection: Selection = field(default_factory=Selection)
    query_by: str = "image"
    prompts: PromptTexts | None = None
    exclusion: Exclusion | None = None
    search: Search = field(default_factory=Search)
    salvage: bool = False
    shard_size: int = 1000
    features: bool = True

    def __post_init__(self) -> None:
        if self.caption is None and self.pool is None:
            raise StageError("Nothing to build: give --captioner for captions, --pool for pairs, or both.")
        if self.pool is not None and self.model is None:
            raise StageError(
                "Pairs are found with an open_clip model: add --model (and --pretrained) to --pool."
            )
        if (self.query_by == "prompt") != (self.prompts is not None):
            raise StageError("--query-by prompt and --classnames belong together: give both, or neither.")

    def stages(self) -> Iterator[Stage]:
        """Yields the stages in order; each is made when it is asked for, which is after the one before has run."""
        if self.caption is not None:
            yield self.caption
        if self.pool is not None and self.model is not None:
            yield self.embed_queries(self.model)
            yield self.embed_pool(self.pool, self.model)
            queries = Embeddings(self._queries, "image" if self.query_by == "image" else "text")
            found, pool = self.work / "retrieve", Embeddings(self.work / "pool")
            yield RetrieveStage(found, queries, pool, self.selection, self.exclusion, self.search)
            yield PackStage(self.out, found, self.pool, self.shard_size, work_folder=self.work / "pack")
        if self.features and self.model is not None:
            yield FeaturesStage(self.out, self.model, work_folder=self.work / "features")

    def embed_queries(self, model: ClipModel) -> Stage:
        """The stage embed for the queries: the task's images, or texts in their place."""
        if self.query_by == "image":
            return EmbedStage(self._queries, self.task, model)
        return EmbedTextsStage(self._queries, self.prompts or CaptionTexts(self.out), model)

    def embed_pool(self, pool: list[str], model: ClipModel) -> Stage:
        """The stage embed for the pool."""
        source = TarSource(pool, PoolError, self.salvage)
        return EmbedStage(self.work / "pool", source, model, require_text=True)

    @property
    def _queries(self) -> Path:
        return self.work / {"image": "task", "caption": "captions", "prompt": "prompts"}[self.query_by]


def build_anchors(build: Build, execution: Execution, restart: Collection[str] = ()) -> list[dict[str, Any]]:
    """Runs all stages; each waits until the other ranks have finished the one before.

    Args:
        build: what to build.
        execution: how; its ``restart`` is set per stage.
        restart: names of the stages whose earlier work is thrown away.

    Returns:
        The stages' summaries.
    """
    if build.pool is not None and not (build.work / "retrieve/work/retrieve/finished.json").exists():
        build.search.check()
    summaries = []
    for stage in build.stages():
        batch_size = build.caption_batch_size if stage.name == "caption" else execution.batch_size
        mine = replace(execution, restart=stage.name in restart, batch_size=batch_size)
        summary = run_stage(stage, mine)
        if not summary["finished"]:
            _wait(stage, summary["shards"])
            summary = run_stage(stage, replace(mine, rank=0, world=1, restart=False))  # finds the summary
        summaries.append(summary)
    return summaries


def plan_anchors(build: Build, advance: Callable[[], object] | None = None) -> dict[str, Any]:
    """Returns what :func:`build_anchors` would do, with counts, from the headers of all tars.

    Args:
        build: what to build.
        advance: called when a pool tar has been looked at.
    """
    from arf_plugin.anchors.scan import scan_shard

    result: dict[str, Any] = {"out": str(build.out), "work": str(build.work)}
    caption, each = build.caption, build.caption.generation.captions_per_image if build.caption else 0
    plans = [describe(caption)] if caption else []
    captions: int | None = 0  # at most, as that of pairs; None if that is not known
    if caption:
        captions = None if plans[0]["samples"] is None else plans[0]["samples"] * each
    pairs: int | None = 0
    if build.pool is not None and build.model is not None:
        in_pool = 0
        for url in build.pool:
            scan = scan_shard(url, PoolError)
            in_pool += len(scan.keys) - scan.without_text
            if advance is not None:
                advance()
        if build.query_by == "caption":  # they may not have been generated yet
            counts = [shard.samples for shard in build.task.shards()]
            known = [count for count in counts if count is not None]
            at_most = sum(known) * each if len(known) == len(counts) else None
            out = str(build.work / "captions")
            plans.append({"stage": "embed", "out": out, "shards": len(counts), "samples": at_most})
        else:
            plans.append(describe(build.embed_queries(build.model)))
        queries = plans[-1]["samples"]
        plans.append(describe(build.embed_pool(build.pool, build.model)))
        result["pool"] = {"tars": len(build.pool), "pairs": in_pool}
        pairs = None
        if queries is not None:
            pairs = min(build.selection.k * queries, build.selection.max_pairs or in_pool, in_pool)
            result["pairs_at_most"] = pairs
    if build.features and build.model is not None:  # of what is still to be made
        samples = None if pairs is None or captions is None else pairs + captions
        plans.append({"stage": "features", "out": str(build.out), "samples": samples})
    for plan in plans:
        plan.pop("config", None)
    return result | {"stages": plans}


def _wait(stage: Stage, shards: int) -> None:
    """Waits for other ranks; gives up when nothing has happened for an hour."""
    last, since = -1, time.monotonic()
    while not (stage.work / "finished.json").exists():
        count = sum(1 for _ in (stage.work / "done").glob("*.json"))
        if count != last:
            last, since = count, time.monotonic()
        if time.monotonic() - since > _WAIT:
            raise StageError(
                f"Waited an hour for the other ranks to finish stage {stage.name}: {count} of {shards} "
                "shards are done. Have they all been started? Start this command again to go on."
            )
        time.sleep(1)
