"""``arf embed`` with a real, tiny CLIP."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.building import (
    describe,
    drawing,
    folder_bytes,
    save_tiny_clip,
    unit_vectors,
    write_embeddings,
    write_pool,
    write_tar,
)
from support.building_fixtures import Inputs

from arf_plugin.errors import PoolError
from arf_plugin.pipeline.embeddings import Embeddings, check_unit


def test_vectors_and_metadata_are_what_open_clip_says(arf, inputs: Inputs, tmp_path: Path):
    out, _ = arf("embed", "--pool", inputs.pool, "--model", inputs.clip, "--out", tmp_path, "--modality", "both",
                 "--batch-size", 5, "--json")  # fmt: skip
    assert json.loads(out)["kept"] == 48
    model, _, preprocess = open_clip.create_model_and_transforms(inputs.clip)
    tokenizer = open_clip.get_tokenizer(inputs.clip)
    model.eval()
    images, texts = Embeddings(tmp_path, "image"), Embeddings(tmp_path, "text")
    assert images.rows == texts.rows == 48 and images.dimension == 32
    row = 0
    for file, text_file in zip(images.files, texts.files, strict=True):
        vectors, text_vectors = file.load(), text_file.load()
        assert vectors.dtype == np.float16
        check_unit(vectors, file.vectors, 0)
        for position, entry in enumerate(pq.read_table(file.metadata).to_pylist()):
            index = 1000 + row
            assert entry["caption"] == f"{describe(index)}, number {index}"
            assert entry["id"] == f"pool-{row // 12:02d}/{row % 12:04d}"
            with Path(entry["tar"]).open("rb") as tar:
                tar.seek(entry["offset"])
                data = tar.read(entry["size"])
            image = Image.open(io.BytesIO(data))
            if row % 11 == 0:
                with torch.inference_mode():
                    expected = model.encode_image(preprocess(image)[None], normalize=True)[0].numpy()
                    expected_text = model.encode_text(tokenizer([entry["caption"]]), normalize=True)[
                        0
                    ].numpy()
                np.testing.assert_allclose(vectors[position], expected, atol=1e-3)
                np.testing.assert_allclose(text_vectors[position], expected_text, atol=1e-3)
            row += 1
    assert row == 48


def test_two_ranks_give_the_bytes_of_one(
    arf, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ("embed", "--pool", inputs.pool, "--model", inputs.clip, "--out")
    arf(*command, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        arf(*command, tmp_path / "two")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_bad_pool_samples_are_rejected_with_their_reason(arf, inputs: Inputs, tmp_path: Path):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    members = [
        (f"{i:02d}{ext}", data) for i in range(5) for ext, data in ((".jpg", drawing(i)), (".txt", b"fine"))
    ]
    members += [("bomb.png", buffer.getvalue()), ("bomb.txt", b"t"), ("cut.jpg", drawing(0)[:300]), ("cut.txt", b"t"),
                ("empty.jpg", drawing(1)), ("empty.txt", b" \n"), ("latin.jpg", drawing(2)), ("latin.txt", b"caf\xe9"),
                ("mute.jpg", drawing(3)), ("blind.txt", b"no image")]  # fmt: skip
    pool = write_tar(tmp_path / "p.tar", members)
    command = ("embed", "--pool", pool, "--model", inputs.clip, "--out", tmp_path / "E")
    _, err = arf(*command, status=1)
    assert "rejected 6 of 11" in err
    arf(*command, "--max-bad-fraction", 0.6)
    lines = map(json.loads, (tmp_path / "E/work/embed/rejects.jsonl").read_text().splitlines())
    reasons = {line["id"]: line["reason"] for line in lines}
    assert "decompression bomb" in reasons.pop("p/bomb")
    assert "cannot be decoded" in reasons.pop("p/cut")
    assert "not UTF-8" in reasons.pop("p/latin")
    assert reasons == {
        "p/empty": "has no text",
        "p/mute": "has no text",
        "p/blind": "has no image (members: txt)",
    }
    assert Embeddings(tmp_path / "E").rows == 5


def test_a_damaged_tar_is_named_and_the_rest_is_done(arf, inputs: Inputs, tmp_path: Path):
    pool = write_pool(tmp_path / "pool")
    second = tmp_path / "pool/pool-01.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2 + 100])
    command = ("embed", "--pool", pool, "--model", inputs.clip)
    _, err = arf(*command, "--out", tmp_path / "E", status=1)
    assert "1 of 4 shards could not be processed" in err and "pool-01.tar is cut off" in err
    assert len(list((tmp_path / "E/img_emb").glob("*.npy"))) == 3
    arf(*command, "--out", tmp_path / "S", "--salvage", "--max-bad-fraction", 0.1)
    assert 36 < Embeddings(tmp_path / "S").rows < 48
    assert "pool-01/..." in (tmp_path / "S/work/embed/rejects.jsonl").read_text()


def test_refusals(arf, inputs: Inputs, tmp_path: Path):
    def refused(expected: str, *more: object):
        _, err = arf("embed", "--out", tmp_path / "E", *more, status=1)
        assert expected in err, err

    refused("one of --pool, --train-data, --captions and --prompts", "--model", inputs.clip)
    refused("needs weights: add --pretrained", "--pool", inputs.pool, "--model", "ViT-B-32")
    refused("cannot load the model", "--pool", inputs.pool, "--model", "ViT-Z-99", "--pretrained", "x")
    refused("does not exist", "--pool", inputs.pool, "--model", "local-dir:/nowhere")
    refused("does not exist", "--pool", tmp_path / "absent.tar", "--model", inputs.clip)
    refused("no torch device", "--pool", inputs.pool, "--model", inputs.clip, "--device", "abacus")
    escape = tmp_path / "escape.tar"
    with tarfile.open(escape, "w") as tar:
        tar.addfile(tarfile.TarInfo("../evil.jpg"))
    refused("leaves the folder", "--pool", escape, "--model", inputs.clip)


def test_other_weights_of_the_same_name_are_refused_on_resume(arf, inputs: Inputs, tmp_path: Path):
    model = save_tiny_clip(tmp_path / "clip", seed=1)
    command = ("embed", "--pool", inputs.pool, "--model", model, "--out", tmp_path / "E")
    arf(*command)
    save_tiny_clip(tmp_path / "clip", seed=2)
    _, err = arf(*command, status=1)
    assert "model.weights: " in err


def test_damaged_embedding_folders_are_refused(tmp_path: Path):
    vectors = unit_vectors(20, 8, seed=0)

    def broken(name: str) -> Path:
        write_embeddings(tmp_path / name, vectors)
        return tmp_path / name

    with pytest.raises(PoolError, match=r"no img_emb/\*\.npy"):
        _ = Embeddings(tmp_path).files
    folder = broken("lengths")
    np.save(folder / "img_emb/img_emb_1.npy", vectors[:9])
    with pytest.raises(
        PoolError, match=r"img_emb_1\.npy has shape \(9, 8\), but metadata_1\.parquet has 10 rows"
    ):
        _ = Embeddings(folder).files
    folder = broken("counts")
    (folder / "metadata/metadata_1.parquet").unlink()
    with pytest.raises(PoolError, match="2 files in img_emb but 1 in metadata"):
        _ = Embeddings(folder).files
    folder = broken("dimensions")
    np.save(folder / "img_emb/img_emb_1.npy", unit_vectors(10, 4, seed=0))
    with pytest.raises(PoolError, match=r"dimensions \[4, 8\]"):
        _ = Embeddings(folder).files
    folder = broken("pickle")
    np.save(folder / "img_emb/img_emb_1.npy", np.array([{"evil": 1}] * 10, dtype=object))
    with pytest.raises(PoolError, match="cannot be read"):
        _ = Embeddings(folder).files
    folder = broken("cut")
    path = folder / "metadata/metadata_0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PoolError, match="cannot be read"):
        _ = Embeddings(folder).files


def test_a_half_embedded_folder_is_refused(
    arf, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One of two ranks has done its share: whole files, but not all of them."""
    words = ("embed", "--pool", inputs.pool, "--model", inputs.clip, "--out", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    arf(*words)
    with pytest.raises(PoolError, match="is not finished"):
        _ = Embeddings(tmp_path).rows
    monkeypatch.setenv("RANK", "1")
    arf(*words)
    assert Embeddings(tmp_path).rows == 48


def test_vectors_that_are_not_unit_are_named(tmp_path: Path):
    vectors = unit_vectors(20, 8, seed=0)
    vectors[13] = np.nan
    with pytest.raises(PoolError, match=r"row 13 .*norm nan"):
        check_unit(vectors, tmp_path, 0)
    vectors[13] = 0.5
    with pytest.raises(PoolError, match=r"row 13 \(row 113 of the folder\) has norm"):
        check_unit(vectors, tmp_path, 100)
