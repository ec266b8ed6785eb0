"""Feature drift against references written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from arf_plugin.evaluation.metrics import drift, linear_cka, mean_cosine


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(40, 8) + 1.0, dim=1)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[0]


def cka_by_kernels(x: torch.Tensor, y: torch.Tensor) -> float:
    """The definition by Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), equation 3 of the paper."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)

    def hsic(a, b):
        return torch.trace(a.double() @ a.double().T @ centre @ b.double() @ b.double().T @ centre)

    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


def test_nothing_moved(features):
    assert drift(features, features) == pytest.approx({"cosine": 1.0, "cka": 1.0}, abs=1e-12)


def test_a_rotation_moves_cosine_alone(features):
    moved = features @ rotation(8)
    assert linear_cka(moved, features) == pytest.approx(1.0, abs=1e-6)
    by_hand = sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(moved, features, strict=True)) / 40
    assert mean_cosine(moved, features) == pytest.approx(by_hand, abs=1e-6) and abs(by_hand) < 0.9


def test_scale_moves_nothing(features):
    assert drift(3.5 * features, features) == pytest.approx({"cosine": 1.0, "cka": 1.0}, abs=1e-6)


def test_cka_is_the_kernels_alignment(features):
    other = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    for one in (other, features.sign(), features @ torch.randn(8, 8)):
        assert linear_cka(one, features) == pytest.approx(cka_by_kernels(one, features), abs=1e-9)


def test_independent_features_have_little_in_common():
    torch.manual_seed(3)
    x, y = torch.randn(5000, 6), torch.randn(5000, 6)
    assert linear_cka(x, y) < 0.01 and abs(mean_cosine(x, y)) < 0.05


def test_features_that_are_all_equal_or_broken_have_no_cka(features):
    assert math.isnan(linear_cka(torch.ones(40, 8), features))
    broken = features.clone()
    broken[3, 2] = math.nan
    assert math.isnan(linear_cka(broken, features)) and math.isnan(mean_cosine(broken, features))
