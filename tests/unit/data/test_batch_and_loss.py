"""Concatenating and splitting batches, and the anchored loss against open_clip's losses called one by one."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch.nn.functional import normalize

from arf_plugin.data.batch import BatchLayout, DeviceConcat, OptimizerStep, as_dictionary, as_tuple, collate
from arf_plugin.data.trim import TextTrimmer
from arf_plugin.losses.anchored import AnchoredLoss

LAYOUTS = [
    BatchLayout(task=4, captions=True, pairs=3),
    BatchLayout(task=4, captions=True),
    BatchLayout(task=4, pairs=6),
    BatchLayout(task=4),
]


def batch_of(layout: BatchLayout) -> dict[str, torch.Tensor]:
    """A batch with the parts of a layout, of one number each."""
    sizes = {"image": layout.task, "text": layout.task, "pair_image": layout.pairs, "pair_text": layout.pairs}
    sizes["caption_text"] = layout.task if layout.captions else 0
    return {name: torch.zeros(size, 1) for name, size in sizes.items() if size}


def step_of(layout: BatchLayout, count: int = 1) -> OptimizerStep:
    """An optimizer step of so many micro-batches of a layout."""
    step = OptimizerStep(count)
    for number in range(count):
        step.note(number, batch_of(layout))
    return step


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
    step = step_of(layout, count)
    for parts, split in ((images, step.split_images), (texts, step.split_texts)):
        joined = torch.cat([DeviceConcat(*micro).to(torch.float64) for micro in parts])
        for position, part in enumerate(split(joined)):
            assert torch.equal(part, torch.cat([micro[position] for micro in parts]))


def test_a_wrong_number_of_features_is_refused():
    with pytest.raises(ValueError, match=r"8 image features, expected 7: \[\[4, 3\]\] of the step's"):
        step_of(LAYOUTS[0]).split_images(features(8, 0))


def test_micro_batches_of_different_layouts_are_split_by_their_own():
    step = OptimizerStep(2)
    for number, layout in enumerate((LAYOUTS[0], LAYOUTS[3])):
        step.note(number, batch_of(layout))
    task, captions, pairs = step.split_texts(torch.arange(4 + 4 + 3 + 4)[:, None])
    assert task[:, 0].tolist() == [0, 1, 2, 3, 11, 12, 13, 14]
    assert (captions[:, 0].tolist(), pairs[:, 0].tolist()) == ([4, 5, 6, 7], [8, 9, 10])


def test_a_step_forgets_the_one_before_and_keeps_what_no_tower_takes():
    step, extra = OptimizerStep(2), torch.ones(4, 8)
    step.note(0, batch_of(LAYOUTS[0]))
    step.note(1, batch_of(LAYOUTS[0]))
    assert step.anchored and step.layouts == [LAYOUTS[0]] * 2
    step.note(2, {**batch_of(LAYOUTS[3]), "image_feature": extra})
    assert not step.anchored and step.layouts == [LAYOUTS[3]] and step.parts == [{"image_feature": extra}]


def test_a_batch_is_stacked_and_its_texts_tokenized_at_once():
    asked: list[list[str]] = []

    def tokenize(texts: list[str]) -> torch.Tensor:
        asked.append(texts)
        return torch.tensor([[len(text)] for text in texts])

    samples = [{"image": torch.full((3, 2, 2), float(n)), "text": "x" * n, "index": n} for n in range(3)]
    batch = collate(samples, tokenize)
    assert list(batch) == ["image", "text", "index"] and asked == [["", "x", "xx"]]
    assert torch.equal(batch["image"], torch.stack([sample["image"] for sample in samples]))
    assert (batch["text"].tolist(), batch["index"].tolist()) == ([[0], [1], [2]], [0, 1, 2])


@pytest.mark.parametrize("form", [as_tuple, as_dictionary])
def test_both_forms_of_the_trainer_join_the_same_parts(form):
    batch = {
        name: torch.full((size, 16), number)
        for number, (name, size) in enumerate(
            {"pair_text": 3, "text": 2, "image": 2, "caption_text": 2, "pair_image": 3, "feature": 3}.items()
        )
    }
    found = form(batch, TextTrimmer(16))
    images, texts = found.values() if isinstance(found, dict) else found
    assert images.to("cpu")[:, 0].tolist() == [2, 2, 4, 4, 4]
    assert texts.to("cpu")[:, 0].tolist() == [1, 1, 3, 3, 0, 0, 0] and texts.to("cpu").shape == (7, 8)
    (labels,) = as_tuple({"image": batch["image"], "label": torch.tensor([5, 6])})[1].parts
    assert labels.tolist() == [5, 6]


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
    off = {
        **({} if layout.captions else {"caption_weight": None}),
        **({} if layout.pairs else {"pair_weight": None}),
    }
    given = {"caption_weight": caption_weight, "pair_weight": pair_weight, **off}
    found = AnchoredLoss(base, step_of(layout), **given)(
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
    loss = AnchoredLoss(ClipLoss, step_of(layout), 0.5, 2.0)
    torch.testing.assert_close(loss(**outputs), sum(loss(**outputs, output_dict=True).values()))


def test_a_teachers_features_are_split_too():
    layout = LAYOUTS[0]
    scale = torch.tensor(10.0)
    student, teacher = (features(7, 0), features(11, 1)), (features(7, 2), features(11, 3))
    found = AnchoredLoss(DistillClipLoss, step_of(layout))(
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
