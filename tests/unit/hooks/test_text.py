"""Trimmed texts: the same features and gradients from fewer positions, and towers that are left alone."""

from __future__ import annotations

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

from arf_plugin.data.trim import TextTrimmer
from arf_plugin.hooks.text import accept_trimmed, trimmer

CONTEXT, START, END, VOCABULARY = 77, 90, 99, 100
VISION = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2}


def build(kind=CLIP, **text) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(8, CLIPVisionCfg(**VISION), CLIPTextCfg(**{**TEXT, **text}), output_dict=True).double()


def texts(*lengths: int) -> torch.Tensor:
    """Tokens as CLIP's tokenizer makes them: start, words, end, zeros; of the given lengths."""
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, START, (length,))
        row[0], row[length - 1] = START, END
    return tokens


def features_and_gradients(model, tokens):
    model.zero_grad()
    features = model.encode_text(tokens, normalize=True)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("lengths", "expected"), [((3, 8), 8), ((3, 9), 16), ((2,), 8), ((77, 5), 77), ((73,), 77)]
)
@pytest.mark.parametrize("end_token", [None, END])
def test_length_is_that_of_the_longest_text(lengths, expected, end_token):
    trim = TextTrimmer(CONTEXT, end_token)
    assert trim.length(texts(*lengths)) == expected
    assert trim.length(*(texts(length) for length in lengths)) == expected


def test_end_of_text_counts_and_not_the_padding():
    """Some tokenizers pad with the end token itself, or with anything else."""
    tokens = texts(5, 6)
    tokens[0, 5:] = END
    tokens[1, 6:] = 7
    assert TextTrimmer(CONTEXT).length(tokens) == 8 and TextTrimmer(CONTEXT, END).length(tokens) == 8


@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_and_gradients_are_the_same(kind, pool, checkpointing):
    model = build(kind, pool_type=pool, eos_id=END)
    model.set_grad_checkpointing(checkpointing)
    tokens = texts(5, 13, 24)
    features, gradients = features_and_gradients(model, tokens)
    trim = trimmer(model)
    accept_trimmed(model)
    assert trim.length(tokens) == 24
    trimmed, trimmed_gradients = features_and_gradients(model, tokens[:, :24])
    torch.testing.assert_close(trimmed, features, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == trimmed_gradients.keys()
    for name, gradient in gradients.items():
        assert (trimmed_gradients[name] - gradient).norm() <= 1e-10 * gradient.norm(), name
    # Texts of full length pass as before, to the bit, and the weights have kept their names.
    assert torch.equal(model.encode_text(tokens, normalize=True), features)
    assert model.state_dict().keys() == build(kind, pool_type=pool, eos_id=END).state_dict().keys()


def test_the_transformer_sees_fewer_positions():
    """Where the time goes: without the hooks the same texts would not even pass."""
    model = build()
    tokens = texts(5, 13)[:, :16]
    with pytest.raises(RuntimeError, match="size"):
        model.encode_text(tokens)
    accept_trimmed(model)
    seen = []
    model.transformer.resblocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.encode_text(tokens)
    assert seen[0].shape == (2, 16, TEXT["width"])


def test_trimming_too_much_changes_features():
    """The comparison above can fail."""
    model = build()
    tokens = texts(5, 13)
    whole = model.encode_text(tokens)
    accept_trimmed(model)
    cut = model.encode_text(tokens[:, :8])
    assert torch.allclose(cut[0], whole[0]) and not torch.allclose(cut[1], whole[1], rtol=1e-3)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast(precision):
    model = build().float()
    tokens = texts(5, 13)
    with torch.autocast("cpu", dtype=precision):
        whole = model.encode_text(tokens, normalize=True)
        accept_trimmed(model)
        cut = model.encode_text(tokens[:, :16], normalize=True)
    assert cut.dtype == whole.dtype
    torch.testing.assert_close(cut, whole, rtol=0.02, atol=0.02)


@pytest.mark.process  # compiling takes seconds
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        (CustomTextCLIP, True),
        pytest.param(CLIP, False, marks=pytest.mark.slow),
        pytest.param(CLIP, True, marks=pytest.mark.slow),
        pytest.param(CustomTextCLIP, False, marks=pytest.mark.slow),
    ],
)
def test_under_compilation(kind, checkpointing):
    """Features stay, and lengths cost three compilations: for the first, for any other, for untrimmed texts."""
    torch._dynamo.reset()
    model, tokens, images = build(kind), texts(5, 13), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model.set_grad_checkpointing(checkpointing)
    whole, gradients = features_and_gradients(model, tokens)
    accept_trimmed(model)
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for length in (*range(16, CONTEXT, 8), CONTEXT):
        model.zero_grad()
        features = compiled(images, tokens[:, :length])["text_features"]
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        torch.testing.assert_close(features, whole, rtol=1e-10, atol=1e-10)
        for name, gradient in gradients.items():
            error = (model.get_parameter(name).grad - gradient).norm()
            assert error <= 1e-10 * gradient.norm(), (length, name)
    assert counter.frame_count == 3


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (CustomTextCLIP, {"no_causal_mask": True}, "no causal mask"),
        (CustomTextCLIP, {"pool_type": "last"}, "pooled by 'last'"),
        (CLIP, {"pool_type": "first"}, "pooled by 'first'"),
        (CustomTextCLIP, {"embed_cls": True}, "class token"),
    ],
)
def test_other_towers_are_left_alone(kind, text, reason):
    assert reason in trimmer(build(kind, **text))


def test_a_hugging_face_tower_is_left_alone(tmp_path):
    from transformers import BertConfig

    BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(tmp_path)
    model = build(
        CustomTextCLIP,
        hf_model_name=str(tmp_path),
        hf_model_pretrained=False,
        pool_type="cls_pooler",
        hf_tokenizer_name=str(tmp_path),
    )
    assert trimmer(model) == "its text tower is HFTextEncoder"
