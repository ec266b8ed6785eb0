"""``arf caption`` with a real, tiny captioner."""

from __future__ import annotations

import io
import json
from pathlib import Path

import open_clip
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.building import drawing, folder_bytes, save_tiny_blip, save_tiny_git, save_tiny_vlm
from support.building_fixtures import Inputs
from support.tars import write_tar

from arf_plugin.pipeline.captioner import Captioner, Generation, captioner_identity

LENGTH = ("--min-new-tokens", 3, "--max-new-tokens", 6)


def captions_of(anchors: Path) -> list[tuple[str, str]]:
    parts = sorted((anchors / "captions").glob("part-*.parquet"))
    return [(row["id"], row["caption"]) for part in parts for row in pq.read_table(part).to_pylist()]


def test_every_task_image_gets_the_captioners_caption(arf, inputs: Inputs, tmp_path: Path):
    out, _ = arf("caption", "--task-data", inputs.task, "--captioner", inputs.captioner, "--out", tmp_path, *LENGTH,
                 "--raw-captions", "--batch-size", 4, "--json")  # fmt: skip
    summary = json.loads(out)
    assert (summary["samples"], summary["captions"], summary["rejected"]) == (21, 21, 0)
    found = captions_of(tmp_path)
    assert [row[0] for row in found] == [f"{i // 7:03d}/{i:05d}" for i in range(21)]
    assert len({caption for _, caption in found}) > 1, "the captions do not depend on the images"

    captioner = Captioner(
        inputs.captioner, torch.device("cpu"), torch.float32, Generation(min_new_tokens=3, max_new_tokens=6)
    )
    for index in (0, 8, 20):  # one by one, in the test's own loop
        image = Image.open(io.BytesIO(drawing(index))).convert("RGB")
        assert captioner.captions(captioner.inputs([image]))[0][0] == found[index][1]
    manifest = json.loads((tmp_path / "anchors.json").read_text())
    assert manifest["captions"]["count"] == 21
    assert manifest["captions"]["captioner_identity"] == captioner_identity(inputs.captioner)


