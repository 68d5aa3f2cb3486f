"""One small problem, solved well: the linear deferral head over fixed features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 8192  # rows that exist in float64 at once


@dataclass
class Solution:
    """weight: `(K, F)` float64; bias: `(K,)` float64 or `None`; loss: with the penalty; evaluations: of the loss."""

    weight: Tensor
    bias: Tensor | None
    loss: float
    evaluations: int


def solve_head(
    features: Tensor,
    loss_of_logits: Callable[[Tensor, slice], Tensor],
    num_assistants: int,
    l2: float,
    bias: bool = False,
    start: Tensor | None = None,
    max_iterations: int = 300,
    tolerance: float = 1e-7,
) -> Solution:
    r"""Minimise a loss of the logits z_t = W f_t over W, with features fixed, by L-BFGS in float64.

    $$ \min_W \; \mathrm{loss}(F W^\top) + \frac{\lambda}{2} \sum_{k,j} (s_j W_{kj})^2 $$

    Hidden states have a few coordinates a thousand times larger than the rest ("massive activations") and strong
    correlations. Three things make the problem easy without changing it:

    1. s_j, the root mean square of feature j, puts the penalty on effects rather than on units.
    2. The variables are V with W = V C^-1 diag(1/s), C C^T = F^T F / (4 N) in those units + lambda: the Hessian of the
       logistic loss at W = 0. L-BFGS then needs tens of steps instead of thousands, and W comes back exactly.
    3. Rows turn into float64 chunk by chunk, on the device of `features`.

    Nothing is centred: without a bias that would be another model.

    Args:
        features (`torch.Tensor` of shape `(N, F)`): float32 or float64.
        loss_of_logits (callable): `(logits, rows)`, float64 logits `(n, K)` of the rows in the slice, to the sum of
            their losses divided by whatever makes it a mean over all N.
        num_assistants (`int`): K.
        l2 (`float`): lambda, at least 0.
        bias (`bool`, *optional*, defaults to `False`): one more feature, constantly 1.
        start (`torch.Tensor` of shape `(K, F)`, *optional*): default zeros.
        max_iterations (`int`, *optional*, defaults to 300): of L-BFGS.
        tolerance (`float`, *optional*, defaults to 1e-7): largest entry of the gradient at which to stop.

    Returns:
        [`Solution`].
    """
    # 1. and 2. Scale, then the square root of the curvature.
    columns = features.shape[1] + bias
    gram = features.new_zeros(columns, columns, dtype=torch.float64)
    for rows in _chunks(features):
        chunk = _double(features, rows, bias)
        gram.addmm_(chunk.T, chunk, alpha=1 / len(features))
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    curvature = gram / torch.outer(scale, scale) / 4
    curvature.diagonal().add_(max(l2, 1e-8))
    root = torch.linalg.cholesky(curvature)

    def to_weight(v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root.T, v.T, upper=True).T / scale

    def to_variables(w: Tensor) -> Tensor:
        return (w * scale) @ root

    # 3. Loss and gradient, one pass over the features.
    def evaluate(v: Tensor) -> tuple[float, Tensor]:
        weight = to_weight(v)
        total, slope = 0.0, torch.zeros_like(weight)
        for rows in _chunks(features):
            chunk = _double(features, rows, bias)
            logits = (chunk @ weight.T).requires_grad_()
            loss = loss_of_logits(logits, rows)
            slope += torch.autograd.grad(loss, logits)[0].T @ chunk
            total += loss.item()
        penalised = weight * scale
        total += l2 / 2 * penalised.square().sum().item()
        slope += l2 * penalised * scale
        return total, torch.linalg.solve_triangular(root, (slope / scale).T, upper=False).T

    initial = features.new_zeros(num_assistants, columns, dtype=torch.float64)
    if start is not None:
        initial[:, : start.shape[1]] = start
    variables = to_variables(initial).contiguous().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [variables], max_iter=max_iterations, max_eval=2 * max_iterations, tolerance_grad=tolerance,
        tolerance_change=1e-12, history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip
    losses: list[float] = []

    def closure() -> float:
        loss, variables.grad = evaluate(variables.detach())
        losses.append(loss)
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    weight = to_weight(variables.detach())
    loss, _ = evaluate(variables.detach())
    return Solution(weight[:, : features.shape[1]], weight[:, -1] if bias else None, loss, len(losses) + 1)


def _chunks(features: Tensor) -> list[slice]:
    return [slice(i, i + CHUNK) for i in range(0, len(features), CHUNK)]


def _double(features: Tensor, rows: slice, bias: bool) -> Tensor:
    chunk = features[rows].double()
    return F.pad(chunk, (0, 1), value=1.0) if bias else chunk


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive has a higher score than a negative, ties counting one half; nan without both kinds.

    scores: `(N,)` float; positive: `(N,)` bool.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return ((ranks[place][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()
