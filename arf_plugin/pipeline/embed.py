"""Stage embed: an open_clip model turns images and texts into unit vectors, in clip-retrieval's folder layout.

``img_emb/img_emb_N.npy`` and ``text_emb/text_emb_N.npy`` hold [rows, dimension] fp16 vectors of unit norm;
``metadata/metadata_N.parquet`` describes the same rows. clip-retrieval's columns ``image_path`` (the key) and
``caption`` are joined by ours: ``id``, ``tar``, ``ext``, ``offset`` and ``size`` of the image, which let the stage
pack read a chosen image without looking for it, and ``sha256``, the digest of the image's bytes, which lets it know
that what it reads is what was embedded.

Text queries, captions of the task data or one prompt per class, are embedded into ``text_emb/`` alone. The paper
searches by image (section 3.3); searching by text is ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.manifest import problems_of
from arf_plugin.errors import AnchorSetError
from arf_plugin.files import digest, file_digest, list_files, replacing, write_json
from arf_plugin.images import load_batches
from arf_plugin.pipeline.embedder import ClipModel, as_fp16
from arf_plugin.pipeline.embeddings import ORIGIN
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.source import RawSample, Source
from arf_plugin.pipeline.stage import Outcome, Shard, Stage, count_samples
from arf_plugin.pipeline.tables import TEXT, count_rows, read_columns, write_table
from arf_plugin.untrusted import utf8

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

_VECTORS = {"image": "img_emb", "text": "text_emb"}
_COLUMNS = ("image_path", "caption", "id", "tar", "ext", "offset", "size", "sha256")


@dataclass
class _EmbeddingStage(Stage):
    """What the stages that write an embedding folder have in common."""

    source: Any
    model: ClipModel
    name = "embed"

    def plan(self) -> list[Shard]:
        """One shard per shard of the source."""
        shards: list[Shard] = self.source.shards()
        return shards

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """Vectors and metadata of each shard."""
        paths = []
        for shard in shards:
            folders = [_VECTORS[modality] for modality in self.modalities()]
            paths += [self.out / name / f"{name}_{shard.name}.npy" for name in folders]
            paths.append(self.out / "metadata" / f"metadata_{shard.name}.parquet")
        return paths

    def modalities(self) -> list[str]:
        """What there are vectors of."""
        return ["text"]

    def fetches(self) -> str | None:
        """The model."""
        return self.model.fetches()

    def prepare(self, execution: Execution) -> None:
        """Loads the model."""
        self.clip = self.model.load(execution)

    def disk(self, shards: list[Shard]) -> float | None:
        """Vectors, and some hundred bytes of metadata each."""
        rows, each = count_samples(shards), 2 * self.clip.dimension * len(self.modalities()) + 200
        return None if rows is None else each * rows

    def write(self, shard: Shard, vectors: list[np.ndarray], metadata: pa.Table) -> None:
        """Writes a shard's vectors [n, d], one array per modality, and its metadata."""
        *paths, metadata_path = self.artifacts([shard])
        for path, found in zip(paths, vectors, strict=True):
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, found)
        write_table(metadata_path, metadata)

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Notes the model beside the vectors, so that a search can refuse vectors of another model."""
        identity = self.model.identity()
        write_json(self.out / ORIGIN, {"model": identity})
        return {"model": identity["name"]}


@dataclass
class EmbedStage(_EmbeddingStage):
    """Embeds a pool or task data.

    Attributes:
        modality: ``image``, ``text`` or ``both``; samples that lack one are rejected.
        require_text: rejects images without a text even if texts are not embedded, as a pool needs them.
    """

    source: Source
    modality: str = "image"
    require_text: bool = False
    shard_inputs = "inputs"

    def modalities(self) -> list[str]:
        """What there are vectors of."""
        return ["image", "text"] if self.modality == "both" else [self.modality]

    def config(self) -> dict[str, Any]:
        """Model, weights, modality and inputs; batch size and device are free to change."""
        return {
            "model": self.model.identity(),
            "precision": self.model.precision,
            "images": self.modality != "text",
            "texts": self.modality != "image",
            "require_text": self.require_text or self.modality != "image",
            "inputs": self.source.fingerprint(),
        }

    def input_digest(self, shard: Shard) -> str | None:
        """Content of what is embedded."""
        return self.source.content(shard)

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Embeds a shard."""
        import pyarrow as pa

        outcome = Outcome()
        rows: list[dict[str, Any]] = []
        found: dict[str, list[np.ndarray]] = {modality: [] for modality in self.modalities()}
        for batch in load_batches(
            self.source.read(shard),
            self._decode,
            execution.batch_size,
            execution.workers,
            reject=lambda sample, reason: outcome.reject(sample.id, str(reason)),
        ):
            if "image" in found:
                found["image"].append(as_fp16(self.clip.images([pixels for _, (_, pixels) in batch])))
            if "text" in found:
                found["text"].append(as_fp16(self.clip.texts([sample.text or "" for sample, _ in batch])))
            rows += [_described(sample, sha256) for sample, (sha256, _) in batch]
            advance(len(batch))
        outcome.samples = len(rows) + len(outcome.rejects)
        vectors = [np.concatenate(parts or [np.zeros((0, 0), np.float16)]) for parts in found.values()]
        keep = np.logical_and.reduce([np.isfinite(array).all(axis=1) for array in vectors])
        for row in compress(rows, ~keep):
            outcome.reject(row["id"], "its embedding is not finite")
        outcome.kept = int(keep.sum())
        kinds = [pa.int64() if name in ("offset", "size") else pa.string() for name in _COLUMNS]
        schema = pa.schema(list(zip(_COLUMNS, kinds, strict=True)))
        metadata = pa.Table.from_pylist(list(compress(rows, keep)), schema)
        self.write(shard, [array[keep] for array in vectors], metadata)
        return outcome

    def _decode(self, sample: RawSample) -> tuple[str, torch.Tensor]:
        """SHA-256 of a sample's image and its preprocessed pixels [3, H, W].

        Raises:
            ValueError: with the reason to reject it.
        """
        if sample.image is None or sample.problem:
            raise ValueError(sample.problem or "has no image")
        if (self.require_text or self.modality != "image") and not (sample.text or "").strip():
            raise ValueError("has no text")
        return hashlib.sha256(sample.image).hexdigest(), self.clip.preprocess(decode_image(sample.image))


