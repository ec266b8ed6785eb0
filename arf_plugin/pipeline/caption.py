"""Stage caption (TCAG): a pretrained captioner describes every image of the task data.

Paper: section 3.2, text-compensated anchor generation. Captions speak of what a class prompt leaves out, and keep
the image features near where pretraining put them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.anchors.files import replacing
from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.manifest import begin_kind, update_manifest
from arf_plugin.pipeline.caption_cleaning import Cleaning
from arf_plugin.pipeline.caption_score import CaptionScorer, Scoring
from arf_plugin.pipeline.captioner import captioner_identity, load_captioner
from arf_plugin.pipeline.device import pick_device, pick_dtype
from arf_plugin.pipeline.generation import Generation, ImageCaptioner
from arf_plugin.pipeline.source import RawSample, Source, map_ordered
from arf_plugin.pipeline.stage import Outcome, Shard, Stage

if TYPE_CHECKING:
    import PIL.Image

_Batch = tuple[list[RawSample], list["PIL.Image.Image"]]


class CaptionStage(Stage):
    """Writes ``captions/part-NNNNN.parquet``, one part per task shard, with columns id, caption and perhaps score.

    Args:
        out: the anchor set.
        task: task data.
        captioner: model folder or hub name, or ``open_clip:MODEL@PRETRAINED``.
        generation: settings of the generation.
        cleaning: how captions are cleaned.
        scoring: the model that scores them; None leaves the column out.
        work: folder of the bookkeeping.
        batch_size: images per batch.
        device, precision: see :mod:`arf_plugin.pipeline.device`.
        workers: threads that decode images.
        rank: this process's rank, which picks its GPU.
    """

    name = "caption"
    shard_inputs = "task"

    def __init__(
        self,
        out: Path,
        task: Source,
        captioner: str,
        generation: Generation | None = None,
        *,
        cleaning: Cleaning | None = None,
        scoring: Scoring | None = None,
        work: Path | None = None,
        batch_size: int = 32,
        device: str = "auto",
        precision: str = "auto",
        workers: int = 2,
        rank: int = 0,
    ) -> None:
        super().__init__(out, work)
        self._task, self._name = task, captioner
        self._generation = generation or Generation()
        self._batch_size, self._workers = batch_size, workers
        self._device_name, self._precision, self._rank = device, precision, rank
        self._clean, self._scoring = cleaning or Cleaning(), scoring
        self._captioner: ImageCaptioner | None = None
        self._scorer: CaptionScorer | None = None

    def config(self) -> dict[str, Any]:
        """Captioner, generation settings and task data; batch size and device are free to change."""
        return {
            "captioner": captioner_identity(self._name),
            "precision": self._precision,
            "generation": self._generation.config(),
            "cleaning": self._clean.config(),
            "score": self._scoring.config() if self._scoring else None,
            "task": self._task.fingerprint(),
        }

    def plan(self) -> list[Shard]:
        """One shard per task shard."""
        return self._task.shards()

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One parquet file per shard."""
        return [self.out / "captions" / f"part-{shard.name}.parquet" for shard in shards]

    def prepare(self) -> None:
        """Loads the captioner, and the model that scores."""
        device = pick_device(self._device_name, self._rank)
        dtype = pick_dtype(self._precision, device)
        self._captioner = load_captioner(self._name, device, dtype, self._generation)
        if self._scoring is not None:
            self._scorer = CaptionScorer(self._scoring, device, dtype)

    def input_digest(self, shard: Shard) -> str | None:
        """Content of the images."""
        return self._task.content(shard)

    def begin(self) -> None:
        """Notes in the anchor set that its captions are not whole."""
        begin_kind(self.out, "captions")

    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Captions a shard."""
        import torch

        captioner, scorer = self._captioner, self._scorer
        assert captioner is not None, "prepare() comes first"

        def prepare(batch: _Batch) -> tuple[dict[str, Any], Any]:
            return captioner.inputs(batch[1]), scorer.pixels(batch[1]) if scorer else None

        torch.manual_seed(self._generation.seed * 1_000_003 + shard.index)  # sampling, if any, is per shard
        outcome = Outcome()
        rows: list[tuple[str, str, float | None]] = []
        # One thread prepares the next batches while the model generates.
        prepared = map_ordered(prepare, self._batches(shard, outcome), workers=1, ahead=3)
        for (samples, _), inputs in prepared:
            if isinstance(inputs, Exception):
                raise inputs
            said = captioner.captions(inputs[0])
            cleaned = [list(dict.fromkeys(filter(None, map(self._clean, group)))) for group in said]
            scores = (
                scorer.scores(inputs[1], cleaned) if scorer else [[None] * len(group) for group in cleaned]
            )
            for i, sample in enumerate(samples):
                pairs = list(zip(cleaned[i], scores[i], strict=True))
                self._keep(sample, said[i], pairs, rows, outcome)
            advance(len(samples))
        rows.sort(key=lambda row: row[:2])
        write_captions(self.artifacts([shard])[0], rows, scored=scorer is not None)
        return outcome

    def _keep(
        self,
        sample: RawSample,
        said: list[str],
        pairs: Sequence[tuple[str, float | None]],
        rows: list[tuple[str, str, float | None]],
        outcome: Outcome,
    ) -> None:
        """Adds the good captions of a sample to the rows, or rejects the sample if there is none."""
        least = self._scoring.min_score if self._scoring else None
        good = [pair for pair in pairs if least is None or (pair[1] is not None and pair[1] >= least)]
        if good:
            outcome.kept += 1
            rows += [(sample.id, *pair) for pair in good]
        elif pairs:
            best = max(pairs, key=lambda pair: pair[1] or -1.0)
            outcome.reject(sample.id, f"scores at most {best[1]:.3f} (--min-score {least:g}): {best[0]!r}")
        elif any(text.strip() for text in said):
            outcome.reject(sample.id, f"nothing is left of {said[0][:200]!r}")
        else:
            outcome.reject(sample.id, "the captioner said nothing")

    def finalize(self, shards: list[Shard]) -> dict[str, Any]:
        """Notes the captions in the anchor set's manifest."""
        import pyarrow.parquet as pq

        count = sum(pq.read_metadata(path).num_rows for path in self.artifacts(shards))
        config = self.config()
        entry = {
            "count": count,
            "files": len(shards),
            "captioner": Path(self._name).name if Path(self._name).is_dir() else self._name,
            "captioner_identity": config["captioner"],
            "generation": config["generation"],
            "cleaning": config["cleaning"],
            "score": config["score"],
            "task_digest": self._task.digest(),
        }
        update_manifest(self.out, "captions", entry, self.artifacts(shards))
        return {"captions": count}

    def _batches(self, shard: Shard, outcome: Outcome) -> Iterator[_Batch]:
        """Full batches of decoded images; rejects what cannot be decoded."""
        samples: list[RawSample] = []
        images: list[PIL.Image.Image] = []
        decoded = map_ordered(_decode, self._task.read(shard), self._workers, ahead=4 * self._batch_size)
        for sample, image in decoded:
            outcome.samples += 1
            if isinstance(image, Exception):
                outcome.reject(sample.id, str(image))
                continue
            samples.append(sample)
            images.append(image)
            if len(samples) == self._batch_size:
                yield samples, images
                samples, images = [], []
        if samples:
            yield samples, images


def write_captions(path: Path, rows: list[tuple[str, str, float | None]], scored: bool = False) -> None:
    """Writes one part of a captions folder.

    Args:
        path: parquet file.
        rows: (id, caption, score), sorted.
        scored: whether to write the scores.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": pa.array([row[0] for row in rows], pa.string()),
        "caption": pa.array([row[1] for row in rows], pa.string()),
    }
    if scored:
        columns["score"] = pa.array([row[2] for row in rows], pa.float32())
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def _decode(sample: RawSample) -> PIL.Image.Image:
    if sample.image is None:
        raise ValueError(sample.problem or "has no image")
    return decode_image(sample.image)
