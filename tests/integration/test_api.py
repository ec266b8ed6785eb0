"""The names that `arf_plugin` hands on do what the commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import building, evaluation
from support.building_fixtures import Inputs

import arf_plugin
from arf_plugin.errors import AnchorSetError, ArfError, EvaluationError, FitError, FlagError

SHORT = {"min_new_tokens": 3, "max_new_tokens": 6, "k": 3, "shard_size": 10}


@pytest.fixture(scope="module")
def built(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> arf_plugin.AnchorSet:
    out = tmp_path_factory.mktemp("api") / "A"
    return arf_plugin.build_anchors(
        out, inputs.task, pool=inputs.pool, captioner=inputs.captioner, model=inputs.clip, **SHORT
    )


def test_every_name_is_there_and_no_other():
    for name in arf_plugin.__all__:
        assert getattr(arf_plugin, name).__name__ == name
    assert set(arf_plugin.__all__) <= set(dir(arf_plugin))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = arf_plugin.nothing


def test_build_anchors_builds_what_the_command_builds(built, arf, inputs: Inputs, tmp_path):
    flags = [word for name, value in SHORT.items() for word in (f"--{name.replace('_', '-')}", value)]
    arf("anchors", "--task-data", inputs.task, "--pool", inputs.pool, "--captioner", inputs.captioner,
        "--model", inputs.clip, "--out", tmp_path / "A", *flags)  # fmt: skip
    assert building.folder_bytes(Path(built.path)) == building.folder_bytes(tmp_path / "A")


def test_an_anchor_set_is_read(built):
    counts = built.counts()
    pairs = list(built.pairs())
    assert built.manifest["pairs"]["count"] == counts["pairs"] == len(pairs) > 10
    assert counts["captions"] == 21
    features = built.features
    assert (features.rows("captions"), features.rows("pairs")) == (21, counts["pairs"])
    identity = arf_plugin.sample_id("elsewhere/000.tar", "00003")
    assert len(built.captions_of(identity)) == 1 and built.captions_of("000/none") == []
    image, text = pairs[0]
    assert image.size == (40, 40) and ", number 10" in text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_of_the_pair_loader_shows_each_pair_once(built, workers):
    def pixels(image):
        return torch.from_numpy(np.array(image.convert("RGB").resize((8, 8)))).permute(2, 0, 1).float()

    def tokens(text):
        return torch.tensor([[int(text.rpartition(" ")[2])]])

    texts = [text for _, text in built.pairs()]
    whole = len(texts) // 2
    loader = iter(built.pair_loader(pixels, tokens, 2, workers=workers, seed=1))
    images, first = zip(*(next(loader) for _ in range(whole)), strict=True)
    assert images[0].shape == (2, 3, 8, 8)
    seen = torch.cat(first).flatten().tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= {int(text.rpartition(" ")[2]) for text in texts}
    assert len([next(loader) for _ in range(3 * whole)]) == 3 * whole  # it has no end
    again = iter(built.pair_loader(pixels, tokens, 2, workers=workers, seed=1))
    assert [next(again)[1].tolist() for _ in range(3)] == [texts.tolist() for texts in first[:3]]


def test_what_is_no_anchor_set_is_refused(tmp_path, inputs: Inputs):
    with pytest.raises(AnchorSetError, match=r"captions/\*.parquet"):
        arf_plugin.AnchorSet(tmp_path)
    with pytest.raises(FlagError, match="--kk 3"):
        arf_plugin.build_anchors(tmp_path / "A", inputs.task, captioner=inputs.captioner, kk=3)
    with pytest.raises(FlagError, match="--query-by"):
        arf_plugin.build_anchors(tmp_path / "A", inputs.task, captioner=inputs.captioner, query_by="colour")
    with pytest.raises(ArfError, match="captioner"):
        arf_plugin.build_anchors(tmp_path / "A", inputs.task)
    assert not (tmp_path / "A").exists()


def test_evaluate_and_interpolate_do_what_the_commands_do(arf, tmp_path):
    clip = evaluation.save_config(tmp_path / "clip")
    ends = [evaluation.save_checkpoint(clip, tmp_path / f"{seed}.pt", seed) for seed in (0, 1)]
    data = evaluation.write_set(tmp_path / "set")
    mixed = arf_plugin.interpolate(ends[0], ends[1], tmp_path / "mixed.pt", 0.25)
    arf("interpolate", *ends, "--alpha", 0.25, "--out", tmp_path / "other.pt")
    assert mixed.read_bytes() == (tmp_path / "other.pt").read_bytes()
    records = arf_plugin.evaluate([*ends, mixed], clip, data=[data], workers=0, out=tmp_path / "r.jsonl")
    arf("evaluate", *ends, mixed, "--model", clip, "--data", data, "--out", tmp_path / "s.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [record["metrics"] for record in records] == [line["metrics"] for line in lines]
    with pytest.raises(EvaluationError, match="data_root"):
        arf_plugin.evaluate(ends, clip)
    with pytest.raises(EvaluationError, match="alpha"):
        arf_plugin.interpolate(*ends, tmp_path / "no.pt", 1.5)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "arf_plugin", "--version"], capture_output=True, text=True)
    assert done.stdout == f"arf-plugin {arf_plugin.__version__}\n"


def test_fit_takes_the_names_of_the_command(tmp_path):
    for n in range(24):
        path = tmp_path / "images" / building.SHAPES[n % 3] / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(building.drawing(n))
    model = building.save_tiny_clip(tmp_path / "clip")
    how = {"seeds": 2, "keep": [], "set": {"epochs": 3}, "quiet": True, "dry_run": True}
    plan = arf_plugin.fit(tmp_path / "images", model, out=tmp_path / "fit", **how)
    assert plan["images"] == {"train": 21, "val": 3} and plan["runs"] == 2
    (tmp_path / "fit.yaml").write_text(f"images: {tmp_path / 'images'}\nmodel: {model}\nset: {{epochs: 3}}\n")
    again = arf_plugin.fit(config=tmp_path / "fit.yaml", **how)
    assert plan.pop("minutes")["training"] > 0 and again.pop("minutes").keys() and again == plan
    with pytest.raises(FitError, match="Did you mean 'seeds'"):
        arf_plugin.fit(tmp_path / "images", model, seed=2)
    with pytest.raises(FlagError, match="Did you mean '--epochs'"):
        arf_plugin.fit(tmp_path / "images", model, set={"epoch_s": 2})
    assert not (tmp_path / "fit").exists()
