"""Metrics equal scikit-learn's and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from arf_plugin.evaluation.metrics import calibration_error, joined, measure, predictions


def reference_calibration_error(confidences: list[float], hits: list[bool], bins: int = 15) -> float:
    """Equation 3 of Guo et al. (ICML 2017), image by image; the last bin has both its ends."""
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [
            (c, h) for c, h in zip(confidences, hits, strict=True)
            if low <= c < high or (b == bins - 1 and c == high)
        ]  # fmt: skip
        if inside:
            accuracy = sum(h for _, h in inside) / len(inside)
            confidence = sum(c for c, _ in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


@pytest.fixture
def logits():
    """Logits of 400 images and nine classes, the last of which never occurs; classes are unequally frequent."""
    generator = torch.Generator().manual_seed(0)
    target = (8 * torch.rand(400, generator=generator) ** 2).long()
    scores = torch.randn(400, 9, generator=generator)
    scores[torch.arange(400), target] += 0.7
    return scores, target


def test_metrics_equal_those_of_scikit_learn(logits):
    from sklearn.metrics import balanced_accuracy_score, f1_score, top_k_accuracy_score

    scores, target = logits
    found = measure(predictions(scores, target), classes=9)
    predicted = scores.argmax(1)
    assert 8 in predicted  # a class that is predicted and never occurs
    assert found["top1"] == pytest.approx(100 * (predicted == target).float().mean().item())
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(target, scores, k=5, labels=range(9)))
    assert found["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(target, predicted))
    assert found["macro_f1"] == pytest.approx(100 * f1_score(target, predicted, average="macro"))
    assert len(set(found.values())) == 5


def test_calibration_error_equals_the_reference(logits):
    scores, target = logits
    for scale in (0.2, 1.0, 30.0):
        found = predictions(scores, target, scale)
        softmax = [[math.exp(scale * (s - max(row))) for s in row] for row in scores.tolist()]
        confidences = [max(row) / sum(row) for row in softmax]
        hits = [
            max(range(9), key=row.__getitem__) == t
            for row, t in zip(scores.tolist(), target.tolist(), strict=True)
        ]
        expected = reference_calibration_error(confidences, hits)
        assert measure(found, 9)["ece"] == pytest.approx(100 * expected, abs=1e-4)
        assert expected > 0.01


def test_a_confidence_of_one_belongs_to_the_last_bin():
    # 0.99 is wrong and 1.0 is right: in one bin they nearly cancel, in two they do not.
    confidence = torch.tensor([1.0, 0.99] * 50)
    correct = torch.tensor([True, False] * 50)
    expected = reference_calibration_error([1.0, 0.99] * 50, [True, False] * 50)
    assert calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.495)


def test_batches_do_not_matter(logits):
    scores, target = logits
    parts = [predictions(scores[i : i + 7], target[i : i + 7]) for i in range(0, 400, 7)]
    assert measure(joined(parts), 9) == measure(predictions(scores, target), 9)


def test_few_classes_have_no_top_5():
    found = measure(predictions(torch.eye(4), torch.arange(4)), 4)
    assert "top5" not in found
    assert found["top1"] == found["mean_per_class"] == found["macro_f1"] == 100
