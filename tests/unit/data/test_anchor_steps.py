"""Which steps have anchors, in what the loader yields and in the loss."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch.nn.functional import normalize

from arf_plugin.data.batch import BatchLayout, OptimizerStep
from arf_plugin.data.loader import AnchorSteps, TrainingLoader
from arf_plugin.data.task import TaskLoader
from arf_plugin.losses.anchored import AnchoredLoss
from arf_plugin.resume.checkpoint import ResumePoint

LAYOUT = BatchLayout(task=2, captions=True, pairs=2)


def anchored(steps: AnchorSteps, epoch: int, batches: int) -> str:
    return "".join("x" if steps.has_anchors(epoch, batch) else "." for batch in range(batches))


@pytest.mark.parametrize(
    ("every", "accum_freq", "batches", "expected"),
    [
        (1, 1, 4, ["xxxx", "xxxx"]),
        (2, 1, 5, ["x.x.x", ".x.x."]),  # the cycle goes on over the end of an epoch
        (3, 2, 8, ["xx....xx", "....xx.."]),
        (2, 2, 5, ["xx..x", "xx..x"]),  # two steps an epoch; the last micro-batch fills none
    ],
)
def test_whole_steps_counted_over_the_run(every, accum_freq, batches, expected):
    steps = AnchorSteps(every, accum_freq, batches)
    assert [anchored(steps, epoch, batches) for epoch in range(2)] == expected
    for epoch, row in enumerate(expected):
        assert [steps.count(epoch, n) for n in range(batches + 1)] == [
            row[:n].count("x") for n in range(batches + 1)
        ]


class Counting:
    """A pair loader that counts what is taken from it."""

    taken = 0

    def __iter__(self):
        while True:
            self.taken += 1
            yield {"pair_image": torch.zeros(2, 3, 4, 4), "pair_text": torch.zeros(2, 8, dtype=torch.long)}


def task_batch() -> dict[str, torch.Tensor]:
    texts = {name: torch.zeros(2, 8, dtype=torch.long) for name in ("text", "caption_text")}
    return {"image": torch.zeros(2, 3, 4, 4), **texts}


@pytest.mark.parametrize("first_batch", [0, 3])
def test_steps_without_anchors_load_and_move_none(first_batch):
    pairs, steps = Counting(), AnchorSteps(2, 1, 6)
    task = TaskLoader([task_batch() for _ in range(6 - first_batch)], 6, 12)
    loader = TrainingLoader(task, pairs, LAYOUT, steps=steps)
    loader.resume = ResumePoint(0, first_batch)
    loader.set_epoch(0)
    sizes = []
    for images, texts in loader:
        sizes.append((len(images), len(texts)))
        assert pairs.taken == steps.count(0, first_batch + len(sizes)) - steps.count(0, first_batch)
    assert sizes == [(4, 6) if batch % 2 == 0 else (2, 2) for batch in range(first_batch, 6)]


@pytest.mark.parametrize("base", [ClipLoss, SigLipLoss])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", [LAYOUT, BatchLayout(2, True), BatchLayout(2, pairs=2)], ids=str)
def test_loss_of_both_kinds_of_step(base, count, layout):
    """The anchors' terms n times as large, or 0."""
    generator = torch.Generator().manual_seed(0)

    def features(rows):
        return normalize(torch.randn(rows * count, 8, generator=generator, dtype=torch.float64), dim=-1)

    step = OptimizerStep(count)
    weights = 0.5 if layout.captions else None, 2.0 if layout.pairs else None
    loss, plain = AnchoredLoss(base, step, *weights, every=3), AnchoredLoss(base, step, *weights)
    scale = {"logit_scale": torch.tensor(10.0, dtype=torch.float64)}
    scale |= {"logit_bias": torch.tensor(-3.0)} if base is SigLipLoss else {}
    outputs = {
        "image_features": features(layout.images),
        "text_features": features(sum(layout.text_sizes)),
        **scale,
    }
    step.layouts = [layout] * count
    found, expected = loss(**outputs, output_dict=True), plain(**outputs, output_dict=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value * (1 if name == "contrastive_loss" else 3))
    step.layouts = [BatchLayout(layout.task)] * count
    x, t = features(layout.task), features(layout.task)
    without = loss(image_features=x, text_features=t, **scale, output_dict=True)
    assert without.keys() == found.keys()
    assert without.pop("contrastive_loss") == base()(x, t, **scale)
    assert all(value == 0 and value.dtype == torch.float64 for value in without.values())
