"""Patch dropout for pair anchors alone."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, resize_pos_embed
from open_clip.transformer import PatchDropout

from arf_plugin.data.batch import BatchLayout, DeviceConcat
from arf_plugin.errors import FlagError
from arf_plugin.hooks.images import shrink_pairs

TEXT = CLIPTextCfg(context_length=8, vocab_size=20, width=16, heads=2, layers=1)
LAYOUT = BatchLayout(task=3, captions=True, pairs=2)


def build(**vision) -> CLIP:
    torch.manual_seed(0)
    size = {"image_size": 32, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
    return CLIP(8, CLIPVisionCfg(**{**size, **vision}), TEXT).double()


def features_and_gradients(model, images):
    """With the random numbers of a fixed seed."""
    model.zero_grad()
    torch.manual_seed(1)
    features = model.encode_image(images)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {n: p.grad.clone() for n, p in model.visual.named_parameters()}


def reference(images):
    """Stock open_clip: task images through a tower without dropout, pairs through the same tower with it."""
    model = build()
    task = model.encode_image(images[:3])
    model.visual.patch_dropout = PatchDropout(0.5)
    torch.manual_seed(1)
    features = torch.cat([task, model.encode_image(images[3:])])
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {n: p.grad.clone() for n, p in model.visual.named_parameters()}


def test_equals_two_passes_of_stock_open_clip():
    model, images = build(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    shrink_pairs(model, lambda: LAYOUT, dropout=0.5)
    features, gradients = features_and_gradients(model, images)
    expected, expected_gradients = reference(images)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-10 * gradient.norm(), name
    plain, _ = features_and_gradients(build(), images)
    assert torch.allclose(features[:3], plain[:3]) and not torch.allclose(features[3:], plain[3:], rtol=1e-3)


def test_fewer_tokens_pass_the_transformer():
    model, seen = build(), []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[0].shape))
    )
    shrink_pairs(model, lambda: LAYOUT, dropout=0.75)
    model.encode_image(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    assert seen == [(3, 17, 16), (2, 5, 16)]


@pytest.mark.parametrize("case", ["evaluation", "other size", "no layout"])
def test_everything_else_passes_as_before(case):
    model, plain = build(), build()
    shrink_pairs(model, lambda: None if case == "no layout" else LAYOUT, dropout=0.5)
    if case == "evaluation":
        model.eval()
    images = torch.randn(4 if case == "other size" else 5, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(model.encode_image(images), plain.encode_image(images))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_keeps_the_dropout_of_all_images():
    """--force-patch-dropout and this flag together: each kind of image has its own share."""
    model, seen = build(patch_dropout=0.25), []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1])
    )
    shrink_pairs(model, lambda: LAYOUT, dropout=0.5)
    model.encode_image(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    assert seen == [13, 9]


def test_other_towers_are_refused():
    with pytest.raises(FlagError, match="ModifiedResNet"):
        shrink_pairs(build(layers=(1, 1, 1, 1), width=8, patch_size=None), lambda: LAYOUT, dropout=0.5)


SMALL = BatchLayout(task=3, captions=True, pairs=5, pair_rows=2)


def small_reference(task, pairs):
    """Stock open_clip: the same tower for images of 16 pixels, with the position embedding that it interpolates."""
    model, other = build(), build(image_size=16)
    weights = dict(model.visual.named_parameters())
    resized = {f"visual.{name}": weight for name, weight in weights.items()}
    resize_pos_embed(resized, other)
    other = torch.func.functional_call(
        other.visual, {name.removeprefix("visual."): weight for name, weight in resized.items()}, (pairs,)
    )
    features = torch.cat([model.visual(task), other])
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {name: weight.grad.clone() for name, weight in weights.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_smaller_pairs_equal_a_stock_tower_of_their_size(checkpointing, compiled):
    task, pairs = (torch.randn(n, 3, s, s, dtype=torch.float64) for n, s in ((3, 32), (5, 16)))
    model = build()
    model.set_grad_checkpointing(checkpointing)
    shrink_pairs(model, lambda: SMALL, size=16)
    images = DeviceConcat(task, pairs).to(torch.float64)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    features = run(images, None)[0] if compiled else model.encode_image(images)
    expected, expected_gradients = small_reference(task, pairs)
    if compiled:  # normalised
        expected_gradients, expected = {}, torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-12)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    for name, gradient in expected_gradients.items():
        found = model.visual.get_parameter(name).grad
        assert (found - gradient).norm() <= 1e-10 * gradient.norm(), name
    assert model.state_dict().keys() == build().state_dict().keys()


def test_smaller_pairs_may_drop_patches_too():
    model, seen = build(), []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[0].shape))
    )
    shrink_pairs(model, lambda: SMALL, size=16, dropout=0.5)
    model.encode_image(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    assert seen == [(3, 17, 16), (5, 3, 16)]


def test_positions_keep_their_precision_under_autocast():
    """What is interpolated has the tower's own precision, not autocast's."""
    model, images = build().float(), torch.randn(5, 3, 32, 32)
    whole = []
    model.visual.patch_dropout.register_forward_hook(lambda module, inputs, output: whole.append(output))
    shrink_pairs(model, lambda: SMALL, size=16)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.encode_image(images)
    assert whole[3].dtype == torch.bfloat16
    torch.testing.assert_close(whole[3].float(), whole[1], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("size", [32, 64, 20])
def test_other_sizes_are_refused(size):
    with pytest.raises(
        FlagError, match=f"--arf-pair-image-size {size}: expected a multiple of the patches' 8"
    ):
        shrink_pairs(build(), lambda: SMALL, size=size)


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"size": 16}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_copy_of_the_model_is_one_of_its_own(options, training):
    """As open_clip 4 makes one for a moving average of the weights: its features follow its weights alone."""
    model = build()
    shrink_pairs(model, lambda: SMALL, **options)
    copied = copy.deepcopy(model).train(training)
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    before = copied.encode_image(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.manual_seed(1)
    assert torch.equal(copied.encode_image(images), before) and before.abs().sum() > 0
    with torch.no_grad():
        for parameter in copied.visual.parameters():
            parameter.zero_()
    assert not copied.encode_image(images).any()
