"""Retrieval by caption and by class prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from support.building import COLOURS
from support.building_fixtures import Inputs
from support.data import write_captions

TEMPLATES = ("a photo of a {c}.", "a drawing of a {c}.")


@pytest.fixture(scope="module")
def encode(inputs: Inputs):
    """Unit vectors of texts, one by one."""
    model, tokenizer = open_clip.create_model(inputs.clip).eval(), open_clip.get_tokenizer(inputs.clip)

    def run(text: str) -> np.ndarray:
        with torch.no_grad():
            return torch.nn.functional.normalize(model.encode_text(tokenizer([text])), dim=1)[0].numpy()

    return run


@pytest.fixture
def pool(arf, inputs: Inputs, tmp_path: Path) -> Path:
    arf("embed", "--pool", inputs.pool, "--model", inputs.clip, "--out", tmp_path / "pool")
    return tmp_path / "pool"


def hits_of(folder: Path) -> list[dict]:
    return [row for path in sorted((folder / "hits").iterdir()) for row in pq.read_table(path).to_pylist()]


def nearest(query: np.ndarray, pool: Path, k: int) -> list[float]:
    vectors = np.concatenate([np.load(p) for p in sorted((pool / "img_emb").iterdir())]).astype(np.float32)
    return sorted((vectors @ query).tolist(), reverse=True)[:k]


def test_every_caption_is_a_query(arf, inputs: Inputs, pool: Path, encode, tmp_path: Path):
    captions = {f"000/{i:05d}": f"a {colour} thing" for i, colour in enumerate(COLOURS)}
    write_captions(tmp_path / "anchors", captions)
    arf("embed", "--captions", tmp_path / "anchors", "--model", inputs.clip, "--out", tmp_path / "Q",
        "--batch-size", 4)  # fmt: skip
    arf("retrieve", "--queries", tmp_path / "Q", "--query-modality", "text", "--pool", pool, "--k", 3,
        "--out", tmp_path / "H")  # fmt: skip
    hits = hits_of(tmp_path / "H")
    assert [hit["query"] for hit in hits[::3]] == sorted(captions)
    for start, (name, caption) in zip(range(0, len(hits), 3), sorted(captions.items()), strict=True):
        assert {hit["query"] for hit in hits[start : start + 3]} == {name}
        found = [hit["similarity"] for hit in hits[start : start + 3]]
        assert found == pytest.approx(nearest(encode(caption), pool, 3), abs=2e-3)
    arf("pack", "--retrieved", tmp_path / "H", "--out", tmp_path / "anchors")


def test_a_class_is_the_mean_of_its_prompts(arf, inputs: Inputs, pool: Path, encode, tmp_path: Path):
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    out, _ = arf("embed", "--prompts", tmp_path / "names.txt", "--templates", tmp_path / "templates.txt",
                 "--model", inputs.clip, "--out", tmp_path / "Q", "--json")  # fmt: skip
    assert json.loads(out)["samples"] == len(COLOURS)
    vectors = np.load(tmp_path / "Q/text_emb/text_emb_00000.npy").astype(np.float32)
    for colour, vector in zip(COLOURS, vectors, strict=True):
        mean = sum(encode(template.replace("{c}", colour)) for template in TEMPLATES)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-3)
    arf("retrieve", "--queries", tmp_path / "Q", "--query-modality", "text", "--pool", pool, "--k", 2,
        "--out", tmp_path / "H")  # fmt: skip
    assert [hit["query"] for hit in hits_of(tmp_path / "H")[::2]] == list(COLOURS)


@pytest.mark.parametrize("query_by", ["caption", "prompt"])
def test_anchors_of_text_queries(arf, inputs: Inputs, tmp_path: Path, query_by: str):
    """The chain searches with texts, and its pairs are those that the stages find one by one."""
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    templates = ("--templates", tmp_path / "templates.txt")
    more = ("--classnames", tmp_path / "names.txt", *templates) if query_by == "prompt" else ()
    command = ("anchors", "--task-data", inputs.task, "--captioner", inputs.captioner, "--min-new-tokens", 3,
               "--pool", inputs.pool, "--model", inputs.clip, "--k", 2, "--query-by", query_by, "--out", tmp_path / "A",
               *more)  # fmt: skip
    plan = json.loads(arf(*command, "--dry-run", "--json")[0])
    assert plan["stages"][1]["samples"] == (21 if query_by == "caption" else len(COLOURS))
    arf(*command)
    texts = (
        ("--captions", tmp_path / "A")
        if query_by == "caption"
        else ("--prompts", tmp_path / "names.txt", *templates)
    )
    arf("embed", *texts, "--model", inputs.clip, "--out", tmp_path / "Q")
    arf("retrieve", "--queries", tmp_path / "Q", "--query-modality", "text", "--pool", tmp_path / "A/work/pool",
        "--k", 2, "--out", tmp_path / "H")  # fmt: skip
    chain = pq.read_table(tmp_path / "A/work/retrieve/pairs.parquet")
    assert chain.equals(pq.read_table(tmp_path / "H/pairs.parquet"))


def test_refusals(arf, inputs: Inputs, tmp_path: Path):
    common = ("embed", "--model", inputs.clip, "--out", tmp_path / "x")
    _, err = arf(*common, "--captions", tmp_path, status=1)
    assert "has no *.parquet" in err and "arf caption" in err
    _, err = arf(*common, "--captions", tmp_path, "--prompts", "imagenet", status=1)
    assert "one of --pool, --train-data, --captions and --prompts" in err
    _, err = arf(*common, status=1)
    assert "needs what to embed" in err
