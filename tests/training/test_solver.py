from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from collm.training.solver import CHUNK, roc_auc, solve_head


def awkward_features(rows: int = 600, columns: int = 12) -> torch.Tensor:
    """Features as hidden states are: correlated, with one constant-like coordinate ten thousand times the others."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator)
    features = torch.randn(rows, columns, generator=generator) @ mixing
    features[:, 3] = 1e4 + 50 * torch.randn(rows, generator=generator)
    features[:, 5] *= 1e-4
    return features


def reference_logistic(features, labels, weights, l2, steps: int = 60) -> torch.Tensor:
    """Newton's method in float64, written out."""
    x, y = features.double(), labels.double()
    scale = x.square().mean(0).sqrt()
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    total = weights.sum()
    for _ in range(steps):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (weights * (p - y)) / total + l2 * scale**2 * w
        hessian = (x.T * (weights * p * (1 - p))) @ x / total + torch.diag(l2 * scale**2)
        w -= torch.linalg.solve(hessian, gradient)
    return w


@pytest.mark.parametrize("l2", [1e-3, [1e-3, 1e-2]], ids=["one", "each"])
def test_logistic_regression_equals_newton_despite_massive_activations(l2):
    features = awkward_features()
    if isinstance(l2, list):
        l2 = torch.tensor(l2, dtype=torch.float64)[torch.arange(features.shape[1]) % 2]
    labels = (features[:, 0] + 0.3 * features[:, 1] > 1).long()
    weights = torch.where(labels == 1, 8.0, 1.0).double()

    def loss(logits, rows):
        each = F.binary_cross_entropy_with_logits(logits[:, 0], labels[rows].double(), reduction="none")
        return (weights[rows] * each).sum() / weights.sum()

    solution = solve_head(features, loss, 1, l2, tolerance=1e-7)
    expected = reference_logistic(features, labels, weights, l2)
    effect = features.double().square().mean(0).sqrt()  # of a unit of weight
    torch.testing.assert_close(solution.weight[0] * effect, expected * effect, rtol=1e-3, atol=1e-5)
    assert solution.evaluations < 120


def test_multinomial_solution_has_zero_gradient():
    features, K, l2 = awkward_features(), 3, 1e-2
    labels = torch.randint(0, K + 1, (len(features),), generator=torch.Generator().manual_seed(1))

    def loss(logits, rows):
        return F.cross_entropy(F.pad(logits, (1, 0)), labels[rows], reduction="sum") / len(features)

    solution = solve_head(features, loss, K, l2, tolerance=1e-7)
    weight = solution.weight.clone().requires_grad_()
    scale = features.double().square().mean(0).sqrt()
    total = loss(features.double() @ weight.T, slice(None)) + l2 / 2 * (weight * scale).square().sum()
    gradient = torch.autograd.grad(total, weight)[0] / scale
    assert gradient.abs().max() < 1e-5
    assert total.item() == pytest.approx(solution.loss)


def test_bias_is_fitted_and_chunks_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(CHUNK + 100, 2, generator=generator)
    labels = (torch.rand(len(features), generator=generator) < torch.sigmoid(features[:, 0] - 2)).double()

    def loss(logits, rows):
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels[rows], reduction="sum") / len(features)

    solution = solve_head(features, loss, 1, l2=0.0, bias=True)
    assert solution.bias.item() == pytest.approx(-2, abs=0.15)
    assert solution.weight.tolist()[0] == pytest.approx([1.0, 0.0], abs=0.15)


def test_auc_counts_ties_as_one_half():
    positive = torch.tensor([True, False, True, False])
    assert roc_auc(torch.tensor([0.9, 0.1, 0.8, 0.2]), positive) == 1.0
    assert roc_auc(torch.tensor([0.5, 0.5, 0.5, 0.5]), positive) == 0.5
    assert roc_auc(torch.tensor([0.1, 0.1, 0.8, 0.2]), positive) == 0.625
    assert torch.isnan(torch.tensor(roc_auc(torch.rand(4), torch.ones(4, dtype=torch.bool))))
