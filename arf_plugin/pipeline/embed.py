"""Stage embed: an open_clip model turns images and texts into unit vectors, in clip-retrieval's folder layout.

``img_emb/img_emb_N.npy`` and ``text_emb/text_emb_N.npy`` hold [rows, dimension] fp16 vectors of unit norm;
``metadata/metadata_N.parquet`` describes the same rows. clip-retrieval's columns ``image_path`` (the key) and
``caption`` are joined by ours: ``id``, ``tar``, ``ext``, ``offset`` and ``size`` of the image, which let the stage
pack read a chosen image without looking for it, and ``sha256``, the digest of the image's bytes, which lets it know
that what it reads is what was embedded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.anchors.files import replacing, write_json
from arf_plugin.anchors.images import decode_image
from arf_plugin.pipeline.device import pick_device, pick_dtype
from arf_plugin.pipeline.embedder import load_model, model_identity, unit_fp16
from arf_plugin.pipeline.embeddings import ORIGIN
from arf_plugin.pipeline.source import RawSample, Source, map_ordered
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import write_table
from arf_plugin.untrusted import utf8

if TYPE_CHECKING:
    import torch

MODALITIES = ("image", "text", "both")


class EmbedStage(Stage):
    """Embeds a pool or task data.

    Args:
        out: the embedding folder.
        source: what to embed.
        model: open_clip model name, ``local-dir:`` folder or ``hf-hub:`` name.
        pretrained: open_clip tag or checkpoint path; None for models that bring their weights along.
        modality: ``image``, ``text`` or ``both``; samples that lack one are rejected.
        require_text: rejects images without a text even if texts are not embedded, as a pool needs them.
        batch_size: images per batch.
        device, precision: see :mod:`arf_plugin.pipeline.device`.
        workers: threads that decode and resize.
        rank: this process's rank, which picks its GPU.
    """

    name = "embed"
    shard_inputs = "inputs"

    def __init__(
        self,
        out: Path,
        source: Source,
        model: str,
        pretrained: str | None = None,
        *,
        modality: str = "image",
        require_text: bool = False,
        batch_size: int = 256,
        device: str = "auto",
        precision: str = "auto",
        workers: int = 2,
        rank: int = 0,
    ) -> None:
        super().__init__(out)
        self._source, self._model_name, self._pretrained = source, model, pretrained
        self._images, self._texts = modality != "text", modality != "image"
        self._require_text = require_text or self._texts
        self._batch_size, self._workers = batch_size, workers
        self._device_name, self._precision, self._rank = device, precision, rank

    def config(self) -> dict[str, Any]:
        """Model, weights, modality and inputs; batch size and device are free to change."""
        return {
            "model": model_identity(self._model_name, self._pretrained),
            "precision": self._precision,
            "images": self._images,
            "texts": self._texts,
            "require_text": self._require_text,
            "inputs": self._source.fingerprint(),
        }

    def plan(self) -> list[Shard]:
        """One shard per shard of the source."""
        return self._source.shards()

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """Vectors and metadata of each shard."""
        paths = []
        for shard in shards:
            if self._images:
                paths.append(self.out / "img_emb" / f"img_emb_{shard.name}.npy")
            if self._texts:
                paths.append(self.out / "text_emb" / f"text_emb_{shard.name}.npy")
            paths.append(self.out / "metadata" / f"metadata_{shard.name}.parquet")
        return paths

    def prepare(self) -> None:
        """Loads the model."""
        self._device = pick_device(self._device_name, self._rank)
        self._dtype = pick_dtype(self._precision, self._device)
        self._model, self._preprocess, self._tokenizer = load_model(
            self._model_name, self._pretrained, self._device, self._dtype
        )

    def input_digest(self, shard: Shard) -> str | None:
        """Content of what is embedded."""
        return self._source.content(shard)

    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Embeds a shard."""
        import torch

        outcome = Outcome()
        rows: list[RawSample] = []
        digests: list[str] = []
        images: list[np.ndarray] = []
        texts: list[np.ndarray] = []
        for samples, hashed, pixels in self._batches(shard, outcome):
            with torch.inference_mode():
                if self._images:
                    moved = torch.stack(pixels).to(self._device, self._dtype)
                    images.append(unit_fp16(self._model.encode_image(moved)))
                if self._texts:
                    tokens = self._tokenizer([sample.text or "" for sample in samples]).to(self._device)
                    texts.append(unit_fp16(self._model.encode_text(tokens)))
            rows += samples
            digests += hashed
            advance(len(samples))
        keep = np.ones(len(rows), dtype=bool)
        for vectors in (images, texts):
            if vectors:
                keep &= np.isfinite(np.concatenate(vectors)).all(axis=1)
        for row, good in zip(rows, keep, strict=True):
            if not good:
                outcome.reject(row.id, "its embedding is not finite")
        outcome.kept = int(keep.sum())
        self._write(shard, rows, digests, images, texts, keep)
        return outcome

    def finalize(self, shards: list[Shard]) -> dict[str, Any]:
        """Notes the model beside the vectors, so that a search can refuse vectors of another model."""
        identity = model_identity(self._model_name, self._pretrained)
        write_json(self.out / ORIGIN, {"model": identity})
        return {"model": identity["name"]}

    def _batches(
        self, shard: Shard, outcome: Outcome
    ) -> Iterator[tuple[list[RawSample], list[str], list[torch.Tensor]]]:
        samples: list[RawSample] = []
        digests: list[str] = []
        pixels: list[torch.Tensor] = []
        decoded = map_ordered(
            self._pixels, self._source.read(shard), self._workers, ahead=2 * self._batch_size
        )
        for sample, image in decoded:
            outcome.samples += 1
            if isinstance(image, Exception):
                outcome.reject(sample.id, str(image))
                continue
            samples.append(replace(sample, image=None))
            digests.append(image[0])
            pixels.append(image[1])
            if len(samples) == self._batch_size:
                yield samples, digests, pixels
                samples, digests, pixels = [], [], []
        if samples:
            yield samples, digests, pixels

    def _pixels(self, sample: RawSample) -> tuple[str, torch.Tensor]:
        """SHA-256 of a sample's image and its preprocessed pixels [3, H, W].

        Raises:
            ValueError: with the reason to reject it.
        """
        if sample.image is None or sample.problem:
            raise ValueError(sample.problem or "has no image")
        if self._require_text and not (sample.text or "").strip():
            raise ValueError("has no text")
        return hashlib.sha256(sample.image).hexdigest(), self._preprocess(decode_image(sample.image))

    def _write(
        self,
        shard: Shard,
        rows: list[RawSample],
        digests: list[str],
        images: list[np.ndarray],
        texts: list[np.ndarray],
        keep: np.ndarray,
    ) -> None:
        import pyarrow as pa

        paths = iter(self.artifacts([shard]))
        for wanted, vectors in ((self._images, images), (self._texts, texts)):
            if wanted:
                whole = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float16)
                with replacing(next(paths)) as temporary, temporary.open("wb") as file:
                    np.save(file, whole[keep])
        kept = [row for row, good in zip(rows, keep, strict=True) if good]
        hashed = [value for value, good in zip(digests, keep, strict=True) if good]
        table = pa.table(
            {
                "image_path": pa.array([utf8(row.key) for row in kept], pa.string()),
                "caption": pa.array([row.text for row in kept], pa.string()),
                "id": pa.array([utf8(row.id) for row in kept], pa.string()),
                "tar": pa.array([utf8(row.tar) for row in kept], pa.string()),
                "ext": pa.array([utf8(row.ext) for row in kept], pa.string()),
                "offset": pa.array([row.offset for row in kept], pa.int64()),
                "size": pa.array([row.size for row in kept], pa.int64()),
                "sha256": pa.array(hashed, pa.string()),
            }
        )
        write_table(next(paths), table)
