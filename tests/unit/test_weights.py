"""Which weights came from a file: no stage uses a model that is random, in whole or in part."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import building
from torch import nn

from arf_plugin.errors import FlagError, StageError
from arf_plugin.pipeline.captioner import Captioner
from arf_plugin.pipeline.embedder import load_model, model_identity
from arf_plugin.pipeline.generation import Generation
from arf_plugin.safe_loading import safe_loading
from arf_plugin.weights import watching

WEIGHTS = "open_clip_model.safetensors"
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configuration and weights."""
    return Path(building.save_tiny_clip(tmp_path_factory.mktemp("clip") / "X").removeprefix("local-dir:"))


@pytest.fixture
def bare(whole: Path, tmp_path: Path) -> Path:
    """The same folder without the weights."""
    folder = tmp_path / "X"
    folder.mkdir()
    for path in whole.iterdir():
        if path.name != WEIGHTS:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def load(folder: Path, pretrained: object = None) -> dict[str, torch.Tensor]:
    model, _, _ = load_model(
        f"local-dir:{folder}", None if pretrained is None else str(pretrained), CPU, FP32
    )
    return model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_folder_without_weights_is_refused(bare: Path):
    with pytest.raises(StageError, match=r"X has no weights \(\*\.safetensors, .*--pretrained"):
        load(bare)


def test_a_file_gives_a_folder_without_weights_its_own(whole: Path, bare: Path):
    assert same(load(bare, whole / WEIGHTS), load(whole))


def test_a_file_takes_the_place_of_a_folders_weights(whole: Path, tmp_path: Path):
    other = {name: value + 1 for name, value in load_file(whole / WEIGHTS).items()}
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in other.items()}},
        tmp_path / "e.pt",
    )
    assert same(load(whole, tmp_path / "e.pt"), other)
    name = f"local-dir:{whole}"
    identities = [model_identity(name, None), model_identity(name, str(tmp_path / "e.pt"))]
    (tmp_path / "e.pt").write_bytes(b"another")
    identities.append(model_identity(name, str(tmp_path / "e.pt")))
    assert len({identity["weights"] for identity in identities}) == 3


@pytest.mark.parametrize("pretrained", ["openai", "no/such/file.pt"])
def test_what_open_clip_would_pass_over_is_refused(whole: Path, pretrained: str):
    with pytest.raises(FlagError, match=r"is no file, and --model local-dir:.* brings its own weights along"):
        load(whole, pretrained)


