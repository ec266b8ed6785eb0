"""open_clip's CoCa models as captioners: decoding against plain loops, and the stage."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.building import drawing, folder_bytes, save_tiny_coca
from support.building_fixtures import Inputs

from arf_plugin.errors import StageError
from arf_plugin.pipeline.captioner import Generation, captioner_identity, load_captioner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def coca(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_coca(tmp_path_factory.mktemp("coca"))


@functools.cache
def loaded(name: str):
    """The model as open_clip loads it: model, preprocessing, tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(name.removeprefix("open_clip:"))
    return model.eval(), preprocess, open_clip.get_tokenizer(name.removeprefix("open_clip:"))


def images(count: int) -> list[Image.Image]:
    return [Image.open(io.BytesIO(drawing(i))).convert("RGB") for i in range(count)]


def say(name: str, count: int = 4, **settings) -> list[list[str]]:
    captioner = load_captioner(name, CPU, torch.float32, Generation(**settings))
    return captioner.captions(captioner.inputs(images(count)))


def by_loop(name: str, index: int, beams: int, length: int, shortest: int) -> list[str]:
    """Beam search for one image with lists: (log-probability, words), those that have ended stay as they are."""
    model, preprocess, tokenizer = loaded(name)
    start, end = 49406, 49407
    pixels = preprocess(images(index + 1)[index])[None]
    found = [(0.0, [start])]
    with torch.no_grad():
        for _ in range(length):
            grown = []
            for score, words in found:
                if words[-1] == end:
                    grown.append((score, words))
                    continue
                out = model(pixels, torch.tensor([words]), output_labels=False)["logits"][0, -1]
                out[start] = -torch.inf
                if len(words) <= shortest:
                    out[end] = -torch.inf
                values, tokens = out.log_softmax(0).topk(beams)
                grown += [
                    (score + v, [*words, t]) for v, t in zip(values.tolist(), tokens.tolist(), strict=True)
                ]
            found = sorted(grown, key=lambda beam: -beam[0])[:beams]
    found.sort(key=lambda beam: -beam[0] / (len(beam[1]) - 1))
    return [tokenizer.decode([word for word in words[1:] if word != end]) for _, words in found]


@pytest.mark.parametrize("beams", [1, 3])
def test_search_agrees_with_a_plain_loop(coca: str, beams: int):
    said = say(coca, num_beams=beams, captions_per_image=beams, max_new_tokens=5, min_new_tokens=2)
    assert len({group[0] for group in said}) > 1, "the captions do not depend on the images"
    for index in (0, 3):
        assert said[index] == by_loop(coca, index, beams, length=5, shortest=2)


def test_sampling_stays_in_the_nucleus_and_follows_the_seed(coca: str):
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "captions_per_image": 6, "top_p": 0.9}
    captioner = load_captioner(coca, CPU, torch.float32, Generation(**settings))
    said = []
    for _ in range(2):
        torch.manual_seed(0)
        said.append(captioner.captions(captioner.inputs(images(4))))
    one, two = said
    assert one == two
    assert [len(group) for group in one] == [6] * 4
    assert any(len(set(group)) > 1 for group in one)
    narrow = say(coca, **settings | {"top_p": 1e-9})
    greedy = say(coca, max_new_tokens=5, min_new_tokens=5)
    assert narrow == [group * 6 for group in greedy]


def test_the_stage_captions_with_it(arf, coca: str, inputs: Inputs, tmp_path: Path):
    common = (
        *("caption", "--task-data", inputs.task, "--captioner", coca, "--max-new-tokens", 5, "--json"),
        "--out",
    )
    out, _ = arf(*common, tmp_path / "A", "--batch-size", 4)
    assert json.loads(out)["captions"] == 21
    arf(*common, tmp_path / "B", "--batch-size", 9)
    one, two = (folder_bytes(tmp_path / name / "captions") for name in "AB")
    assert one == two
    assert pq.read_table(tmp_path / "A/captions/part-00000.parquet")["id"].to_pylist()[0] == "000/00000"
    identity = json.loads((tmp_path / "A/anchors.json").read_text())["captions"]["captioner_identity"]
    assert identity == captioner_identity(coca) and "sha256:" in identity and str(tmp_path) not in identity


def test_refusals(coca: str, inputs: Inputs):
    with pytest.raises(StageError, match="take no prompt"):
        say(coca, prompt="a photo of")
    with pytest.raises(StageError, match="which cannot speak"):
        say(f"open_clip:{inputs.clip}")
    with pytest.raises(StageError, match="open_clip cannot load the model 'no-such-model'"):
        say("open_clip:no-such-model@laion")
