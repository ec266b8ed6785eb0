"""Stage caption: a pretrained captioner describes every image of the task data (section 3.2 of the paper, TCAG)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.manifest import begin_kind, update_manifest
from arf_plugin.errors import FlagError, MissingDependencyError, ServiceError
from arf_plugin.images import load_batches, map_ordered
from arf_plugin.pipeline.caption_cleaning import Cleaning
from arf_plugin.pipeline.captioner import (
    PROMPT,
    Endpoint,
    Generation,
    captioner_fetches,
    captioner_identity,
    load_captioner,
)
from arf_plugin.pipeline.embedder import ClipModel, LoadedClip
from arf_plugin.pipeline.execution import Execution, pick_dtype
from arf_plugin.pipeline.source import RawSample, Source
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import write_table

if TYPE_CHECKING:
    import PIL.Image
    import torch

_Scored = tuple[str, "float | None"]  # a caption and its score
_Loaded = tuple["PIL.Image.Image", list[str]]  # an image, and what an endpoint says of it
_Batch = list[tuple[RawSample, _Loaded]]


@dataclass(frozen=True)
class Scoring:
    """CLIP-score: the cosine between image and caption, by an open_clip model; and what it lets through.

    Source: Hessel et al., "CLIPScore", EMNLP 2021, without its factor of 2.5 and its cut at zero.

    Attributes:
        model: the open_clip model.
        min_score: captions below are left out; None keeps all.
    """

    model: ClipModel
    min_score: float | None = None

    def __post_init__(self) -> None:
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise FlagError(f"--min-score {self.min_score}: a cosine lies between -1 and 1.")


@dataclass
class CaptionStage(Stage):
    """Writes ``captions/part-NNNNN.parquet``, one part per task shard, with columns id, caption and perhaps score.

    Attributes:
        task: task data.
        captioner: model folder or hub name, or ``open_clip:MODEL@PRETRAINED``; a model's name at the endpoint.
        generation: settings of the generation.
        cleaning: how captions are cleaned.
        scoring: the model that scores them; None leaves the column out.
        precision: of the captioner; see :func:`arf_plugin.pipeline.execution.pick_dtype`.
        endpoint: server that captions, in place of a model in this process.
    """

    task: Source
    captioner: str
    generation: Generation = field(default_factory=Generation)
    cleaning: Cleaning = field(default_factory=Cleaning)
    scoring: Scoring | None = None
    precision: str = "auto"
    endpoint: Endpoint | None = None
    name = "caption"
    shard_inputs = "task"

    def __post_init__(self) -> None:
        if self.endpoint is None:
            return
        self.generation = replace(self.generation, prompt=self.generation.prompt or PROMPT)
        if self.generation.num_beams > 1 or self.generation.min_new_tokens:
            raise FlagError(
                "--num-beams and --min-new-tokens are no settings of chat completions. Leave them out with "
                "--captioner-url; several captions per image are sampled there: --top-p 0.9"
            )

    def config(self) -> dict[str, Any]:
        """Captioner, generation settings and task data; batch size and device are free to change."""
        return self._settings() | {"precision": self.precision, "task": self.task.fingerprint()}

    def _settings(self) -> dict[str, Any]:
        score, name = self.scoring, self.captioner
        return {
            "captioner": f"endpoint:{name}" if self.endpoint else captioner_identity(name),
            "generation": asdict(self.generation),
            "cleaning": self.cleaning.config(),
            "score": {"model": score.model.identity(), "min_score": score.min_score} if score else None,
        }

    def plan(self) -> list[Shard]:
        """One shard per task shard."""
        return self.task.shards()

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One parquet file per shard."""
        return [self.out / "captions" / f"part-{shard.name}.parquet" for shard in shards]

    def fetches(self) -> str | None:
        """The captioner, from a hub or a server, and the model that scores."""
        if self.endpoint:
            return f"{self.endpoint.url} would be asked for captions"
        found = captioner_fetches(self.captioner)
        return found or (self.scoring.model.fetches() if self.scoring else None)

    def prepare(self, execution: Execution) -> None:
        """Loads the captioner, or finds out whether the endpoint captions; and loads the model that scores."""
        if self.endpoint:
            try:
                from arf_plugin.pipeline.endpoint import EndpointCaptioner
            except ImportError as cause:
                library = cause.name or "requests"
                raise MissingDependencyError(library, "--captioner-url", "captions") from None
            self._remote = EndpointCaptioner(self.endpoint, self.captioner, self.generation)
            self._remote.check()
        else:
            device = execution.torch_device()
            dtype = pick_dtype(self.precision, device)
            self._speaker = load_captioner(self.captioner, device, dtype, self.generation)
        self._clip = self.scoring.model.load(execution) if self.scoring else None

    def input_digest(self, shard: Shard) -> str | None:
        """Content of the images."""
        return self.task.content(shard)

    def begin(self) -> None:
        """Notes in the anchor set that its captions are not whole."""
        begin_kind(self.out, "captions")

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Captions a shard."""
        import torch

        clip, remote = self._clip, self._remote if self.endpoint else None
        workers = self.endpoint.threads if self.endpoint else execution.workers

        def load(sample: RawSample) -> _Loaded:
            image = _decode(sample)
            return image, remote.captions(sample.id, sample.image or b"", image) if remote else []

        def reject(sample: RawSample, reason: Exception) -> None:
            if isinstance(reason, ServiceError):
                raise reason
            outcome.reject(sample.id, str(reason))

        def inputs(batch: _Batch) -> tuple[dict[str, Any], list[torch.Tensor]]:
            images = [image for _, (image, _) in batch]
            given = {} if remote else self._speaker.inputs(images)
            return given, [clip.preprocess(image) for image in images] if clip else []

        if remote:
            remote.resume()

        torch.manual_seed(self.generation.seed * 1_000_003 + shard.index)  # sampling, if any, is per shard
        outcome = Outcome()
        rows: list[dict[str, Any]] = []
        batches = load_batches(
            self.task.read(shard),
            load,
            max(execution.batch_size, workers),  # twice as many are loaded ahead, so that none is idle
            workers,
            reject,
            stop=remote.halt if remote else None,
        )
        # One thread prepares the next batches while the model generates.
        for batch, prepared in map_ordered(inputs, batches, workers=1, ahead=3):
            if isinstance(prepared, Exception):
                raise prepared
            said = [texts for _, (_, texts) in batch] if remote else self._speaker.captions(prepared[0])
            cleaned = [list(dict.fromkeys(filter(None, map(self.cleaning, group)))) for group in said]
            scored = _scored(clip, prepared[1], cleaned)
            for (sample, _), texts, pairs in zip(batch, said, scored, strict=True):
                good = [(caption, score) for caption, score in pairs if self._passes(score)]
                rows += [{"id": sample.id, "caption": caption, "score": score} for caption, score in good]
                if good:
                    outcome.kept += 1
                else:
                    outcome.reject(sample.id, self._reason(texts, pairs))
            advance(len(batch))
        outcome.samples = outcome.kept + len(outcome.rejects)
        rows.sort(key=lambda row: (row["id"], row["caption"]))
        columns = {"id": pa.string(), "caption": pa.string()} | ({"score": pa.float32()} if clip else {})
        write_table(self.artifacts([shard])[0], pa.Table.from_pylist(rows, pa.schema(columns)))
        return outcome

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Notes the captions in the anchor set's manifest."""
        count = sum(pq.read_metadata(path).num_rows for path in self.artifacts(shards))
        settings = self._settings()
        entry = settings | {
            "count": count,
            "files": len(shards),
            "captioner": Path(self.captioner).name if Path(self.captioner).is_dir() else self.captioner,
            "captioner_identity": settings["captioner"],
            "task_digest": self.task.digest(),
        }
        update_manifest(self.out, "captions", entry, self.artifacts(shards))
        return {"captions": count}

    def _passes(self, score: float | None) -> bool:
        least = self.scoring.min_score if self.scoring else None
        return least is None or (score is not None and score >= least)

    def _reason(self, said: list[str], pairs: list[_Scored]) -> str:
        """Why none of the captions of an image is kept."""
        if pairs and self.scoring:
            caption, score = max(pairs, key=lambda pair: pair[1] or -1.0)
            return f"scores at most {score:.3f} (--min-score {self.scoring.min_score:g}): {caption!r}"
        if any(text.strip() for text in said):
            return f"nothing is left of {said[0][:200]!r}"
        return "the captioner said nothing"


def _decode(sample: RawSample) -> PIL.Image.Image:
    if sample.image is None:
        raise ValueError(sample.problem or "has no image")
    return decode_image(sample.image)


def _scored(
    clip: LoadedClip | None, pixels: Sequence[torch.Tensor], captions: list[list[str]]
) -> list[list[_Scored]]:
    """The captions of each of the images [3, H, W] with their scores; None without a model."""
    texts = [caption for group in captions for caption in group]
    if clip is None or not texts:
        return [[(caption, None) for caption in group] for group in captions]
    image = [i for i, group in enumerate(captions) for _ in group]
    cosines = iter((clip.images(pixels)[image] * clip.texts(texts)).sum(dim=1).tolist())
    return [[(caption, next(cosines)) for caption in group] for group in captions]