def test_a_pipe_is_no_file(whole: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(FlagError, match="is no file"):
        load(whole, tmp_path / "pipe.pt")


def test_a_name_needs_weights_that_exist():
    with pytest.raises(FlagError, match="needs weights"):
        load_model("ViT-B-32", None, CPU, FP32)
    with pytest.raises(StageError, match=r"is not a known tag or valid file path"):
        load_model("ViT-B-32", "no-such-tag", CPU, FP32)


@pytest.mark.parametrize("change", ["missing", "renamed", "cut", "of another model", "empty"])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_sentence(
    whole: Path, bare: Path, tmp_path: Path, change: str
):
    weights, path = load_file(whole / WEIGHTS), tmp_path / "c.safetensors"
    victim = next(name for name in weights if name.endswith("ln_final.weight"))
    if change == "missing":
        del weights[victim]
    elif change == "renamed":
        weights["other"] = weights.pop(victim)
    elif change == "of another model":
        weights = {"fc.weight": torch.zeros(3, 3)}
    elif change == "empty":
        weights = {}
    save_file(weights, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StageError) as caught:
        load(bare, path)
    assert len(str(caught.value)) < 1000


def test_weights_that_a_loader_leaves_out_are_named(whole: Path, monkeypatch: pytest.MonkeyPatch):
    """As a loader that copies tensor by tensor, or is not strict, may do."""

    def partial(model: nn.Module, path: str, *args: object, **kwargs: object) -> None:
        weights = load_file(path)
        del weights["visual.proj"]
        model.load_state_dict(weights, strict=False)

    monkeypatch.setattr(open_clip.factory, "load_checkpoint", partial)
    with pytest.raises(
        StageError, match=r"1 of about \d+ weights of the model .* would be random: visual\.proj\."
    ):
        load(whole)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.two.weight = self.one.weight  # tied


def test_what_is_watched():
    with watching() as loaded:
        model = Small()
        assert loaded.random_parts(model) == ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
                                              "one.weight", "two.weight"]  # fmt: skip
        model.load_state_dict({"two.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)}, strict=False)
        assert loaded.random_parts(model.half()) == ["norm.bias", "norm.running_mean", "norm.running_var"]
        model.norm.load_state_dict(nn.BatchNorm1d(2).state_dict())
    assert loaded.random_parts(model) == []
    assert nn.Module.load_state_dict.__module__ == "torch.nn.modules.module"
    assert not hasattr(nn.Module.load_state_dict, "__wrapped__")


def save_with_text_tower(folder: Path) -> Path:
    """A model whose text tower is one of transformers, in the tower's folder; returns the model's own."""
    from transformers import BertConfig, BertModel

    tower = folder / "tower"
    words = building.save_word_tokenizer(tower)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=words, **sizes), add_pooling_layer=False).save_pretrained(tower)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower), "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear"}  # fmt: skip
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    model = folder / "model"
    building.save_word_tokenizer(model)
    (model / "open_clip_config.json").write_text(json.dumps(config))
    return model


def test_a_text_tower_of_transformers(tmp_path: Path):
    folder = save_with_text_tower(tmp_path)
    with watching() as loaded:
        model = open_clip.create_model(f"local-dir:{folder}")
    random = loaded.random_parts(model)
    assert any(name.startswith("visual.") for name in random) and "text.proj.weight" in random
    assert not any(name.startswith("text.transformer.") for name in random), (
        "the tower brought its weights along"
    )

    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    assert same(load(folder), model.state_dict()), "the checkpoint has all: no stage refuses it"

    tower = tmp_path / "tower/model.safetensors"
    weights = load_file(tower)
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tower, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    with watching() as loaded:
        model = open_clip.create_model(f"local-dir:{folder}")
    assert [name for name in loaded.random_parts(model) if name.startswith("text.transformer.")] == [
        "text.transformer.encoder.layer.0.output.dense.weight"
    ]


def caption_with(folder: Path) -> Captioner:
    return Captioner(str(folder), CPU, FP32, Generation())


@pytest.mark.parametrize("kind", ["encoder decoder", "blip"])
def test_a_captioner_with_weights_missing_is_refused(tmp_path: Path, kind: str):
    (building.save_tiny_captioner if kind == "encoder decoder" else building.save_tiny_blip)(tmp_path)
    caption_with(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    victim = next(name for name in weights if name.endswith("query.weight") or name.endswith("c_attn.weight"))
    del weights[victim]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(StageError, match=r"^1 weights of the captioner .* would be random") as caught:
        caption_with(tmp_path)
    assert victim.rsplit(".", 1)[0].rsplit(".", 1)[-1] in str(caught.value)


class Program:
    """What a hostile pickle holds."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self):
        return Path.touch, (self._proof,)


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_pickled_weights_of_a_captioner_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder, proof = tmp_path / "captioner", tmp_path / "proof"
    building.save_tiny_captioner(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    caption_with(folder)  # tensors alone are fine
    torch.save(weights | {"x": Program(proof)}, folder / "pytorch_model.bin")
    with pytest.raises(StageError, match="cannot be loaded as an image captioner"):
        caption_with(folder)
    assert not proof.exists()


def test_torch_load_reads_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": Program(tmp_path / "proof")}, tmp_path / "w.pt")
    with safe_loading(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pt")
    assert not (tmp_path / "proof").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