def _described(sample: RawSample, sha256: str) -> dict[str, Any]:
    """A sample as a row of the metadata."""
    key, name, tar, ext = map(utf8, (sample.key, sample.id, sample.tar, sample.ext))
    values = (key, sample.text, name, tar, ext, sample.offset, sample.size, sha256)
    return dict(zip(_COLUMNS, values, strict=True))


@dataclass(frozen=True)
class CaptionTexts:
    """The captions of an anchor set, or of its folder of captions; each is a query of its sample's id."""

    anchors: Path

    def files(self) -> list[Path]:
        """The parquet files.

        Raises:
            AnchorSetError: if there is none, or if they are not all there.
        """
        folder = self.anchors
        if (self.anchors / "captions").is_dir():
            folder = self.anchors / "captions"
            if problems := problems_of(str(self.anchors), ["captions"]):
                raise AnchorSetError(f"{self.anchors}: {problems[0]}")
        files = list_files(folder, ".parquet")
        if not files:
            raise AnchorSetError(
                f"{folder} has no *.parquet. Expected an anchor set with captions, as written by: arf caption"
            )
        return files

    def shards(self) -> list[Shard]:
        """One shard per parquet file."""
        counts = [(path, count_rows(path, AnchorSetError)) for path in self.files()]
        return [Shard.counted(i, path, count) for i, (path, count) in enumerate(counts)]

    def read(self, shard: Shard) -> list[tuple[str, list[str]]]:
        """The captions of a file, in order: the id of each query, and its only text."""
        table = read_columns(shard.source, {"id": TEXT, "caption": TEXT}, AnchorSetError, ("id", "caption"))
        rows = table.to_pylist()
        return [(row["id"], [row["caption"]]) for row in rows if row["id"] and row["caption"]]

    def fingerprint(self) -> list[Any]:
        """Names and contents of the files, as JSON."""
        return [[path.name, file_digest(path)] for path in self.files()]


@dataclass(frozen=True)
class PromptTexts:
    """One query per class: the class name in all templates, as in zero-shot classification.

    Both are files with one name or template per line, or ``imagenet``.
    """

    classnames: str
    templates: str

    def shards(self) -> list[Shard]:
        """A single shard: there are few classes."""
        return [Shard.counted(0, None, len(self._prompts.classnames))]

    def read(self, shard: Shard) -> list[tuple[str, list[str]]]:
        """The classes in order: name, and its texts."""
        names, templates = self._prompts.classnames, self._prompts.templates
        return [(name, [template.replace("{c}", name) for template in templates]) for name in names]

    def fingerprint(self) -> list[Any]:
        """The names and templates themselves, as JSON."""
        return [self._prompts.classnames, self._prompts.templates]

    @cached_property
    def _prompts(self) -> Any:
        from arf_plugin.data.prompts import load_prompts

        return load_prompts(self.classnames, self.templates)


@dataclass
class EmbedTextsStage(_EmbeddingStage):
    """Embeds text queries; the vector of a query is the mean of its texts' unit vectors, made a unit vector again."""

    source: CaptionTexts | PromptTexts
    unit = "queries"

    def config(self) -> dict[str, Any]:
        """Model, weights and texts."""
        return {
            "model": self.model.identity(),
            "precision": self.model.precision,
            "texts": digest(self.source.fingerprint()),
        }

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Embeds a shard."""
        import pyarrow as pa

        queries = self.source.read(shard)
        texts = [text for _, of_query in queries for text in of_query]
        starts = range(0, len(texts), execution.batch_size)
        parts = [as_fp16(self.clip.texts(texts[start : start + execution.batch_size])) for start in starts]
        vectors = np.concatenate(parts or [np.zeros((0, 0), np.float16)])
        ends = np.cumsum([len(of_query) for _, of_query in queries], dtype=np.int64)
        means = [part.astype(np.float32).mean(axis=0) for part in np.split(vectors, ends)[:-1]]
        unit = np.array([mean / np.linalg.norm(mean) for mean in means], np.float16).reshape(len(queries), -1)
        ids = pa.array([query for query, _ in queries], pa.string())
        captions = pa.array([of_query[0] for _, of_query in queries], pa.string())
        self.write(shard, [unit], pa.table({"image_path": ids, "caption": captions, "id": ids}))
        advance(len(queries))
        return Outcome(samples=len(queries), kept=len(queries))
