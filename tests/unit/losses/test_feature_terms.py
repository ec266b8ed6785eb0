"""The terms of features by hand; tests/support/steps.py compares their gradients in the real trainer."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn.functional import normalize

from arf_plugin.data.batch import OptimizerStep
from arf_plugin.losses.anchored import AnchoredLoss
from arf_plugin.losses.features import MEAN, DifferenceTerm

A, B, D = 3, 4, 8


def features(count: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, D, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def noted(step: OptimizerStep, number: int, seed: int, anchors: bool = True) -> dict[str, torch.Tensor]:
    """Notes a micro-batch with cached features of its own, and returns these."""
    batch = {"image": torch.zeros(B, 1), "text": torch.zeros(B, 1)}
    cached = {
        "pair_image_feature": features(A, seed, torch.float32),
        "pair_text_feature": features(A, seed + 1, torch.float32),
        "caption_text_feature": features(B, seed + 2, torch.float32),
    }
    if anchors:
        batch |= {
            "caption_text": torch.zeros(B, 1),
            "pair_image": torch.zeros(A, 1),
            "pair_text": torch.zeros(A, 1),
        }
        batch |= cached
    step.note(number, batch)
    return cached


def outputs(seed: int, micro: int = 1) -> dict[str, torch.Tensor]:
    """What a model returns for micro-batches with anchors."""
    image, text = features(micro * (B + A), seed), features(micro * (2 * B + A), seed + 1)
    return {"image_features": image, "text_features": text, "logit_scale": torch.tensor(14.0)}


def squared(*vectors: torch.Tensor) -> torch.Tensor:
    return sum((each**2).sum(-1) for each in vectors).mean()


def test_both_terms_of_features_and_none_of_the_base_loss():
    step = OptimizerStep()
    cached, out = noted(step, 0, 10), outputs(0)
    loss = AnchoredLoss(ClipLoss, step, 2.0, 10.0, 3, caption_loss="feature", pair_loss="feature")
    found = loss(**out, output_dict=True)
    f, g = out["image_features"][B:], out["text_features"][2 * B :]
    pairs = squared(f - cached["pair_image_feature"], g - cached["pair_text_feature"])
    captions = squared(out["text_features"][B : 2 * B] - cached["caption_text_feature"])
    torch.testing.assert_close(found["pair_anchor_loss"], 30 * pairs, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["caption_anchor_loss"], 6 * captions, rtol=1e-12, atol=0)
    task = ClipLoss()(out["image_features"][:B], out["text_features"][:B], out["logit_scale"])
    torch.testing.assert_close(found["contrastive_loss"], task)
    noted(step, 1, 20, anchors=False)
    plain = {
        "image_features": features(B, 1),
        "text_features": features(B, 2),
        "logit_scale": torch.tensor(14.0),
    }
    assert loss(**plain, output_dict=True)["pair_anchor_loss"] == 0


def test_the_mean_of_differences_follows_the_steps_once_each():
    """Two micro-batches per step, so two calls; the mean is the one before the step in both."""
    step, mean, state = OptimizerStep(2), torch.zeros(D, dtype=torch.float64), {}
    loss = AnchoredLoss(ClipLoss, step, None, 1.0, pair_loss="difference")
    loss.pair_anchor.state = state
    for number in range(3):
        cached = [noted(step, 2 * number + n, 100 * number + 10 * n) for n in range(2)]
        out = outputs(number, micro=2)
        images, texts = (step.split_images, step.split_texts)
        u = images(out["image_features"])[1] - torch.cat([each["pair_image_feature"] for each in cached])
        v = texts(out["text_features"])[2] - torch.cat([each["pair_text_feature"] for each in cached])
        for _ in range(2):
            found = loss(**out, output_dict=True)["pair_anchor_loss"]
            torch.testing.assert_close(found, squared(u - mean, v - mean, u - v), rtol=1e-12, atol=0)
        mean = 0.99 * mean + 0.01 * (u.mean(0) + v.mean(0)) / 2
        torch.testing.assert_close(state[MEAN], mean, rtol=1e-12, atol=0)


def test_a_mean_that_a_checkpoint_has_brought_is_used_and_has_no_gradient():
    step, term = OptimizerStep(), DifferenceTerm()
    cached = noted(step, 0, 5)
    term.state = {MEAN: torch.full((D,), 0.25)}
    f, g = features(A, 1).requires_grad_(), features(A, 2).requires_grad_()
    term({"image_features": f, "text_features": g}, step).backward()
    assert not term.state[MEAN].requires_grad
    u, v = f - cached["pair_image_feature"], g - cached["pair_text_feature"]
    torch.testing.assert_close(f.grad, (2 * (u - 0.25) + 2 * (u - v)).detach() / A)


@pytest.mark.parametrize("pair_loss", ["feature", "difference"])
def test_gradients_of_micro_batches_add_up_to_that_of_the_whole_batch(pair_loss):
    """As open_clip accumulates: each call sees all features, and one micro-batch's with gradient."""
    step = OptimizerStep(2)
    for n in range(2):
        noted(step, n, 10 * n)
    whole = {name: value.requires_grad_(name != "logit_scale") for name, value in outputs(0, micro=2).items()}
    loss = AnchoredLoss(ClipLoss, step, 10.0, 10.0, caption_loss="feature", pair_loss=pair_loss)

    def value(given: dict[str, torch.Tensor]) -> torch.Tensor:
        terms = loss(**given, output_dict=True)
        return terms["caption_anchor_loss"] + terms["pair_anchor_loss"]

    names = ("image_features", "text_features")
    expected = torch.autograd.grad(value(whole), [whole[name] for name in names])
    parts = {name: [part.detach().requires_grad_() for part in whole[name].chunk(2)] for name in names}
    for n in range(2):
        joined = {
            name: torch.cat([part if at == n else part.detach() for at, part in enumerate(parts[name])])
            for name in names
        }
        value({**whole, **joined}).backward()
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(
            torch.cat([part.grad for part in parts[name]]), gradient, rtol=1e-12, atol=1e-15
        )


def test_features_of_16_bits_are_compared_in_32():
    step = OptimizerStep()
    noted(step, 0, 3)
    out = {name: value.bfloat16() for name, value in outputs(0).items()}
    loss = AnchoredLoss(ClipLoss, step, None, 1.0, pair_loss="difference")
    assert loss(**out, output_dict=True)["pair_anchor_loss"].dtype == torch.float32
    assert loss.pair_anchor.state[MEAN].dtype == torch.float32
