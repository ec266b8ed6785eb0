"""Stage embed for texts: captions of the task data, or one prompt per class, as queries of the stage retrieve.

Writes an embedding folder as :mod:`arf_plugin.pipeline.embed` does, with ``text_emb/`` alone. The paper searches by
image (section 3.3); searching by text is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from arf_plugin.anchors.files import digest, file_digest, list_files, replacing, write_json
from arf_plugin.anchors.manifest import problems_of
from arf_plugin.errors import AnchorSetError
from arf_plugin.pipeline.device import pick_device, pick_dtype
from arf_plugin.pipeline.embedder import load_model, model_identity, unit_fp16
from arf_plugin.pipeline.embeddings import ORIGIN
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import TEXT, count_rows, read_columns


@dataclass(frozen=True, slots=True)
class TextQuery:
    """One query: its vector is the mean of its texts' unit vectors, made a unit vector again.

    Attributes:
        id: sample id of a caption, or the name of a class.
        texts: one caption, or a class name in all templates.
    """

    id: str
    texts: list[str]


class TextSource(Protocol):
    """Texts in shards."""

    def shards(self) -> list[Shard]:
        """Returns the shards in order."""

    def read(self, shard: Shard) -> list[TextQuery]:
        """Returns a shard's queries in order."""

    def fingerprint(self) -> list[Any]:
        """Returns what changes when the texts change, as JSON."""


@dataclass(frozen=True)
class CaptionTexts:
    """The captions of an anchor set; each is a query of its own.

    Attributes:
        anchors: the anchor set, or its folder of captions.
    """

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
        counts = [count_rows(path, AnchorSetError) for path in self.files()]
        return [
            Shard(i, f"{i:05d}", path, count, count)
            for i, (path, count) in enumerate(zip(self.files(), counts, strict=True))
        ]

    def read(self, shard: Shard) -> list[TextQuery]:
        """The captions of a file."""
        table = read_columns(shard.source, {"id": TEXT, "caption": TEXT}, AnchorSetError, ("id", "caption"))
        rows = table.to_pylist()
        return [TextQuery(row["id"], [row["caption"]]) for row in rows if row["id"] and row["caption"]]

    def fingerprint(self) -> list[Any]:
        """Names and contents of the files."""
        return [[path.name, file_digest(path)] for path in self.files()]


@dataclass(frozen=True)
class PromptTexts:
    """One query per class: the class name in all templates, as in zero-shot classification.

    Attributes:
        classnames: a file with one name per line, or ``imagenet``.
        templates: a file with one template per line, or ``imagenet``.
    """

    classnames: str
    templates: str

    def shards(self) -> list[Shard]:
        """A single shard: there are few classes."""
        count = len(self._prompts().classnames)
        return [Shard(0, "00000", None, count, count)]

    def read(self, shard: Shard) -> list[TextQuery]:
        """The classes in order."""
        prompts = self._prompts()
        return [
            TextQuery(name, [template.replace("{c}", name) for template in prompts.templates])
            for name in prompts.classnames
        ]

    def fingerprint(self) -> list[Any]:
        """The names and templates themselves."""
        prompts = self._prompts()
        return [prompts.classnames, prompts.templates]

    def _prompts(self) -> Any:
        from arf_plugin.data.prompts import load_prompts

        return load_prompts(self.classnames, self.templates)


class EmbedTextsStage(Stage):
    """Embeds text queries.

    Args:
        out: the embedding folder.
        source: the texts.
        model, pretrained: as of :class:`arf_plugin.pipeline.embed.EmbedStage`.
        batch_size: texts per batch.
        device, precision: see :mod:`arf_plugin.pipeline.device`.
        rank: this process's rank, which picks its GPU.
    """

    name = "embed"
    unit = "queries"

    def __init__(
        self,
        out: Path,
        source: TextSource,
        model: str,
        pretrained: str | None = None,
        *,
        batch_size: int = 256,
        device: str = "auto",
        precision: str = "auto",
        rank: int = 0,
    ) -> None:
        super().__init__(out)
        self._source, self._model_name, self._pretrained = source, model, pretrained
        self._batch_size, self._device_name, self._precision, self._rank = batch_size, device, precision, rank

    def config(self) -> dict[str, Any]:
        """Model, weights and texts."""
        return {
            "model": model_identity(self._model_name, self._pretrained),
            "precision": self._precision,
            "texts": digest(self._source.fingerprint()),
        }

    def plan(self) -> list[Shard]:
        """One shard per shard of the source."""
        return self._source.shards()

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """Vectors and metadata of each shard."""
        return [
            path
            for shard in shards
            for path in (
                self.out / "text_emb" / f"text_emb_{shard.name}.npy",
                self.out / "metadata" / f"metadata_{shard.name}.parquet",
            )
        ]

    def prepare(self) -> None:
        """Loads the model."""
        self._device = pick_device(self._device_name, self._rank)
        dtype = pick_dtype(self._precision, self._device)
        self._model, _, self._tokenizer = load_model(self._model_name, self._pretrained, self._device, dtype)

    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Embeds a shard."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        queries = self._source.read(shard)
        texts = [text for query in queries for text in query.texts]
        vectors = self._embed(texts)
        ends = np.cumsum([len(query.texts) for query in queries], dtype=np.int64)
        means = [part.astype(np.float32).mean(axis=0) for part in np.split(vectors, ends)[:-1]]
        unit = np.array([mean / np.linalg.norm(mean) for mean in means], np.float16).reshape(len(queries), -1)
        vector_path, metadata_path = self.artifacts([shard])
        with replacing(vector_path) as temporary, temporary.open("wb") as file:
            np.save(file, unit)
        ids = pa.array([query.id for query in queries], pa.string())
        captions = pa.array([query.texts[0] for query in queries], pa.string())
        with replacing(metadata_path) as temporary:
            table = pa.table({"image_path": ids, "caption": captions, "id": ids})
            pq.write_table(table, temporary, compression="zstd")
        advance(len(queries))
        return Outcome(samples=len(queries), kept=len(queries))

    def finalize(self, shards: list[Shard]) -> dict[str, Any]:
        """Notes the model beside the vectors, so that a search can refuse vectors of another model."""
        identity = model_identity(self._model_name, self._pretrained)
        write_json(self.out / ORIGIN, {"model": identity, "config_digest": digest(self.config())})
        return {"model": identity["name"]}

    def _embed(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [n, d] of texts."""
        import torch

        parts = []
        for start in range(0, len(texts), self._batch_size):
            tokens = self._tokenizer(texts[start : start + self._batch_size]).to(self._device)
            with torch.inference_mode():
                parts.append(unit_fp16(self._model.encode_text(tokens)))
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float16)