def test_several_captions_per_image_by_beams_and_by_sampling(arf, inputs: Inputs, tmp_path: Path):
    common = ("caption", "--task-data", inputs.task, "--captioner", inputs.captioner, *LENGTH)
    arf(*common, "--out", tmp_path / "beams", "--num-beams", 3, "--captions-per-image", 3)
    beams = captions_of(tmp_path / "beams")
    assert len(beams) > 21 and len(set(beams)) == len(beams)
    for name in ("one", "two"):
        arf(*common, "--out", tmp_path / name, "--top-p", 0.9, "--captions-per-image", 2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert set(captions_of(tmp_path / "one")) != set(beams)
    _, err = arf(*common, "--out", tmp_path / "x", "--captions-per-image", 2, status=1)
    assert "--top-p" in err and "--num-beams" in err


def test_a_csv_with_damaged_images(arf, inputs: Inputs, tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.jpg").write_bytes(drawing(index))
    buffer = io.BytesIO()
    Image.new("CMYK", (40, 40), (10, 200, 0, 0)).save(buffer, "JPEG")
    (folder / "cmyk.jpg").write_bytes(buffer.getvalue())
    Image.new("P", (40, 40), 3).save(folder / "palette.png")
    (folder / "cut.jpg").write_bytes(drawing(0)[:300])
    paths = [str(folder / f"{i}.jpg") for i in range(6)]
    paths += [str(folder / name) for name in ("cmyk.jpg", "palette.png", "cut.jpg", "absent.jpg")]
    csv = tmp_path / "train.csv"
    pd.DataFrame({"image": paths, "title": "t"}).to_csv(csv, index=False)
    command = ("caption", "--task-data", csv, "--csv-img-key", "image", "--csv-separator", ",", *LENGTH,
               "--captioner", inputs.captioner, "--out", tmp_path / "A")  # fmt: skip
    _, err = arf(*command, status=1)
    assert "rejected 2 of 10" in err and "cut.jpg: cannot be decoded" in err
    arf(*command, "--max-bad-fraction", 0.2)
    assert [row[0] for row in captions_of(tmp_path / "A")] == sorted(paths[:8])
    rejects = (tmp_path / "A/work/caption/rejects.jsonl").read_text().splitlines()
    reasons = {Path(line["id"]).name: line["reason"] for line in map(json.loads, rejects)}
    assert reasons["absent.jpg"] == "cannot be read (No such file or directory)"
    assert set(reasons) == {"cut.jpg", "absent.jpg"}


def test_a_dry_run_writes_nothing(arf, inputs: Inputs, tmp_path: Path):
    out, _ = arf("caption", "--task-data", inputs.task, "--captioner", inputs.captioner, "--out", tmp_path / "A",
                 "--dry-run", "--json")  # fmt: skip
    plan = json.loads(out)
    assert (plan["shards"], plan["shards_done"]) == (3, 0)
    assert not (tmp_path / "A").exists()


def test_refusals(arf, inputs: Inputs, tmp_path: Path):
    def refused(
        expected: str, task: object = inputs.task, captioner: object = inputs.captioner, *more: object
    ):
        _, err = arf(
            "caption", "--task-data", task, "--captioner", captioner, "--out", tmp_path / "A", *more, status=1
        )
        assert expected in err, err

    refused("does not exist", tmp_path / "absent.tar")
    refused("cannot be loaded as an image captioner", inputs.task, tmp_path / "nothing")
    refused(
        "cannot be loaded as an image captioner", inputs.task, Path(inputs.clip.removeprefix("local-dir:"))
    )
    refused("takes no prompt", inputs.task, inputs.captioner, "--prompt", "a photo of", "--restart")
    twice = write_tar(
        tmp_path / "x.tar", [("a.jpg", drawing(0)), ("b.jpg", drawing(0)), ("a.jpg", drawing(0))]
    )
    refused("has the key 'a' twice", twice)


def test_a_changed_captioner_is_refused(arf, inputs: Inputs, tmp_path: Path):
    command = ("caption", "--task-data", inputs.task, "--captioner", inputs.captioner, "--out", tmp_path)
    arf(*command, *LENGTH)
    _, err = arf(*command, "--min-new-tokens", 3, "--max-new-tokens", 5, status=1)
    assert "generation.max_new_tokens: 6 -> 5" in err
    _, err = arf(*command, *LENGTH)
    assert "nothing left to do" in err


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_other_captioners(kind: str, inputs: Inputs, tmp_path: Path):
    """BLIP and GIT of random weights load from their folders and caption a batch, with and without a prompt."""
    name = {"blip": save_tiny_blip, "git": save_tiny_git}[kind](tmp_path / kind)
    images = [Image.open(io.BytesIO(drawing(i))).convert("RGB") for i in range(3)]
    for prompt in ("", "a red"):
        captioner = Captioner(
            name, torch.device("cpu"), torch.float32, Generation(max_new_tokens=5, num_beams=2, prompt=prompt)
        )
        captions = captioner.captions(captioner.inputs(images))
        assert [len(group) for group in captions] == [1, 1, 1]
        assert all(isinstance(group[0], str) for group in captions)


@pytest.mark.parametrize("prompt", ["", "a white"])
@pytest.mark.parametrize("talks", [True, False], ids=["chat", "plain"])
def test_a_captioner_that_wants_the_place_of_the_image_in_its_prompt(talks, prompt, tmp_path: Path):
    name = save_tiny_vlm(tmp_path / "vlm")
    if not talks:
        (tmp_path / "vlm" / "chat_template.jinja").unlink()
    captioner = Captioner(
        name, torch.device("cpu"), torch.float32, Generation(max_new_tokens=5, prompt=prompt)
    )
    images = [Image.open(io.BytesIO(drawing(i))).convert("RGB") for i in range(3)]
    assert [len(group) for group in captioner.captions(captioner.inputs(images))] == [1, 1, 1]


def test_scores_are_cosines_and_the_floor_holds(arf, inputs: Inputs, tmp_path: Path):
    common = ("caption", "--task-data", inputs.task, "--captioner", inputs.captioner, *LENGTH, "--num-beams", 3,
              "--captions-per-image", 3, "--score-model", inputs.clip, "--batch-size", 4)  # fmt: skip
    arf(*common, "--out", tmp_path / "A")
    parts = sorted((tmp_path / "A/captions").iterdir())
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    model, _, preprocess = open_clip.create_model_and_transforms(inputs.clip)
    tokenizer = open_clip.get_tokenizer(inputs.clip)
    for row in rows[::7]:  # one by one, in the test's own loop
        image = Image.open(io.BytesIO(drawing(int(row["id"].split("/")[1])))).convert("RGB")
        with torch.no_grad():
            cosine = torch.cosine_similarity(
                model.eval().encode_image(preprocess(image)[None]),
                model.encode_text(tokenizer([row["caption"]])),
            )
        assert row["score"] == pytest.approx(cosine.item(), abs=1e-5)

    best: dict[str, float] = {}
    for row in rows:
        best[row["id"]] = max(best.get(row["id"], -1), row["score"])
    floor = sorted(best.values())[4]
    common = (*common, "--min-score", floor, "--out", tmp_path / "B")
    _, err = arf(*common, status=1)
    assert "rejected 4 of 21" in err and "scores at most" in err
    arf(*common, "--max-bad-fraction", 0.5)
    kept = [tuple(row.values()) for part in sorted((tmp_path / "B/captions").iterdir())
            for row in pq.read_table(part).to_pylist()]  # fmt: skip
    assert kept == [tuple(row.values()) for row in rows if row["score"] >= floor]
    assert 0 < len(kept) < len(rows)
    _, err = arf("caption", "--task-data", inputs.task, "--captioner", inputs.captioner, "--min-score", 0.2,
                 "--out", tmp_path / "C", status=1)  # fmt: skip
    assert "need --score-model" in err
