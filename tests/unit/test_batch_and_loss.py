"""Concatenating and splitting batches, and the anchored loss against open_clip's losses called one by one."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch.nn.functional import normalize

from arf_plugin.data.batch import BatchLayout, DeviceConcat
from arf_plugin.losses.anchored import AnchoredLoss

LAYOUTS = [
    BatchLayout(task=4, captions=True, pairs=3),
    BatchLayout(task=4, captions=True),
    BatchLayout(task=4, pairs=6),
    BatchLayout(task=4),
]


def features(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, 8, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_split_undoes_concatenation_micro_batch_by_micro_batch(layout, count):
    images = [[features(size, 10 * n + i) for i, size in enumerate(layout.image_sizes)] for n in range(count)]
    texts = [
        [features(size, 100 + 10 * n + i) for i, size in enumerate(layout.text_sizes)] for n in range(count)
    ]
    for parts, split in ((images, layout.split_images), (texts, layout.split_texts)):
        joined = torch.cat([DeviceConcat(*micro).to(torch.float64) for micro in parts])
        for position, part in enumerate(split(joined)):
            assert torch.equal(part, torch.cat([micro[position] for micro in parts]))


def test_a_wrong_number_of_features_is_refused():
    with pytest.raises(ValueError, match="8 image features are no multiple of the micro-batch's 7"):
        LAYOUTS[0].split_images(features(8, 0))


@pytest.mark.parametrize("base", [ClipLoss, SigLipLoss])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
def test_anchored_loss_is_the_weighted_sum_of_the_base_losses(base, layout, weights):
    caption_weight, pair_weight = weights
    extra = {
        "logit_scale": torch.tensor(14.0),
        **({"logit_bias": torch.tensor(-3.0)} if base is SigLipLoss else {}),
    }
    x, x_a = features(4, 0), features(layout.pairs, 1)
    t_cls, t_cap, t_a = features(4, 2), features(4 if layout.captions else 0, 3), features(layout.pairs, 4)
    found = AnchoredLoss(base, layout, caption_weight, pair_weight)(
        image_features=torch.cat([x, x_a]),
        text_features=torch.cat([t_cls, t_cap, t_a]),
        **extra,
        output_dict=True,
    )
    expected = {"contrastive_loss": base()(x, t_cls, **extra)}
    if layout.captions:
        expected["caption_anchor_loss"] = caption_weight * base()(x, t_cap, **extra)
    if layout.pairs:
        expected["pair_anchor_loss"] = pair_weight * base()(x_a, t_a, **extra)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)


def test_without_output_dict_the_terms_are_summed():
    layout = LAYOUTS[0]
    outputs = {
        "image_features": features(7, 0),
        "text_features": features(11, 1),
        "logit_scale": torch.tensor(10.0),
    }
    loss = AnchoredLoss(ClipLoss, layout, 0.5, 2.0)
    torch.testing.assert_close(loss(**outputs), sum(loss(**outputs, output_dict=True).values()))


def test_a_teachers_features_are_split_too():
    layout = LAYOUTS[0]
    scale = torch.tensor(10.0)
    student, teacher = (features(7, 0), features(11, 1)), (features(7, 2), features(11, 3))
    found = AnchoredLoss(DistillClipLoss, layout)(
        image_features=student[0],
        text_features=student[1],
        logit_scale=scale,
        dist_image_features=teacher[0],
        dist_text_features=teacher[1],
        dist_logit_scale=scale,
        output_dict=True,
    )
    pair = DistillClipLoss()(student[0][4:], student[1][8:], scale, teacher[0][4:], teacher[1][8:], scale)
    torch.testing.assert_close(found["pair_anchor_loss"], sum(pair))
    assert set(found) == {"contrastive_loss", "distill_loss", "caption_anchor_loss", "pair_anchor_loss"}
