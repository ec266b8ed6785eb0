"""Stage caption (TCAG): a pretrained captioner describes every image of the task data.

Paper: section 3.2, text-compensated anchor generation. Captions speak of what a class prompt leaves out, and keep
the image features near where pretraining put them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.anchors.files import replacing
from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.manifest import update_manifest
from arf_plugin.pipeline.captioner import Captioner, Generation, captioner_identity
from arf_plugin.pipeline.device import pick_device, pick_dtype
from arf_plugin.pipeline.source import RawSample, Source, map_ordered
from arf_plugin.pipeline.stage import Outcome, Shard, Stage

if TYPE_CHECKING:
    import PIL.Image

_Batch = tuple[list[RawSample], list["PIL.Image.Image"]]


class CaptionStage(Stage):
    """Writes ``captions/part-NNNNN.parquet`` (columns id, caption), one part per task shard, sorted by id.

    Args:
        out: the anchor set.
        task: task data.
        captioner: model folder or hub name.
        generation: settings of the generation.
        work: folder of the bookkeeping.
        batch_size: images per batch.
        device, precision: see :mod:`arf_plugin.pipeline.device`.
        workers: threads that decode images.
        rank: this process's rank, which picks its GPU.
    """

    name = "caption"

    def __init__(
        self,
        out: Path,
        task: Source,
        captioner: str,
        generation: Generation | None = None,
        *,
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
        self._captioner: Captioner | None = None

    def config(self) -> dict[str, Any]:
        """Captioner, generation settings and task data; batch size and device are free to change."""
        return {
            "captioner": captioner_identity(self._name),
            "precision": self._precision,
            "generation": self._generation.config(),
            "task": self._task.fingerprint(),
        }

    def plan(self) -> list[Shard]:
        """One shard per task shard."""
        return self._task.shards()

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One parquet file per shard."""
        return [self.out / "captions" / f"part-{shard.name}.parquet" for shard in shards]

    def prepare(self) -> None:
        """Loads the captioner."""
        device = pick_device(self._device_name, self._rank)
        dtype = pick_dtype(self._precision, device)
        self._captioner = Captioner(self._name, device, dtype, self._generation)

    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Captions a shard."""
        import torch

        captioner = self._captioner
        assert captioner is not None, "prepare() comes first"
        torch.manual_seed(self._generation.seed * 1_000_003 + shard.index)  # sampling, if any, is per shard
        outcome = Outcome()
        rows: list[tuple[str, str]] = []
        batches = self._batches(shard, outcome)
        # One thread prepares the next batches while the model generates.
        prepared = map_ordered(lambda batch: captioner.inputs(batch[1]), batches, workers=1, ahead=3)
        for (samples, _), inputs in prepared:
            if isinstance(inputs, Exception):
                raise inputs
            for sample, captions in zip(samples, captioner.captions(inputs), strict=True):
                cleaned = dict.fromkeys(filter(None, map(clean_caption, captions)))  # unique, in order
                if cleaned:
                    outcome.kept += 1
                    rows += [(sample.id, caption) for caption in cleaned]
                else:
                    outcome.reject(sample.id, "the captioner said nothing")
            advance(len(samples))
        rows.sort()
        write_captions(self.artifacts([shard])[0], rows)
        return outcome

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
            "task_digest": self._task.digest(),
        }
        update_manifest(self.out, "captions", entry)
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


def clean_caption(text: str) -> str:
    """Drops control characters and joins runs of white space; captions end up in one line of a parquet file."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())


def write_captions(path: Path, rows: list[tuple[str, str]]) -> None:
    """Writes one part of a captions folder.

    Args:
        path: parquet file.
        rows: (id, caption), sorted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("caption", pa.string())])
    table = pa.table({"id": [row[0] for row in rows], "caption": [row[1] for row in rows]}, schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _decode(sample: RawSample) -> PIL.Image.Image:
    if sample.image is None:
        raise ValueError(sample.problem or "has no image")
    return decode_image(sample.image)
