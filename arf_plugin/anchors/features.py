"""``ANCHORS/features/``: what the starting model gives the set's pairs and captions; the format, read and written.

::

    features/features.json           model, digest of its weights, preprocessing, dtype, D, and what was embedded
    features/pairs/NAME.parquet      of pairs/NAME.tar: key, image [D], text [D]
    features/captions/NAME.parquet   of captions/NAME.parquet: id, index of the caption within its id, text [D]

Vectors are float16 of unit norm, images preprocessed as for evaluation. The header is written last and removed first,
so features without one are not finished. It notes size and SHA-256 of each file that was embedded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, JsonValue

from arf_plugin.anchors.captions import is_local
from arf_plugin.errors import AnchorSetError
from arf_plugin.files import list_files_of, replacing, write_json
from arf_plugin.untrusted import parse_json, printable, require_regular
from arf_plugin.validation import Strict, validated

FOLDER, HEADER = "features", "features.json"
AGAIN = "Write them again with: arf features ANCHORS --model ... --pretrained ... --restart"
_BATCH = 1 << 14  # rows
_TOLERANCE = 0.01  # of a norm; float16 rounds it by 0.0005 at most
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_NO_PART = re.compile(r"(^|\.)logit_(scale|bias)$")  # of what features depend on
_Rows = dict[str, pa.DataType]


class Embedded(Strict):
    """A file of the anchor set, as it was when it was embedded, and the number of rows that it has got."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)


class FeatureHeader(Strict):
    """``features/features.json``.

    Attributes:
        format_version: of these files.
        model: name of the open_clip model, as it was given.
        weights_sha256: digest of its weights; see `weights_digest`.
        precision: what it computed in.
        preprocessing: open_clip's settings of the evaluation transform.
        dtype: of the vectors.
        dim: D.
        pairs, captions: what was embedded, by file name.
    """

    format_version: Literal[1] = 1
    model: str
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    precision: str
    preprocessing: dict[str, JsonValue]
    dtype: Literal["float16"] = "float16"
    dim: int = Field(ge=1, le=1 << 16)
    pairs: dict[str, Embedded]
    captions: dict[str, Embedded]

    def rows(self, kind: str) -> int:
        """Number of pairs or captions that have features."""
        return sum(one.rows for one in getattr(self, kind).values())


@dataclass(frozen=True)
class PairFeatures:
    """Features of a pair tar: keys as `arf_plugin.untrusted.utf8` writes them; image and text float16 [n, D]."""

    keys: list[str]
    image: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class CaptionFeatures:
    """Features of all captions, sorted by (id, index): ids large_string [n], index int16 [n], text float16 [n, D]."""

    ids: pa.Array
    index: np.ndarray
    text: np.ndarray


def read_header(anchors: Path | str) -> FeatureHeader | None:
    """Reads the header; None if the set has no features.

    Raises:
        AnchorSetError: it is broken or missing, or of a format that this version does not know.
    """
    import fsspec

    where = f"{anchors}/{FOLDER}/{HEADER}"
    try:
        fs, root = fsspec.core.url_to_fs(str(anchors))
        path = f"{root.rstrip('/')}/{FOLDER}/{HEADER}"
        if not fs.exists(path):
            kinds = ("pairs", "captions")
            if any(list_files_of(str(anchors), f"{FOLDER}/{kind}", ".parquet")[1] for kind in kinds):
                raise AnchorSetError(
                    f"{where} does not exist, though there are features beside it: they are not finished. Run the same "
                    "arf command (features, or anchors) again, to its end, or remove the folder."
                )
            return None
        if is_local(fs):
            require_regular(Path(path), AnchorSetError)
        content = fs.cat_file(path)
    except (OSError, ValueError, ImportError) as cause:
        raise AnchorSetError(f"{where} cannot be read: {printable(str(cause))[:200]}.") from cause
    return validated(
        FeatureHeader, parse_json(content, where, AnchorSetError, dict, AGAIN), where, AnchorSetError, AGAIN
    )


