"""``ANCHORS/features/``: what the starting model gives the set's pairs and captions; the format, read and written.

::

    features/features.json           model, digest of its weights, preprocessing, dtype, D, and what was embedded
    features/pairs/NAME.parquet      of pairs/NAME.tar: key, image [D], text [D]
    features/captions.parquet        of all captions, file by file, row by row: id, caption_index, text [D]
    features/parts/                  the same by caption file, for what is done again when one of them has changed

``caption_index`` counts the captions of an id. Vectors are float16 of unit norm, images preprocessed as for
evaluation. A pair that cannot be decoded has no row. The header is written last and removed first, so features without
one are not finished; it notes size and SHA-256 of each file that was embedded, so features of what has changed since
are known as such.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, JsonValue

from arf_plugin.anchors.manifest import KINDS
from arf_plugin.anchors.mapped import MappedTable, mapped_file
from arf_plugin.anchors.reading import file_stamp, is_local, opened_parquet, opened_set
from arf_plugin.anchors.text_columns import digests
from arf_plugin.errors import AnchorSetError
from arf_plugin.files import content_digest, digest, replacing, sizes_in, write_json
from arf_plugin.untrusted import parse_json, printable, require_regular, utf8
from arf_plugin.validation import Strict, validated

FOLDER, HEADER, CAPTIONS = "features", "features.json", "captions.parquet"
UPDATE = "Write them with: arf features ANCHORS --model ... --pretrained ..."
AGAIN = "Write them again, with: arf features ANCHORS --model ... --pretrained ... --restart"
_BATCH = 1 << 14  # rows
# Vectors hardly shrink, and are read again and again.
_FOR_VECTORS: dict[str, Any] = {"compression": "none", "use_dictionary": False}
_TOLERANCE = 0.01  # of a norm; float16 rounds it by 0.0005 at most
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_NO_PART = re.compile(r"(^|\.)logit_(scale|bias)$")  # of what features depend on


class Embedded(Strict):
    """A file of the anchor set as it was when it was embedded, and its number of rows of features."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)


class FeatureHeader(Strict):
    """``features/features.json``."""

    format_version: Literal[1] = 1
    model: str  # name of the open_clip model, as it was given
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # see `weights_digest`
    precision: str  # what it computed in
    preprocessing: dict[str, JsonValue]  # open_clip's settings of the evaluation transform
    dtype: Literal["float16"] = "float16"  # of the vectors
    dim: int = Field(ge=1, le=1 << 16)  # D
    pairs: dict[str, Embedded]  # what was embedded, by file name
    captions: dict[str, Embedded]

    def rows(self, kind: str) -> int:
        """Number of pairs or captions that have features."""
        return sum(one.rows for one in getattr(self, kind).values())


class PairFeatures(NamedTuple):
    """Features of a pair tar: keys as `arf_plugin.untrusted.utf8` writes them; image and text float16 [n, D]."""

    keys: list[str]
    image: np.ndarray
    text: np.ndarray


class CaptionFeatures(MappedTable):
    """Read-only features of all captions, memory-mapped, in the order of the set's files and their rows."""

    kind, column = "features", "text"

    def get(self, sample_id: str) -> np.ndarray:
        """float16 [k, D] of a sample's captions, in the order of the set's files and their rows."""
        found = [self._values[row].values.to_numpy() for row in self._rows(sample_id)]
        return np.stack(found) if found else np.zeros((0, self._values.type.list_size), np.float16)


