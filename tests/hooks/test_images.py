"""Patch dropout for pair anchors alone."""

from __future__ import annotations

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import PatchDropout

from arf_plugin.data.batch import BatchLayout
from arf_plugin.errors import FlagError
from arf_plugin.hooks.images import drop_pair_patches

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
    drop_pair_patches(model, 0.5, lambda: LAYOUT)
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
    drop_pair_patches(model, 0.75, lambda: LAYOUT)
    model.encode_image(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    assert seen == [(3, 17, 16), (2, 5, 16)]


@pytest.mark.parametrize("case", ["evaluation", "other size", "no layout"])
def test_everything_else_passes_as_before(case):
    model, plain = build(), build()
    drop_pair_patches(model, 0.5, lambda: None if case == "no layout" else LAYOUT)
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
    drop_pair_patches(model, 0.5, lambda: LAYOUT)
    model.encode_image(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    assert seen == [13, 9]


def test_other_towers_are_refused():
    with pytest.raises(FlagError, match="ModifiedResNet"):
        drop_pair_patches(build(layers=(1, 1, 1, 1), width=8, patch_size=None), 0.5, lambda: LAYOUT)
