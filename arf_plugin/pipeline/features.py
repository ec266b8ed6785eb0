"""Stage features: what the model to be fine-tuned gives an anchor set's pairs and captions, before it is fine-tuned.

It needs the anchor set alone, however that was made. Where pairs or captions have changed since, the same command does
those files again, and keeps the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.anchors.captions import caption_batches, list_caption_files
from arf_plugin.anchors.features import (
    CAPTIONS,
    FOLDER,
    HEADER,
    Embedded,
    FeatureHeader,
    PairFeatures,
    join_caption_parts,
    pair_file,
    weights_digest,
    write_caption_part,
    write_header,
    write_pair_features,
)
from arf_plugin.anchors.images import decode_image
from arf_plugin.anchors.manifest import problems_of, update_manifest
from arf_plugin.anchors.pairs import RawPair, list_pair_shards, read_pairs
from arf_plugin.anchors.scan import cached_scan
from arf_plugin.anchors.tars import local_path
from arf_plugin.errors import AnchorSetError
from arf_plugin.files import content_digest, digest, list_files, remove_incomplete
from arf_plugin.images import load_batches
from arf_plugin.pipeline.embedder import ClipModel, LoadedClip, as_fp16, load_model
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import count_rows
from arf_plugin.untrusted import require_regular, utf8

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _File:
    """A file of the anchor set, of ``pairs`` or ``captions``."""

    kind: str
    path: Path


@dataclass
class FeaturesStage(Stage):
    """Writes ``ANCHORS/features/``; see :mod:`arf_plugin.anchors.features`.

    Attributes:
        model: the model to be fine-tuned, with the weights that fine-tuning starts from.
    """

    model: ClipModel
    name = "features"
    unit = "pairs and captions"
    redo_changed = True
    _clip: LoadedClip | None = field(default=None, init=False, repr=False)

    def config(self) -> dict[str, Any]:
        """Model, weights and precision; inputs may change."""
        return {"model": self.model.identity(), "precision": self.model.precision}

    def plan(self) -> list[Shard]:
        """One shard per tar of pairs and per file of captions.

        Raises:
            AnchorSetError: the set is not finished, or holds neither.
        """
        anchors = str(self.out)
        if problems := problems_of(anchors):
            raise AnchorSetError(f"{anchors}: {problems[0]}")
        paths = [("pairs", local_path(url)) for url in list_pair_shards(anchors)]
        paths += [("captions", Path(name)) for name in list_caption_files(anchors)[1]]
        if not paths:
            raise AnchorSetError(
                f"{anchors} holds no pairs/*.tar and no captions/*.parquet. Expected an anchor set, as made by: "
                "arf anchors"
            )
        return [_shard(index, kind, path) for index, (kind, path) in enumerate(paths)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One parquet file per shard; those of captions are joined at the end."""
        return [
            self._part(one.path) if one.kind == "captions" else pair_file(self.out, one.path)
            for one in (shard.source for shard in shards)
        ]

    def _part(self, path: Path) -> Path:
        return self.out / FOLDER / "parts" / path.name

    def input_digest(self, shard: Shard) -> str:
        """Content of the file."""
        return content_digest([shard.source.path])

    def prepare(self, execution: Execution) -> None:
        """Loads the model."""
        self._clip = self.model.load(execution)

    def begin(self) -> None:
        """Removes the header: the features are not whole."""
        (self.out / FOLDER / HEADER).unlink(missing_ok=True)

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Writes the features of a file."""
        process = self._pairs if shard.source.kind == "pairs" else self._captions
        return process(shard.source.path, self._loaded(execution), execution, advance)

    def _pairs(
        self, path: Path, clip: LoadedClip, execution: Execution, advance: Callable[[int], object]
    ) -> Outcome:
        def decode(pair: RawPair) -> tuple[torch.Tensor, str]:
            return clip.preprocess(decode_image(pair.image)), pair.text.decode("utf-8")

        outcome = Outcome()
        keys: list[str] = []
        images, texts = _Vectors(clip), _Vectors(clip)
        for batch in load_batches(
            read_pairs(str(path)),
            decode,
            execution.batch_size,
            execution.workers,
            reject=lambda pair, reason: outcome.reject(f"{path.stem}/{pair.key}", str(reason)),
        ):
            image = as_fp16(clip.images([pixels for _, (pixels, _) in batch]))
            text = as_fp16(clip.texts([text for _, (_, text) in batch]))
            good = np.isfinite(image).all(axis=1) & np.isfinite(text).all(axis=1)
            for (pair, _), is_good in zip(batch, good, strict=True):
                if is_good:
                    keys.append(utf8(pair.key))
                else:
                    outcome.reject(f"{path.stem}/{pair.key}", "its features are not finite")
            images.add(image[good])
            texts.add(text[good])
            advance(len(batch))
        if len(set(keys)) < len(keys):
            double = next(key for key in keys if keys.count(key) > 1)
            raise AnchorSetError(
                f"{path} has the key {double!r} more than once. Expected each key once; pack the pairs again."
            )
        outcome.kept, outcome.samples = len(keys), len(keys) + len(outcome.rejects)
        write_pair_features(self.out, path, PairFeatures(keys, images.all(), texts.all()))
        return outcome

    def _captions(
        self, path: Path, clip: LoadedClip, execution: Execution, advance: Callable[[int], object]
    ) -> Outcome:
        import fsspec
        import pyarrow as pa

        tables, vectors = [], _Vectors(clip)
        for table in caption_batches(fsspec.filesystem("file"), str(path)):
            tables.append(table["id"])
            captions = table["caption"].to_pylist()
            for start in range(0, len(captions), execution.batch_size):
                texts = captions[start : start + execution.batch_size]
                vectors.add(found := as_fp16(clip.texts(texts)))
                if not np.isfinite(found).all():
                    bad = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
                    raise AnchorSetError(
                        f"{path}: the features of the caption {texts[bad][:80]!r} are not finite. Use another "
                        "--precision, or remove the caption."
                    )
                advance(len(texts))
        ids = pa.chunked_array([chunk for ids in tables for chunk in ids.chunks], pa.large_string())
        write_caption_part(self._part(path), ids, vectors.all())
        return Outcome(samples=len(ids), kept=len(ids))

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Removes features of files that are gone, and writes the header."""
        import open_clip
        import pyarrow.parquet as pq
        import torch

        clip = self._loaded(execution)
        model = clip.model
        if clip.dtype != torch.float32:  # weights are known by their digest in the precision of training
            model = load_model(self.model.name, self.model.pretrained, torch.device("cpu"), torch.float32)[0]
        artifacts = self.artifacts(shards)
        embedded: dict[str, dict[str, Embedded]] = {"pairs": {}, "captions": {}}
        for shard, path in zip(shards, artifacts, strict=True):
            source: _File = shard.source
            embedded[source.kind][utf8(source.path.name)] = Embedded(
                bytes=source.path.stat().st_size,
                sha256=self.input_digest(shard),
                rows=int(pq.read_metadata(path).num_rows),
            )
        remove_incomplete(self.out / FOLDER)
        for folder in (self.out / FOLDER / "pairs", self.out / FOLDER / "parts"):
            for path in set(list_files(folder, ".parquet")) - set(artifacts):
                path.unlink()
        parts = [
            path for shard, path in zip(shards, artifacts, strict=True) if shard.source.kind == "captions"
        ]
        if parts:
            join_caption_parts(self.out, parts)
        else:
            (self.out / FOLDER / CAPTIONS).unlink(missing_ok=True)
        header = FeatureHeader(
            model=self.model.identity()["name"],
            weights_sha256=weights_digest(model.state_dict()),
            precision=str(clip.dtype).removeprefix("torch."),
            preprocessing=json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model))),
            dim=_dim(clip),
            pairs=embedded["pairs"],
            captions=embedded["captions"],
        )
        write_header(self.out, header)
        summary = {kind: header.rows(kind) for kind in embedded}
        entry = {"model": header.model, "weights_sha256": header.weights_sha256, "dim": header.dim}
        update_manifest(self.out, FOLDER, entry | summary)
        return {"model": header.model, "weights_sha256": header.weights_sha256} | summary

    def _loaded(self, execution: Execution) -> LoadedClip:
        """The model; it is loaded for the header alone where nothing else was left to do."""
        if self._clip is None:
            self.prepare(execution)
        assert self._clip is not None
        return self._clip


class _Vectors:
    """Vectors [n, D] that come in parts."""

    def __init__(self, clip: LoadedClip) -> None:
        self._parts = [np.zeros((0, _dim(clip)), np.float16)]

    def add(self, vectors: np.ndarray) -> None:
        """Adds [n, D] at the end."""
        self._parts.append(vectors)

    def all(self) -> np.ndarray:
        """All of them."""
        return np.concatenate(self._parts)


def _shard(index: int, kind: str, path: Path) -> Shard:
    require_regular(path, AnchorSetError)
    if kind == "captions":
        samples: int | None = count_rows(path, AnchorSetError)
    else:
        scan = cached_scan(str(path))
        samples = len(scan.keys) if scan else None
    name = f"{kind}-{digest(utf8(path.name))[:20]}"  # stays where other files come and go
    return Shard(index, name, _File(kind, path), float(path.stat().st_size), samples)


def _dim(clip: LoadedClip) -> int:
    """D."""
    return int(clip.texts(["a"]).shape[1])
