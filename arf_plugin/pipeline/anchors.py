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
from arf_plugin.pipeline.caption import CaptionStage, Scoring
from arf_plugin.pipeline.caption_cleaning import Cleaning
from arf_plugin.pipeline.captioner import Generation
from arf_plugin.pipeline.embed import CaptionTexts, EmbedStage, EmbedTextsStage, PromptTexts
from arf_plugin.pipeline.embedder import ClipModel
from arf_plugin.pipeline.embeddings import Embeddings
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.features import FeaturesStage
from arf_plugin.pipeline.knn_backends import Search
from arf_plugin.pipeline.near import Exclusion
from arf_plugin.pipeline.pack import PackStage
from arf_plugin.pipeline.retrieve import RetrieveStage, Selection
from arf_plugin.pipeline.runner import describe, run_stage
from arf_plugin.pipeline.source import Source, TarSource
from arf_plugin.pipeline.stage import Stage

_WAIT = 3600  # seconds without any progress of the other ranks


@dataclass(frozen=True)
class Build:
    """What to build.

    Attributes:
        out: the anchor set.
        work: folder of embeddings, hits and bookkeeping.
        task: task data.
        captioner: captioner of the caption anchors; None leaves them out.
        generation: settings of the captioner.
        cleaning, scoring: how captions are cleaned and scored.
        precision: of the captioner; that of the search is its model's.
        caption_batch_size: images per batch of the captioner; that of embedding is the execution's.
        pool: URLs of the pool's tars; None leaves pair anchors out.
        model: open_clip model of the search and of the features.
        selection: which hits become pairs.
        query_by: what the pool is searched by: ``image``, ``caption`` or ``prompt``.
        prompts: class names and templates of ``prompt``; see :class:`arf_plugin.pipeline.embed.PromptTexts`.
        exclusion: images that no pair may show.
        search: how to search.
        salvage: go on past damaged pool tars; see :class:`arf_plugin.pipeline.source.TarSource`.
        shard_size: pairs per output shard.
        features: also write the features of `model`, if there is one; see
            :class:`arf_plugin.pipeline.features.FeaturesStage`.
    """

    out: Path
    work: Path
    task: Source
    captioner: str | None = None
    generation: Generation = field(default_factory=Generation)
    cleaning: Cleaning = field(default_factory=Cleaning)
    scoring: Scoring | None = None
    precision: str = "auto"
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
        if self.captioner is None and self.pool is None:
            raise StageError("Nothing to build: give --captioner for captions, --pool for pairs, or both.")
        if self.pool is not None and self.model is None:
            raise StageError(
                "Pairs are found with an open_clip model: add --model (and --pretrained) to --pool."
            )
        if (self.query_by == "prompt") != (self.prompts is not None):
            raise StageError("--query-by prompt and --classnames belong together: give both, or neither.")

    def stages(self) -> Iterator[Callable[[], Stage]]:
        """Yields the stages in order; a later one can be made only when the earlier ones are finished."""
        if self.captioner is not None:
            yield self.caption
        if self.pool is not None:
            yield from (self.embed_queries, self.embed_pool, self.retrieve, self.pack)
        if self.features and self.model is not None:
            yield self.write_features

    def caption(self) -> Stage:
        """The stage caption."""
        return CaptionStage(
            self.out,
            self.task,
            self.captioner or "",
            self.generation,
            self.cleaning,
            self.scoring,
            self.precision,
            work_folder=self.work / "caption",
        )

    def embed_queries(self) -> Stage:
        """The stage embed for the queries: the task's images, or texts in their place."""
        assert self.model is not None
        if self.query_by == "image":
            return EmbedStage(self._queries, self.task, self.model)
        return EmbedTextsStage(self._queries, self.prompts or CaptionTexts(self.out), self.model)

    def embed_pool(self) -> Stage:
        """The stage embed for the pool."""
        assert self.model is not None
        source = TarSource(self.pool or [], PoolError, self.salvage)
        return EmbedStage(self.work / "pool", source, self.model, require_text=True)

    def retrieve(self) -> Stage:
        """The stage retrieve."""
        queries = Embeddings(self._queries, "image" if self.query_by == "image" else "text")
        pool = Embeddings(self.work / "pool")
        return RetrieveStage(
            self.work / "retrieve", queries, pool, self.selection, self.exclusion, self.search
        )

    def pack(self) -> Stage:
        """The stage pack."""
        return PackStage(
            self.out, self.work / "retrieve", self.pool, self.shard_size, work_folder=self.work / "pack"
        )

    def write_features(self) -> Stage:
        """The stage features."""
        assert self.model is not None
        return FeaturesStage(self.out, self.model, work_folder=self.work / "features")

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
    for make in build.stages():
        stage = make()
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
    plans = [] if build.captioner is None else [describe(build.caption())]
    if build.pool is not None:
        pairs = 0
        for url in build.pool:
            scan = scan_shard(url, PoolError)
            pairs += len(scan.keys) - scan.without_text
            if advance is not None:
                advance()
        if build.query_by == "caption":  # they may not have been generated yet
            counts = [shard.samples for shard in build.task.shards()]
            known = sum(count for count in counts if count is not None) if None not in counts else None
            at_most = None if known is None else known * build.generation.captions_per_image
            out = str(build.work / "captions")
            plans.append({"stage": "embed", "out": out, "shards": len(counts), "samples": at_most})
        else:
            plans.append(describe(build.embed_queries()))
        plans.append(describe(build.embed_pool()))
        result["pool"] = {"tars": len(build.pool), "pairs": pairs}
        queries = plans[-2]["samples"]
        if queries is not None:
            result["pairs_at_most"] = min(
                build.selection.k * queries, build.selection.max_pairs or pairs, pairs
            )
    if build.features and build.model is not None:  # of what is still to be made
        most: int | None = result.get("pairs_at_most") if build.pool is not None else 0
        images: int | None = plans[0]["samples"] if build.captioner is not None else 0
        each = build.generation.captions_per_image
        samples = None if most is None or images is None else most + images * each
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