def pair_features(
    anchors: Path | str, shard: Path | str, header: FeatureHeader | None = None
) -> PairFeatures:
    """Features of one pair tar.

    Args:
        anchors: folder or fsspec URL of the set.
        shard: path or URL of the tar; its name counts.
        header: the set's, if it has been read.

    Raises:
        AnchorSetError: there are none, or they are not what the header says: D, unit norm, a row per key.
    """
    header = header or _header(anchors)
    name = _stem(shard, ".tar")
    vector = pa.list_(pa.float16(), header.dim)
    table = _read(anchors, "pairs", name, {"key": pa.string(), "image": vector, "text": vector})
    keys = table["key"].to_pylist()
    if len(set(keys)) < len(keys):
        double = next(key for key in keys if keys.count(key) > 1)
        raise AnchorSetError(
            f"{FOLDER}/pairs/{name}.parquet has the key {double!r} more than once; expected a row per pair. {AGAIN}"
        )
    return PairFeatures(keys, _vectors(table["image"], header.dim), _vectors(table["text"], header.dim))


def caption_features(anchors: Path | str, header: FeatureHeader | None = None) -> CaptionFeatures:
    """Features of all captions.

    Raises:
        AnchorSetError: there are none, or they are not what the header says.
    """
    header = header or _header(anchors)
    vector = pa.list_(pa.float16(), header.dim)
    kinds = {"id": pa.large_string(), "index": pa.int16(), "text": vector}
    schema = pa.schema(list(kinds.items()))
    tables = [_read(anchors, "captions", _stem(name, ".parquet"), kinds) for name in sorted(header.captions)]
    table = pa.concat_tables([schema.empty_table(), *tables])
    table = table.sort_by([("id", "ascending"), ("index", "ascending")]).combine_chunks()
    index = table["index"].to_numpy()
    same = np.asarray(pc.equal(table["id"][1:], table["id"][:-1]))
    if bool(np.any(same & (index[1:] == index[:-1]))):
        raise AnchorSetError(f"{FOLDER}/captions has a caption of an id more than once. {AGAIN}")
    return CaptionFeatures(
        table["id"].combine_chunks() if len(table) else pa.array([], pa.large_string()),
        index,
        _vectors(table["text"], header.dim),
    )


def weights_digest(state_dict: Mapping[str, Any]) -> str:
    """SHA-256 of a model's weights: name, dtype, shape and bytes of each, by name.

    It is the same on every device and within DDP, FSDP and torch.compile, whose prefixes are no part of a name.
    ``logit_scale`` and ``logit_bias``, which no feature depends on, are left out.

    Args:
        state_dict: of an open_clip model; whole tensors.
    """
    import torch

    sha = hashlib.sha256()
    named = {_WRAPPERS.sub("", name).lstrip("."): value for name, value in state_dict.items()}
    for name in sorted(named):
        value = named[name]
        if not isinstance(value, torch.Tensor) or _NO_PART.search(name):
            continue
        sha.update(f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}\n".encode())
        # Bytes that numpy has no type for, those of bfloat16, are bytes nevertheless.
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write_header(anchors: Path, header: FeatureHeader) -> None:
    """Writes the header: the features are finished."""
    write_json(anchors / FOLDER / HEADER, header.model_dump())


def pair_file(anchors: Path, shard: Path | str) -> Path:
    """The file with the features of a pair tar."""
    return anchors / FOLDER / "pairs" / f"{_stem(shard, '.tar')}.parquet"


def caption_file(anchors: Path, file: Path | str) -> Path:
    """The file with the features of a caption file."""
    return anchors / FOLDER / "captions" / f"{_stem(file, '.parquet')}.parquet"


def write_pair_features(anchors: Path, shard: Path | str, features: PairFeatures) -> None:
    """Writes the features of a pair tar."""
    columns = {"key": pa.array(features.keys, pa.string())}
    columns |= {"image": _list_array(features.image), "text": _list_array(features.text)}
    _write(pair_file(anchors, shard), columns)