def read_header(anchors: Path | str) -> FeatureHeader | None:
    """Reads the header; None if the set has no features.

    Raises:
        AnchorSetError: it is broken or missing, or of a format that this version does not know.
    """
    short = f"{FOLDER}/{HEADER}"
    where = f"{anchors}/{short}"
    with opened_set(anchors, short) as (fs, root):
        path = f"{root}/{short}"
        if not fs.exists(path):
            beside = f"{root}/{FOLDER}"
            if fs.exists(f"{beside}/{CAPTIONS}") or sizes_in(fs, f"{beside}/pairs", ".parquet"):
                raise AnchorSetError(
                    f"{where} does not exist, though there are features beside it: they are not finished. Run the same "
                    "arf command (features, or anchors) again, to its end, or remove the folder."
                )
            return None
        if is_local(fs):
            require_regular(Path(path), AnchorSetError)
        content = fs.cat_file(path)
    found = parse_json(content, where, AnchorSetError, dict, AGAIN)
    return validated(FeatureHeader, found, where, AnchorSetError, AGAIN)


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
    tar = _name(shard)
    if (embedded := header.pairs.get(utf8(tar))) is None:
        raise AnchorSetError(f"{anchors} has no features of pairs/{tar}. {UPDATE}")
    short = f"{FOLDER}/pairs/{tar.removesuffix('.tar')}.parquet"
    vector = pa.list_(pa.float16(), header.dim)
    schema = pa.schema([("key", pa.large_string()), ("image", vector), ("text", vector)])
    table = pa.Table.from_batches(_batches(anchors, short, schema), schema)
    keys = table["key"].to_pylist()
    if len(set(keys)) < len(keys):
        double = next(key for key in keys if keys.count(key) > 1)
        raise AnchorSetError(
            f"{short} has the key {double!r} more than once; expected a row per pair. {AGAIN}"
        )
    _require_rows(len(keys), embedded.rows, short)
    return PairFeatures(
        keys, *(_matrix(table[name].combine_chunks(), header.dim) for name in ("image", "text"))
    )


def caption_features(anchors: Path | str, header: FeatureHeader | None = None) -> CaptionFeatures:
    """Features of all captions, turned into one memory-mapped file where that is not there yet.

    Args:
        anchors: folder or fsspec URL of the set.
        header: the set's, if it has been read.

    Raises:
        AnchorSetError: there are none, or they are not what the header says: D, unit norm, a row per caption.
        CacheError: there is no place for the file.
    """
    header = header or _header(anchors)
    vector = pa.field("text", pa.list_(pa.float16(), header.dim))
    schema = pa.schema([("id", pa.large_string()), ("caption_index", pa.int16()), vector])
    if not header.captions:
        raise AnchorSetError(f"{anchors} has no features of captions. {UPDATE}")
    short = f"{FOLDER}/{CAPTIONS}"
    with opened_set(anchors, short) as (fs, root):
        path = f"{root}/{short}"
        _require_file(fs, path, f"{anchors}/{short}")
        stamp = file_stamp(fs, path)

    def read() -> Iterator[pa.Table]:
        rows = 0
        for batch in _batches(anchors, short, schema):
            rows += len(batch)
            yield pa.Table.from_batches([batch]).select(["id", "text"])
        _require_rows(rows, header.rows("captions"), short)

    key = digest([str(fs.protocol), path, stamp, header.model_dump()])
    return CaptionFeatures(mapped_file("features", key, vector, read))


def changes_since(
    anchors: Path | str, header: FeatureHeader, kinds: Sequence[str] = tuple(KINDS)
) -> list[str]:
    """Says which pairs and captions have no features, or those of what they were before they changed.

    Files are compared by size and, on this machine, by their contents, which are read once and then known for as long
    as a file is not written again.

    Returns:
        A sentence per kind; empty if the features are those of the set.

    Raises:
        AnchorSetError: a file cannot be read.
    """
    problems = []
    with opened_set(anchors) as (fs, root):
        for kind in kinds:
            embedded = dict(getattr(header, kind))
            sizes = sizes_in(fs, f"{root}/{kind}", KINDS[kind])
            new, other = [], []
            for path, size in sorted(sizes.items()):
                then = embedded.pop(utf8(_name(path)), None)
                if then is None:
                    new.append(path)
                elif size != then.bytes or (is_local(fs) and content_digest([Path(path)]) != then.sha256):
                    other.append(path)
            groups = {"have no features": new, "have changed since": other, "are gone": sorted(embedded)}
            found = [
                f"{len(names)} {what} (first: {printable(_name(names[0]))})"
                for what, names in groups.items()
                if names
            ]
            if found:
                problems.append(f"of the {len(sizes)} files of {kind}, {', '.join(found)}")
    return problems


