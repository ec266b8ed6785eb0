"""The features of an anchor set: what is written is read, and what others have written is looked at first."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.building import unit_vectors

from arf_plugin.anchors.features import (
    FeatureHeader,
    PairFeatures,
    caption_features,
    changes_since,
    join_caption_parts,
    pair_features,
    read_header,
    weights_digest,
    write_caption_part,
    write_header,
    write_pair_features,
)
from arf_plugin.errors import AnchorSetError

D = 24
IMAGES, TEXTS, CAPTIONS = (unit_vectors(30, D, seed) for seed in range(3))
KEYS = [f"{number:04d}" for number in range(29)] + ["stra\\xdfe"]
IDS = [f"s/{number // 3}" for number in range(30)]


def entry(rows: int) -> dict[str, object]:
    return {"bytes": 1, "sha256": "0" * 64, "rows": rows}


def header(**changes: object) -> dict[str, object]:
    return {
        "format_version": 1,
        "model": "ViT-B-32",
        "weights_sha256": "0" * 64,
        "precision": "float32",
        "preprocessing": {"size": [32, 32], "mean": [0.5, 0.5, 0.5]},
        "dtype": "float16",
        "dim": D,
        "pairs": {"a.tar": entry(30)},
        "captions": {"b.parquet": entry(20), "c.parquet": entry(10)},
        **changes,
    }


def write_captions(anchors: Path, *files: tuple[list[str], np.ndarray]) -> None:
    parts = [anchors / "work" / f"{number}.parquet" for number in range(len(files))]
    for part, (ids, vectors) in zip(parts, files, strict=True):
        write_caption_part(part, ids, vectors)
    join_caption_parts(anchors, parts)


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    write_pair_features(tmp_path, "pairs/a.tar", PairFeatures(KEYS, IMAGES, TEXTS))
    write_captions(tmp_path, (IDS[:20], CAPTIONS[:20]), (IDS[20:], CAPTIONS[20:]))
    write_header(tmp_path, FeatureHeader.model_validate(header()))
    return tmp_path


def test_what_is_written_is_read(anchors: Path):
    found = pair_features(anchors, "s3://bucket/pairs/a.tar")
    assert found.keys == KEYS
    np.testing.assert_array_equal(found.image, IMAGES)
    np.testing.assert_array_equal(found.text, TEXTS)
    captions = caption_features(anchors)
    for sample in range(10):
        np.testing.assert_array_equal(captions.get(f"s/{sample}"), CAPTIONS[3 * sample : 3 * sample + 3])
    table = pq.read_table(anchors / "features/captions.parquet")
    assert (
        table.column_names == ["id", "caption_index", "text"] and str(table.schema.field(1).type) == "int16"
    )
    assert table["caption_index"].to_pylist() == [number % 3 for number in range(30)]


def test_captions_are_mapped_from_one_file_by_all_processes(anchors: Path):
    captions = caption_features(anchors)
    again = pickle.loads(pickle.dumps(captions))
    assert again.path == captions.path == caption_features(str(anchors)).path
    mapped = again._values.chunk(0).flatten().to_numpy()
    assert not (mapped.flags.owndata or mapped.flags.writeable)
    np.testing.assert_array_equal(again.get("s/3"), CAPTIONS[9:12])
    write_captions(anchors, (IDS[:20], CAPTIONS[:20]), (IDS[20:], CAPTIONS[:10]))
    assert caption_features(anchors).path != captions.path, "other features are another file"


def test_a_set_without_features_and_one_whose_features_are_not_finished(anchors: Path, tmp_path: Path):
    assert read_header(tmp_path / "none") is None
    with pytest.raises(AnchorSetError, match="has no features of its pairs and captions"):
        pair_features(tmp_path / "none", "a.tar")
    (anchors / "features/features.json").unlink()
    with pytest.raises(AnchorSetError, match="they are not finished"):
        read_header(anchors)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 2}, "format_version"),
        ({"dtype": "float32"}, "expected one of: float16"),
        ({"dim": 0}, "at least 1"),
        ({"dim": "24"}, "expected a whole number"),
        ({"weights_sha256": "x"}, "weights_sha256"),
        ({"pairs": {"a.tar": entry(-1)}}, "at least 0"),
        ({"pairs": ["a.tar"]}, "expected a mapping"),
        ({"evil": 1}, "unknown key"),
        ({"captions": None}, "expected a mapping"),
    ],
)
def test_a_header_that_is_none(anchors: Path, change: dict[str, object], expected: str):
    (anchors / "features/features.json").write_text(json.dumps(header(**change)))
    with pytest.raises(AnchorSetError, match=expected) as error:
        read_header(anchors)
    assert "features.json" in str(error.value) and "arf features" in str(error.value)


def lists(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def columns(**changes: pa.Array | None) -> dict[str, pa.Array]:
    given = {"key": pa.array(KEYS), "image": lists(IMAGES), "text": lists(TEXTS)} | changes
    return {name: value for name, value in given.items() if value is not None}


def spoilt(value: float) -> np.ndarray:
    vectors = IMAGES.copy()
    vectors[7, 3] = value
    return vectors


def with_gap() -> pa.Array:
    values = pa.array([None, *IMAGES.reshape(-1)[1:]], pa.float16())
    return pa.FixedSizeListArray.from_arrays(values, D)


HOSTILE = {
    "other dimensions": (
        {"image": lists(unit_vectors(30, D + 1, 0))},
        r"holds fixed_size_list<.*>\[25\]; expected",
    ),
    "lists of any length": ({"text": pa.array(TEXTS.tolist(), pa.list_(pa.float16()))}, "holds list<"),
    "other numbers": ({"text": lists(TEXTS.astype(np.float32))}, "holds fixed_size_list<"),
    "no vectors": ({"image": pa.array(range(30))}, "holds int64; expected"),
    "not a number": ({"image": lists(spoilt(np.nan))}, "norm nan; expected unit vectors"),
    "infinite": ({"image": lists(spoilt(np.inf))}, "norm inf; expected unit vectors"),
    "not of unit norm": ({"image": lists(spoilt(0.9))}, "expected unit vectors"),
    "zero": ({"text": lists(np.zeros((30, D), np.float16))}, "norm 0; expected unit vectors"),
    "gaps in a vector": ({"image": with_gap()}, "has gaps"),
    "gaps between": ({"key": pa.array([None, *KEYS[1:]])}, "has gaps"),
    "a key twice": ({"key": pa.array([KEYS[0], *KEYS[:-1]])}, "has the key '0000' more than once"),
    "keys of numbers": ({"key": pa.array(range(30))}, "holds int64"),
    "no text": ({"text": None}, "has the columns key, image; expected key, image, text"),
    "another column": ({"evil": pa.array(range(30))}, "has the columns"),
    "fewer rows": ({n: c.slice(1) for n, c in columns().items()}, "has 29 rows; features.json says 30"),
}


@pytest.mark.parametrize(("change", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_pairs_of_others_are_looked_at_before_they_are_believed(anchors: Path, change, expected: str):
    pq.write_table(pa.table(columns(**change)), anchors / "features/pairs/a.parquet")
    with pytest.raises(AnchorSetError, match=expected) as error:
        pair_features(anchors, "a.tar")
    assert "features/pairs/a.parquet" in str(error.value) and "arf features" in str(error.value)


@pytest.mark.parametrize(
    ("ids", "vectors", "expected"),
    [
        (IDS[:20], unit_vectors(20, D + 8, 0), "expected fixed_size_list"),
        (IDS[:20], unit_vectors(20, D, 0) * np.float16(2), "expected unit vectors"),
        (IDS[:19], unit_vectors(19, D, 0), "has 19 rows; features.json says 30"),
    ],
)
def test_captions_of_others(anchors: Path, ids: list[str], vectors: np.ndarray, expected: str):
    write_captions(anchors, (ids, vectors))
    with pytest.raises(AnchorSetError, match=expected):
        caption_features(anchors)


def test_files_that_are_no_parquet_or_not_there(anchors: Path):
    path = anchors / "features/pairs/a.parquet"
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"PAR1" + b"\xff" * 200 + whole[204:]):
        path.write_bytes(content)
        with pytest.raises(AnchorSetError):
            pair_features(anchors, "a.tar")
    path.unlink()
    with pytest.raises(AnchorSetError, match=r"a.parquet does not exist.*arf features"):
        pair_features(anchors, "a.tar")
    os.mkfifo(path)
    with pytest.raises(AnchorSetError, match="expected a file"):
        pair_features(anchors, "a.tar")
    (anchors / "features/captions.parquet").unlink()
    with pytest.raises(AnchorSetError, match=r"captions.parquet does not exist.*arf features"):
        caption_features(anchors)


@pytest.mark.parametrize("name", ["../../secret.tar", "/etc/secret.tar", "a.tar/../../secret.tar"])
def test_names_lead_nowhere_else(anchors: Path, name: str):
    """Names in the header are compared and never opened; of the name of a shard only its last part counts."""
    (anchors / "features/features.json").write_text(json.dumps(header(pairs={name: entry(30)})))
    with pytest.raises(AnchorSetError, match=r"has no features of pairs/secret.tar"):
        pair_features(anchors, name)
    assert any(
        "are gone" in problem
        for problem in changes_since(anchors, FeatureHeader(**header(pairs={name: entry(30)})))
    )


def test_a_caption_file_that_has_changed_is_known_by_size_or_content(anchors: Path):
    found = read_header(anchors)
    assert found is not None
    for kind, name in (("pairs", "a.tar"), ("captions", "b.parquet")):
        (anchors / kind).mkdir()
        (anchors / kind / name).write_bytes(b"x")
    problems = changes_since(anchors, found)
    assert problems == [
        "of the 1 files of captions, 1 have changed since (first: b.parquet), 1 are gone (first: c.parquet)",
        "of the 1 files of pairs, 1 have changed since (first: a.tar)",
    ]
    assert len(changes_since(anchors, found, ["pairs"])) == 1


def test_weights_are_known_by_their_bytes_wherever_they_are_and_whatever_wraps_them():
    torch.manual_seed(0)
    weights = {
        "visual.proj": torch.randn(4, 6),
        "text.bias": torch.randn(3).bfloat16(),
        "step": torch.tensor(7),
        "logit_scale": torch.tensor(2.0),
    }
    known = weights_digest(weights)
    for same in (
        {f"module.{name}": value for name, value in weights.items()},
        {f"_orig_mod.module.{name}": value for name, value in reversed(weights.items())},
        {name.replace("visual.", "visual._orig_mod."): value for name, value in weights.items()},
        weights | {"visual.proj": weights["visual.proj"].t().contiguous().t()},
        weights | {"logit_scale": torch.tensor(5.0), "logit_bias": torch.tensor(-10.0)},
        weights | {"visual.extra_state": b"not a tensor"},
    ):
        assert weights_digest(same) == known
    for other in (
        weights | {"visual.proj": weights["visual.proj"] + 1e-6},
        weights | {"visual.proj": weights["visual.proj"].reshape(6, 4)},
        weights | {"visual.proj": weights["visual.proj"].double()},
        weights | {"more": torch.zeros(1)},
        {name: value for name, value in weights.items() if name != "step"},
        {name.replace("visual", "image"): value for name, value in weights.items()},
    ):
        assert weights_digest(other) != known