def write_caption_features(
    anchors: Path, file: Path | str, ids: Sequence[str] | pa.Array, index: np.ndarray, text: np.ndarray
) -> None:
    """Writes the features of a caption file: ids [n], index of each caption within its id [n], vectors [n, D]."""
    columns = {"id": pa.array(ids, pa.string()), "index": pa.array(index, pa.int16())}
    _write(caption_file(anchors, file), columns | {"text": _list_array(text)})


def _write(path: Path, columns: Mapping[str, pa.Array]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        # Vectors hardly shrink, and are read again and again.
        pq.write_table(pa.table(dict(columns)), file, compression="none", use_dictionary=False)


def _list_array(vectors: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _header(anchors: Path | str) -> FeatureHeader:
    header = read_header(anchors)
    if header is None:
        raise AnchorSetError(
            f"{anchors} has no features of its pairs and captions. Write them with: arf features {anchors} --model ..."
        )
    return header


def _stem(name: Path | str, suffix: str) -> str:
    """The name of a file, or of a URL's, without its suffix."""
    return str(name).rsplit("/", 1)[-1].removesuffix(suffix)


def _read(anchors: Path | str, kind: str, name: str, columns: _Rows) -> pa.Table:
    """Reads a file of features, every value of it checked.

    Raises:
        AnchorSetError: it is missing or damaged, or holds something else.
    """
    import fsspec

    short = f"{FOLDER}/{kind}/{name}.parquet"
    schema = pa.schema(list(columns.items()))
    batches = []
    try:
        fs, root = fsspec.core.url_to_fs(str(anchors))
        path = f"{root.rstrip('/')}/{short}"
        if is_local(fs):
            require_regular(Path(path), AnchorSetError)
        with fs.open(path, "rb") as stream:
            file = pq.ParquetFile(stream)
            found = file.schema_arrow
            if found.names != schema.names:
                raise AnchorSetError(
                    f"{short} has the columns {printable(', '.join(found.names))[:200]}; expected "
                    f"{', '.join(schema.names)}. {AGAIN}"
                )
            for batch in file.iter_batches(_BATCH):
                batches.append(_checked(batch, schema, short))
    except FileNotFoundError:
        raise AnchorSetError(f"{anchors}/{short} does not exist. {AGAIN}") from None
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as cause:
        reason = printable(" ".join(str(cause).split()))[:300] or type(cause).__name__
        raise AnchorSetError(f"{short} is no readable parquet file: {reason}. {AGAIN}") from cause
    return pa.Table.from_batches(batches, schema)


def _checked(batch: pa.RecordBatch, schema: pa.Schema, short: str) -> pa.RecordBatch:
    columns = []
    for field in schema:
        column = batch.column(field.name)
        is_vector = pa.types.is_fixed_size_list(field.type)
        if column.type != field.type and (is_vector or column.type not in (pa.string(), pa.large_string())):
            raise AnchorSetError(
                f"{short}, column {field.name!r} holds {printable(str(column.type))[:80]}; expected {field.type}, as "
                f"{HEADER} says. {AGAIN}"
            )
        column = column.cast(field.type)
        column.validate(full=True)
        if column.null_count or (is_vector and column.flatten().null_count):
            raise AnchorSetError(f"{short}, column {field.name!r} has gaps. {AGAIN}")
        if is_vector:
            vectors = _matrix(column, field.type.list_size).astype(np.float32)
            norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
            wrong = np.flatnonzero(~(np.abs(norms - 1) <= _TOLERANCE))
            if len(wrong):
                raise AnchorSetError(
                    f"{short}, column {field.name!r} has a vector of norm {norms[wrong[0]]:g}; expected unit vectors. "
                    f"{AGAIN}"
                )
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _vectors(column: pa.ChunkedArray, dim: int) -> np.ndarray:
    """float16 [n, D] of a column."""
    parts = [_matrix(chunk, dim) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros((0, dim), np.float16)


def _matrix(column: pa.Array, dim: int) -> np.ndarray:
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, dim)
