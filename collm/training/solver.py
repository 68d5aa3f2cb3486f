"""One small problem, solved well: the linear deferral head over fixed features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from collm.configuration import DeferralConfig

CHUNK = 8192  # rows that exist in float64 at once
# Of both problems, chosen on held-out GSM8K (benchmarks/zinit, benchmarks/quality/routers.py). The hidden state's
# coordinates are many and weak, the four numbers of uncertainty few and strong: a common penalty lets the many overfit.
DEFAULT_L2 = 0.01
HIDDEN_PENALTY = 10.0


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
    l2: float | Tensor,
    bias: bool = False,
    start: Solution | None = None,
    prepare: Callable[[Tensor], Tensor] = torch.Tensor.double,
    device: torch.device | str = "cpu",
    max_iterations: int = 300,
    tolerance: float = 1e-5,
    progress: str | None = None,
) -> Solution:
    r"""Minimise a loss of the logits z_t = W f_t over W, with features fixed, by L-BFGS in float64.

    $$ \min_W \; \mathrm{loss}(F W^\top) + \frac{1}{2} \sum_{k,j} \lambda_j (s_j W_{kj})^2 $$

    Hidden states have a few coordinates a thousand times larger than the rest ("massive activations") and strong
    correlations. Three things make the problem easy without changing it:

    1. s_j, the root mean square of feature j, puts the penalty on effects rather than on units.
    2. The variables are V with W = V C^-1 diag(1/s), C C^T = F^T F / (4 N) in those units + lambda: the Hessian of the
       logistic loss at W = 0. L-BFGS then needs tens of steps instead of thousands, and W comes back exactly.
    3. Rows turn into float64 chunk by chunk, so that `features` may be a memory-mapped file.

    Nothing is centred: without a bias that would be another model.

    Args:
        features (`torch.Tensor` of shape `(N, F)`): float32 or float64, before `prepare`.
        loss_of_logits (callable): `(logits, rows)`, float64 logits `(n, K)` of the rows in the slice, to the sum of
            their losses divided by whatever makes it a mean over all N.
        num_assistants (`int`): K.
        l2 (`float`, or `torch.Tensor` of shape `(F,)`): lambda, at least 0; one for all features, or one for each.
        bias (`bool`, *optional*, defaults to `False`): one more feature, constantly 1.
        start ([`Solution`], *optional*): where to start; default zeros.
        prepare (callable, *optional*): applied to every chunk of rows `(n, F)`, e.g. to standardise it.
        device (`torch.device`, *optional*, defaults to `"cpu"`): where to compute; `logits` are there.
        max_iterations (`int`, *optional*, defaults to 300): of L-BFGS.
        tolerance (`float`, *optional*, defaults to 1e-5): largest entry of the gradient at which to stop.
        progress (`str`, *optional*): title of a progress bar over passes through the features.

    Returns:
        [`Solution`].
    """
    # 1. and 2. Scale, then the square root of the curvature.
    columns = features.shape[1] + bias
    penalty = torch.as_tensor(l2, dtype=torch.float64, device=device).expand(features.shape[1])
    penalty = F.pad(penalty, (0, 1), value=penalty.min().item()) if bias else penalty

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, len(features), CHUNK):
            rows = slice(first, min(first + CHUNK, len(features)))
            chunk = prepare(features[rows].to(device)).double()
            yield rows, F.pad(chunk, (0, 1), value=1.0) if bias else chunk

    gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
    for _, chunk in chunks():
        gram.addmm_(chunk.T, chunk, alpha=1 / len(features))
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    curvature = gram / torch.outer(scale, scale) / 4
    curvature.diagonal().add_(penalty.clamp_min(1e-8))
    root = torch.linalg.cholesky(curvature)

    def to_weight(v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root.T, v.T, upper=True).T / scale

    def to_variables(w: Tensor) -> Tensor:
        return (w * scale) @ root

    # 3. Loss and gradient, one pass over the features.
    def evaluate(v: Tensor) -> tuple[float, Tensor]:
        weight = to_weight(v)
        total, slope = 0.0, torch.zeros_like(weight)
        for rows, chunk in chunks():
            logits = (chunk @ weight.T).requires_grad_()
            loss = loss_of_logits(logits, rows)
            slope += torch.autograd.grad(loss, logits)[0].T @ chunk
            total += loss.item()
        penalised = weight * scale
        total += (penalty / 2 * penalised.square()).sum().item()
        slope += penalty * penalised * scale
        return total, torch.linalg.solve_triangular(root, (slope / scale).T, upper=False).T

    initial = torch.zeros(num_assistants, columns, dtype=torch.float64, device=device)
    if start is not None:
        initial[:, : features.shape[1]] = start.weight
        if bias and start.bias is not None:
            initial[:, -1] = start.bias
    variables = to_variables(initial).contiguous().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [variables], max_iter=max_iterations, max_eval=2 * max_iterations, tolerance_grad=tolerance,
        tolerance_change=1e-12, history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip
    with tqdm(desc=progress, unit=" passes", disable=progress is None) as bar:

        def closure() -> float:
            loss, variables.grad = evaluate(variables.detach())
            bar.set_postfix(loss=f"{loss:.5f}", refresh=False)
            bar.update()
            evaluations.append(loss)
            return loss

        evaluations: list[float] = []
        optimiser.step(closure)  # type: ignore[arg-type]
    weight = to_weight(variables.detach()).cpu()
    loss, _ = evaluate(variables.detach())
    return Solution(weight[:, : features.shape[1]], weight[:, -1] if bias else None, loss, len(evaluations) + 1)


def feature_penalties(l2: float, deferral: DeferralConfig, width: int) -> Tensor:
    """`l2` for each of the head's `width` features: [`HIDDEN_PENALTY`] times as much for the hidden state's."""
    penalties = torch.full((width,), l2, dtype=torch.float64)
    penalties[: width - deferral.head_size(0)] *= HIDDEN_PENALTY
    return penalties


def solving_device(device: torch.device) -> torch.device:
    """Where to solve for a model on `device`: there if it computes in float64, else on the CPU."""
    return device if device.type == "cuda" else torch.device("cpu")


def head_logits(features: Tensor, head: Solution, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits `(N, K)`, float64 on the CPU, of a solution on features `(N, F)`, chunk by chunk."""
    chunks = [prepare(chunk).double() @ head.weight.T for chunk in features.split(CHUNK)]
    logits = torch.cat(chunks)
    return logits if head.bias is None else logits + head.bias


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
