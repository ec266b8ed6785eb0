"""Checkpoints in every form that open_clip loads: measured as they are, mixed with each other, never random in part."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from support import releases
from support.evaluation import save_config, weights

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.candidates import Candidate
from arf_plugin.evaluation.checkpoints import (
    fitted,
    load_into,
    open_checkpoint,
    plain_name,
    read_weights,
    write_weights,
)
from arf_plugin.evaluation.merging import interpolate_files

pytestmark = releases.FOLDERS_OF_MODELS
POSITIONS = "visual.positional_embedding"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return save_config(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def plain(clip) -> dict[str, torch.Tensor]:
    """Weights of a CLIP."""
    return weights(clip, 1)


def save(path: Path, state: dict[str, torch.Tensor], **more) -> Path:
    torch.save({"epoch": 1, "state_dict": state, "optimizer": {}, **more}, path)
    return path


def loaded(name: str, path: Path, **model) -> torch.nn.Module:
    """A model of random weights, with a checkpoint loaded into it as evaluation does."""
    torch.manual_seed(99)
    built = open_clip.create_model(name, **model)
    load_into(built, path)
    return built.eval()


def as_open_clip(name: str, path: Path, **model) -> torch.nn.Module:
    """The same by open_clip alone."""
    torch.manual_seed(77)
    built = open_clip.create_model(name, **model)
    open_clip.load_checkpoint(built, str(path))
    return built.eval()


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = other.state_dict()
    assert theirs.keys() == one.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_distributed_models(clip, plain, tmp_path, prefix):
    save(tmp_path / "plain.pt", plain)
    path = save(tmp_path / "a.pt", {f"{prefix}{name}": tensor for name, tensor in plain.items()})
    assert_equal(loaded(clip, path), as_open_clip(clip, tmp_path / "plain.pt"))


def test_wrappers_inside_of_names():
    assert plain_name("visual._fsdp_wrapped_module.proj") == "visual.proj"
    assert (
        plain_name("text._orig_mod.transformer._checkpoint_wrapped_module.weight")
        == "text.transformer.weight"
    )
    assert (
        plain_name("visual.trunk.module.weight") == "visual.trunk.module.weight"
    )  # a layer may be called so


def test_one_name_twice_is_refused(clip, plain, tmp_path):
    path = save(tmp_path / "a.pt", {**plain, "module._orig_mod.visual.proj": plain["visual.proj"]})
    with pytest.raises(
        EvaluationError, match=r"holds 'visual\.proj' twice, once as 'module\._orig_mod\.visual"
    ):
        load_into(open_clip.create_model(clip), path)


def test_a_bias_of_the_loss_more_or_less(clip, plain, tmp_path):
    biased = save(tmp_path / "biased.pt", {**plain, "logit_bias": torch.tensor(-7.0)})
    unbiased = save(tmp_path / "unbiased.pt", plain)
    assert_equal(loaded(clip, biased), as_open_clip(clip, unbiased))
    model = loaded(clip, unbiased, init_logit_bias=-10.0)
    assert_equal(model, as_open_clip(clip, unbiased, init_logit_bias=-10.0))
    assert float(model.logit_bias.detach()) == 0.0
    assert float(loaded(clip, biased, init_logit_bias=-10.0).logit_bias.detach()) == -7.0


@pytest.mark.parametrize(("size", "length"), [(48, 16), (32, 24), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_size_is_interpolated_with_a_word(clip, plain, tmp_path, size, length, dtype):
    path = save(tmp_path / "a.pt", {name: tensor.to(dtype) for name, tensor in plain.items()})
    whole = save(tmp_path / "b.pt", {name: tensor.to(dtype).float() for name, tensor in plain.items()})
    form = {"force_image_size": size, "force_context_length": length}
    with pytest.warns(UserWarning, match="as open_clip does") as said:
        model = loaded(clip, path, **form)
    assert_equal(model, as_open_clip(clip, whole, **form))
    flags = [
        str(each.message).rpartition(": ")[2] for each in said if "as open_clip does" in str(each.message)
    ]
    expected = ["--force-context-length 16"] * (length != 16) + ["--force-image-size 32"] * (size != 32)
    assert sorted(flags) == expected


def test_the_same_size_is_taken_without_a_word(clip, plain, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(clip, save(tmp_path / "a.pt", plain))


def test_names_of_older_text_towers(clip, plain, tmp_path):
    path = save(tmp_path / "a.pt", plain)
    model = loaded(clip, path, force_custom_text=True)
    assert_equal(model, as_open_clip(clip, path, force_custom_text=True))
    assert torch.equal(model.text.token_embedding.weight, plain["token_embedding.weight"])


def test_half_precision_and_sizes_that_openai_keeps(clip, plain, tmp_path):
    sizes = {name: torch.tensor(16) for name in ("input_resolution", "context_length", "vocab_size")}
    path = save(tmp_path / "a.pt", {**{name: t.bfloat16() for name, t in plain.items()}, **sizes})
    model = loaded(clip, path)
    assert model.visual.proj.dtype == torch.float32
    assert torch.equal(model.visual.proj, plain["visual.proj"].bfloat16().float())


@pytest.mark.parametrize("missing", ["visual.proj", "ln_final.bias", "logit_scale", "token_embedding.weight"])
def test_nothing_stays_random(clip, plain, tmp_path, missing):
    path = save(tmp_path / "a.pt", {name: tensor for name, tensor in plain.items() if name != missing})
    with pytest.raises(EvaluationError, match="of another architecture than --model") as error:
        load_into(open_clip.create_model(clip), path)
    assert missing in str(error.value)
    with pytest.raises(EvaluationError, match=missing):
        interpolate_files(path, save(tmp_path / "b.pt", plain), 0.5, tmp_path / "out.pt")


def test_what_open_clip_stumbles_over_is_one_sentence(clip, plain, tmp_path):
    narrow = {**plain, "positional_embedding": torch.zeros(24, 7)}  # open_clip asserts an equal width
    with pytest.raises(EvaluationError, match="of another architecture than --model"):
        load_into(open_clip.create_model(clip), save(tmp_path / "a.pt", narrow))
    model = open_clip.create_model(clip)
    assert model.load_state_dict.__func__ is torch.nn.Module.load_state_dict  # put back


def test_position_ids_of_hugging_face_towers(tmp_path):
    from support.building import save_word_tokenizer
    from transformers import BertConfig

    folder = tmp_path / "hf"
    folder.mkdir()
    words = save_word_tokenizer(folder)
    layers = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=words, max_position_embeddings=32, **layers).save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_tokenizer_name": str(folder), "context_length": 16}
    text |= {"hf_model_pretrained": False, "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    state = open_clip.CustomTextCLIP(**config).state_dict()
    old = {**state, "text.transformer.embeddings.position_ids": torch.arange(32)[None]}
    tuned, path = save(tmp_path / "tuned.pt", state), save(tmp_path / "old.pt", old)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_hf=False)
    load_into(model, path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for ends in ((path, tuned), (tuned, path)):
        interpolate_files(*ends, 0.5, tmp_path / "mixed.pt")
        load_into(model, tmp_path / "mixed.pt")


def test_a_clip_is_mixed_with_what_siglip_made_of_it(clip, plain, tmp_path):
    """open_clip starts such a run with a bias of zero, so that is the original's end."""
    tuned = {**weights(clip, 2), "logit_bias": torch.tensor(-8.0)}
    ends = save(tmp_path / "plain.pt", plain), save(tmp_path / "tuned.pt", tuned)
    interpolate_files(*ends, 0.25, tmp_path / "mixed.pt")
    found = read_weights(tmp_path / "mixed.pt")
    assert found.keys() == tuned.keys() and float(found["logit_bias"]) == -2.0
    for kind in ({}, {"init_logit_bias": -10.0}):
        model = open_clip.create_model(clip, **kind)
        Candidate(ends[1], ends[0], 0.25).load(model)
        assert_equal(model, loaded(clip, tmp_path / "mixed.pt", **kind))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_mixture_with_a_run_of_another_image_size(clip, plain, tmp_path, alpha):
    """Equal, whether it is written or made in the model; also where the model's size is that of neither."""
    torch.manual_seed(5)
    model = open_clip.create_model(clip, force_image_size=48, force_context_length=24)
    ends = save(tmp_path / "plain.pt", plain), save(tmp_path / "tuned.pt", model.state_dict())
    interpolate_files(*ends, alpha, tmp_path / "mixed.pt")
    if alpha == 0.0:
        start = as_open_clip(clip, ends[0], force_image_size=48, force_context_length=24).state_dict()
        mixed = read_weights(tmp_path / "mixed.pt")
        assert all(torch.equal(tensor, start[name]) for name, tensor in mixed.items())
    for form in ({"force_image_size": 48, "force_context_length": 24}, {}, {"force_custom_text": True}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = open_clip.create_model(clip, **form)
            Candidate(ends[1], ends[0], alpha).load(found)
            assert_equal(found, loaded(clip, tmp_path / "mixed.pt", **form))


def test_sizes_that_are_no_grid_are_not_guessed(plain, tmp_path):
    odd = {**plain, POSITIONS: torch.zeros(8, 32)}
    with pytest.raises(EvaluationError, match="different architectures"):
        interpolate_files(
            save(tmp_path / "a.pt", plain), save(tmp_path / "b.pt", odd), 0.5, tmp_path / "out.pt"
        )


def test_big_vision_files(clip, plain, tmp_path):
    """What open_clip refuses or leaves out is said; an array that would be unpickled is not read."""
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "objects.npz", **{"params/img/embedding/kernel": np.array([{}], dtype=object)})
    (tmp_path / "empty.npz").touch()
    for name in ("other.npz", "objects.npz", "empty.npz"):
        with pytest.raises(
            EvaluationError, match=rf"{name} cannot be loaded into --model as weights of Big Vision"
        ):
            load_into(open_clip.create_model(clip), tmp_path / name)


def test_converted_weights_are_not_copied(clip, plain, tmp_path):
    model = open_clip.create_model(clip, force_custom_text=True)
    found = fitted(model, plain, tmp_path / "a.pt")
    same = {id(tensor) for tensor in plain.values()}
    assert all(id(tensor) in same for tensor in found.values())


def test_a_checkpoint_tells_of_its_run(plain, tmp_path):
    for name in ("a.pt", "a.safetensors"):
        write_weights(tmp_path / name, plain, "x", '{"image_mean": [0.1, 0.2, 0.3]}')
        assert json.loads(open_checkpoint(tmp_path / name).run) == {"image_mean": [0.1, 0.2, 0.3]}
        interpolate_files(tmp_path / name, tmp_path / name, 0.5, tmp_path / f"mixed-{name}")
        assert json.loads(open_checkpoint(tmp_path / f"mixed-{name}").run) == {"image_mean": [0.1, 0.2, 0.3]}
