"""Stage features: what the model to be fine-tuned gives an anchor set's pairs and captions, before it is fine-tuned.

It needs the anchor set alone, however that was made. Where pairs or captions have changed since, the same command does
those files again, and keeps the rest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arf_plugin.anchors import features as stored
from arf_plugin.anchors.captions import caption_batches, list_caption_files
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


@dataclass
class FeaturesStage(Stage):
    """Writes ``ANCHORS/features/``; see :mod:`arf_plugin.anchors.features`. A shard's source is a file of the set.

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
        paths = [local_path(url) for url in list_pair_shards(anchors)]
        paths += map(Path, list_caption_files(anchors)[1])
        if not paths:
            raise AnchorSetError(
                f"{anchors} holds no pairs/*.tar and no captions/*.parquet. Expected an anchor set, as made by: "
                "arf anchors"
            )
        return [_shard(index, path) for index, path in enumerate(paths)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One parquet file per shard; those of captions are joined at the end."""
        parts = self.out / stored.FOLDER / "parts"
        paths = [shard.source for shard in shards]
        return [
            stored.pair_file(self.out, path) if _kind(path) == "pairs" else parts / path.name
            for path in paths
        ]

    def input_digest(self, shard: Shard) -> str:
        """Content of the file."""
        return content_digest([shard.source])

    def fetches(self) -> str | None:
        """The model."""
        return self.model.fetches()

    def prepare(self, execution: Execution) -> None:
        """Loads the model."""
        self._clip = self.model.load(execution)

    def begin(self) -> None:
        """Removes the header: the features are not whole."""
        (self.out / stored.FOLDER / stored.HEADER).unlink(missing_ok=True)

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Writes the features of a file."""
        process = self._pairs if _kind(shard.source) == "pairs" else self._captions
        return process(shard, execution, advance)

    def _pairs(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        path, clip = shard.source, self._loaded(execution)

        def decode(pair: RawPair) -> tuple[torch.Tensor, str]:
            return clip.preprocess(decode_image(pair.image)), pair.text.decode("utf-8")

        outcome = Outcome()
        keys: list[str] = []
        images, texts = [_no_vectors(clip)], [_no_vectors(clip)]
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
            images.append(image[good])
            texts.append(text[good])
            advance(len(batch))
        key, count = Counter(keys).most_common(1)[0] if keys else ("", 0)
        if count > 1:
            raise AnchorSetError(
                f"{path} has the key {key!r} more than once. Expected each key once; pack the pairs again."
            )
        outcome.kept, outcome.samples = len(keys), len(keys) + len(outcome.rejects)
        features = stored.PairFeatures(keys, np.concatenate(images), np.concatenate(texts))
        stored.write_pair_features(self.out, path, features)
        return outcome

    def _captions(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        path, clip = shard.source, self._loaded(execution)
        ids, vectors = [], [_no_vectors(clip)]
        for table in caption_batches(fsspec.filesystem("file"), str(path)):
            ids += table["id"].chunks
            captions = table["caption"].to_pylist()
            for start in range(0, len(captions), execution.batch_size):
                texts = captions[start : start + execution.batch_size]
                vectors.append(as_fp16(clip.texts(texts)))
                bad = np.flatnonzero(~np.isfinite(vectors[-1]).all(axis=1))
                if len(bad):
                    raise AnchorSetError(
                        f"{path}: the features of the caption {texts[bad[0]][:80]!r} are not finite. Use another "
                        "--precision, or remove the caption."
                    )
                advance(len(texts))
        column = pa.chunked_array(ids, pa.large_string())
        stored.write_caption_part(self.artifacts([shard])[0], column, np.concatenate(vectors))
        return Outcome(samples=len(column), kept=len(column))

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Removes features of files that are gone, and writes the header."""
        import open_clip
        import torch

        clip, folder, artifacts = self._loaded(execution), self.out / stored.FOLDER, self.artifacts(shards)
        model = clip.model
        if clip.dtype != torch.float32:  # weights are known by their digest in the precision of training
            model = load_model(self.model.name, self.model.pretrained, torch.device("cpu"), torch.float32)[0]
        embedded: dict[str, dict[str, stored.Embedded]] = {"pairs": {}, "captions": {}}
        for shard, path in zip(shards, artifacts, strict=True):
            embedded[_kind(shard.source)][utf8(shard.source.name)] = stored.Embedded(
                bytes=shard.source.stat().st_size,
                sha256=self.input_digest(shard),
                rows=int(pq.read_metadata(path).num_rows),
            )
        remove_incomplete(folder)
        for name in ("pairs", "parts"):
            for path in set(list_files(folder / name, ".parquet")) - set(artifacts):
                path.unlink()
        if embedded["captions"]:
            stored.join_caption_parts(self.out, [path for path in artifacts if path.parent.name == "parts"])
        else:
            (folder / stored.CAPTIONS).unlink(missing_ok=True)
        header = stored.FeatureHeader(
            model=self.model.identity()["name"],
            weights_sha256=stored.weights_digest(model.state_dict()),
            precision=str(clip.dtype).removeprefix("torch."),
            preprocessing=json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model))),
            dim=_no_vectors(clip).shape[1],
            pairs=embedded["pairs"],
            captions=embedded["captions"],
        )
        stored.write_header(self.out, header)
        summary: dict[str, Any] = {"model": header.model, "weights_sha256": header.weights_sha256}
        summary |= {kind: header.rows(kind) for kind in embedded}
        update_manifest(self.out, stored.FOLDER, summary | {"dim": header.dim})
        return summary

    def _loaded(self, execution: Execution) -> LoadedClip:
        """The model; it is loaded for the header alone where nothing else was left to do."""
        self._clip = self._clip or self.model.load(execution)
        return self._clip


def _shard(index: int, path: Path) -> Shard:
    require_regular(path, AnchorSetError)
    name = f"{_kind(path)}-{digest(utf8(path.name))[:20]}"  # stays where other files come and go
    if _kind(path) == "captions":
        return Shard(index, name, path, count_rows(path, AnchorSetError))
    scan = cached_scan(str(path))
    return Shard(index, name, path, len(scan.keys) if scan else None)


def _kind(path: Path) -> str:
    """What a file of the set holds."""
    return "pairs" if path.suffix == ".tar" else "captions"


def _no_vectors(clip: LoadedClip) -> np.ndarray:
    """float16 [0, D]."""
    return as_fp16(clip.texts(["a"]))[:0]