def require_sound(anchors: Path | str, header: FeatureHeader) -> None:
    """Reads every value.

    Raises:
        AnchorSetError: a file is missing or damaged, or holds something else.
    """
    for name in header.pairs:
        pair_features(anchors, name, header)
    if header.captions:
        caption_features(anchors, header)


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
    return anchors / FOLDER / "pairs" / f"{_name(shard).removesuffix('.tar')}.parquet"


def write_pair_features(anchors: Path, shard: Path | str, features: PairFeatures) -> None:
    """Writes the features of a pair tar."""
    keys = pa.array(features.keys, pa.large_string())
    _write(pair_file(anchors, shard), "key", keys, image=features.image, text=features.text)


def write_caption_part(path: Path, ids: Sequence[str] | pa.ChunkedArray, text: np.ndarray) -> None:
    """Writes the features [n, D] of one caption file, with the ids of its rows, for `join_caption_parts`."""
    column = ids if isinstance(ids, pa.ChunkedArray) else pa.array(ids, pa.large_string())
    _write(path, "id", column, text=text)


def join_caption_parts(anchors: Path, parts: Sequence[Path]) -> None:
    """Writes the features of all captions, of parts in the order of the set's caption files."""
    import pandas as pd

    found = [np.zeros(0, np.uint64)]
    for part in parts:
        found += map(digests, pq.read_table(part, columns=["id"])["id"].cast(pa.large_string()).chunks)
    ids = np.concatenate(found)
    index = pd.Series(ids).groupby(ids).cumcount().to_numpy(np.int16)
    with replacing(anchors / FOLDER / CAPTIONS) as temporary, temporary.open("wb") as stream:
        writer, row = None, 0
        for part in parts:
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(_BATCH):
                    places = pa.array(index[row : row + len(batch)])
                    row += len(batch)
                    joined = pa.table({"id": batch["id"], "caption_index": places, "text": batch["text"]})
                    writer = writer or pq.ParquetWriter(stream, joined.schema, **_FOR_VECTORS)
                    writer.write_table(joined)
        if writer is not None:
            writer.close()


def _write(path: Path, name: str, ids: pa.Array | pa.ChunkedArray, **vectors: np.ndarray) -> None:
    columns = {name: ids}
    for column, values in vectors.items():
        flat = pa.array(np.ascontiguousarray(values, np.float16).reshape(-1))
        columns[column] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    with replacing(path) as temporary, temporary.open("wb") as file:
        pq.write_table(pa.table(columns), file, **_FOR_VECTORS)


def _header(anchors: Path | str) -> FeatureHeader:
    header = read_header(anchors)
    if header is None:
        raise AnchorSetError(
            f"{anchors} has no features of its pairs and captions. Write them with: arf features {anchors} --model ..."
        )
    return header


def _require_rows(found: int, expected: int, short: str) -> None:
    if found != expected:
        raise AnchorSetError(f"{short} has {found} rows; {HEADER} says {expected}. {AGAIN}")


def _require_file(fs: Any, path: str, where: str) -> None:
    if not fs.exists(path):
        raise AnchorSetError(f"{where} does not exist. {AGAIN}")


def _name(path: Path | str) -> str:
    """The name of a file, given by its path or URL."""
    return str(path).rsplit("/", 1)[-1]


def _batches(anchors: Path | str, short: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Reads a file of features in batches, every value of it checked.

    Raises:
        AnchorSetError: it is missing or damaged, or holds something else.
    """
    with opened_set(anchors, short) as (fs, root):
        _require_file(fs, f"{root}/{short}", f"{anchors}/{short}")
        with opened_parquet(fs, f"{root}/{short}", short, AGAIN) as file:
            found = file.schema_arrow
            if found.names != schema.names:
                raise AnchorSetError(
                    f"{short} has the columns {printable(', '.join(found.names))[:200]}; expected "
                    f"{', '.join(schema.names)}. {AGAIN}"
                )
            for batch in file.iter_batches(_BATCH):
                yield _checked(batch, schema, short)


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


def _matrix(column: pa.Array, dim: int) -> np.ndarray:
    """float16 [n, D] of a column; no copy is made."""
    flat: np.ndarray = column.flatten().to_numpy()
    return flat.reshape(-1, dim)
