"""The mathematics of deferral as pure functions of tensors: the marginal likelihood, its baseline, labels, features.

Everything here is in nats, over target tokens only (N of them, prompt and padding already removed), and computed in
float32 log space whatever the dtype of the inputs. K is the number of assistants.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigurationError, did_you_mean

LABEL_METHODS = ("a", "b")
# Below this, entropy and 1 - top probability are rounding noise of a float32 softmax (of bfloat16 logits long before).
SMALLEST_UNCERTAINTY = 1e-6
# Stands for -inf, so that a token that no writer can produce has a huge loss and a zero gradient instead of a nan.
LOWEST_LOGPROB = -1e30
# Numbers in a temporary of the entropy: 16 MiB in float32, which a CPU's allocator hands out again without page faults.
ENTROPY_BLOCK = 2**22


def log_deferral_probabilities(deferral_logits: Tensor) -> Tensor:
    """log pi(k | x_<t) = log_softmax([0, W f_t])_k, the log-probability of each writer.

    Args:
        deferral_logits (`torch.Tensor` of shape `(..., K)`): logits of the K assistants; the base's logit is 0.

    Returns:
        `torch.Tensor` of shape `(..., K + 1)`, float32 (float64 stays): column 0 is the base, column k assistant k.
        For K = 1, column 1 is log sigmoid(w . f_t), equation 2 of Shen et al. (2024).
    """
    return F.log_softmax(F.pad(deferral_logits, (1, 0)), dim=-1, dtype=_exact(deferral_logits))


def deferral_probabilities(deferral_logits: Tensor) -> Tensor:
    """pi(k | x_<t), shape `(..., K + 1)`; the deferral probability d_t is 1 - pi[..., 0]."""
    return log_deferral_probabilities(deferral_logits).exp()


def log_joint(base_logprobs: Tensor, assistant_logprobs: Tensor, deferral_logits: Tensor) -> Tensor:
    """log pi(k | x_<t) + log P_k(x_t | x_<t), shape `(N, K + 1)`: its logsumexp is the marginal log-likelihood of a
    token, its softmax the posterior of who wrote it. -inf becomes -1e30."""
    log_pi = log_deferral_probabilities(deferral_logits)
    log_p = torch.cat([base_logprobs.to(log_pi.dtype).unsqueeze(-1), assistant_logprobs.to(log_pi.dtype)], dim=-1)
    return log_pi + log_p.clamp_min(LOWEST_LOGPROB)


def marginal_likelihood_loss(
    base_logprobs: Tensor,
    assistant_logprobs: Tensor,
    deferral_logits: Tensor,
    deferral_cost: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    r"""Negative marginal log-likelihood of a text that base and assistants write together.

    Who wrote a token is a latent variable, summed out:

    $$ L = -\frac{1}{N} \sum_t \log \sum_{k=0}^{K} \pi(k | x_{<t}) P_k(x_t | x_{<t}) + \frac{c}{N} \sum_t d_t $$

    1. pi = softmax([0, z_t]) is each writer's prior probability.
    2. The joint of writer and token is pi_k P_k; its sum over k is the token's probability under the pair.
    3. The gradient moves pi towards whoever gives the token the higher probability, and weighs the base's own
       likelihood gradient by the base's posterior: tokens that the assistant explains need not be learned.
    4. c > 0 (`deferral_cost`, nats per deferred token) makes asking pay its way; see `DeferralConfig`.

    Args:
        base_logprobs (`torch.Tensor` of shape `(N,)`): log P_0(x_t | x_<t), nats.
        assistant_logprobs (`torch.Tensor` of shape `(N, K)`): log P_k(x_t | x_<t), nats; `-inf` is allowed.
        deferral_logits (`torch.Tensor` of shape `(N, K)`): z_t.
        deferral_cost (`float`, *optional*, defaults to 0.0): c, at least 0.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): target tokens of the whole optimiser step, as the
            Trainer gives it; default N. A mean per micro-batch is wrong under gradient accumulation.

    Returns:
        `torch.Tensor` of shape `()`, float32; 0 when N is 0.

    Reference: Shen et al., *Learning to Decode Collaboratively with Multiple Language Models*, ACL 2024, equation 4.
    """
    joint = log_joint(base_logprobs, assistant_logprobs, deferral_logits)
    loss = -torch.logsumexp(joint, dim=-1)
    if deferral_cost:
        loss = loss + deferral_cost * (1 - deferral_probabilities(deferral_logits)[..., 0])
    return mean_over_targets(loss, num_items_in_batch)


def weak_supervision_loss(
    base_logprobs: Tensor,
    deferral_logits: Tensor,
    defer_labels: Tensor,
    positive_weight: float = 5.0,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The paper's weak-supervision baseline: 2/3 cross-entropy + 1/3 weighted classification of the writer.

    Args:
        base_logprobs (`torch.Tensor` of shape `(N,)`): log P_0(x_t | x_<t), nats.
        deferral_logits (`torch.Tensor` of shape `(N, K)`): z_t.
        defer_labels (`torch.Tensor` of shape `(N,)`, long): pseudo-label in 0..K, see [`deferral_labels`]; tokens
            with a negative label count in the cross-entropy only.
        positive_weight (`float`, *optional*, defaults to 5.0): weight of tokens whose label is not 0.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): as in [`marginal_likelihood_loss`].

    Returns:
        `torch.Tensor` of shape `()`, float32. For K = 1 the second term is binary cross-entropy.

    Reference: Shen et al. (2024), section 4.2 and appendix (weak supervision).
    """
    log_pi = log_deferral_probabilities(deferral_logits)
    weight = torch.where(defer_labels > 0, positive_weight, 1.0) * (defer_labels >= 0)
    writer = -log_pi.gather(-1, defer_labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return mean_over_targets((-2 * base_logprobs.to(log_pi.dtype) + weight * writer) / 3, num_items_in_batch)


def mean_over_targets(per_token: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Sum over target tokens divided by the target tokens of the whole optimiser step (default: those given)."""
    return divide_by_targets(per_token.sum(), per_token.numel(), num_items_in_batch)


def divide_by_targets(summed: Tensor, given: int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """[`mean_over_targets`] of a sum over `given` target tokens."""
    if isinstance(num_items_in_batch, Tensor):
        return summed / num_items_in_batch.to(summed.device).clamp_min(1)
    return summed / max(1, given if num_items_in_batch is None else num_items_in_batch)


def deferral_labels(
    base_correct: Tensor,
    assistant_correct: Tensor,
    assistant_logprobs: Tensor | None = None,
    method: str = "a",
    ignore_both_wrong: bool = False,
) -> Tensor:
    """Pseudo-labels of who should write each token, for Z-initialisation and weak supervision.

    Args:
        base_correct (`torch.Tensor` of shape `(N,)`, bool): whether the base's argmax is the target.
        assistant_correct (`torch.Tensor` of shape `(N, K)`, bool): whether assistant k's argmax is the target.
        assistant_logprobs (`torch.Tensor` of shape `(N, K)`, *optional*): log P_k(x_t | x_<t); needed for K > 1 to
            choose among assistants.
        method (`str`, *optional*, defaults to `"a"`): `"a"`: k where an assistant is right and the base is wrong;
            `"b"`: k wherever the base is wrong.
        ignore_both_wrong (`bool`, *optional*, defaults to `False`): give -1 to tokens that everybody gets wrong.

    Returns:
        `torch.Tensor` of shape `(N,)`, long: 0 for the base, k for assistant k, -1 for tokens to leave out. Among
        several assistants that are right (or, with `"b"`, when none is) the one with the highest P_k(x_t) is taken.

    Reference: Shen et al. (2024), section 3.2 (initialisation).
    """
    if method not in LABEL_METHODS:
        raise ConfigurationError(f'method is "{method}"; allowed are "a" and "b".{did_you_mean(method, LABEL_METHODS)}')
    if assistant_logprobs is None:
        if assistant_correct.shape[-1] > 1:
            raise ConfigurationError("assistant_logprobs is needed to choose among several assistants.")
        assistant_logprobs = assistant_correct.float()
    any_right = assistant_correct.any(-1)
    eligible = assistant_correct | ~any_right.unsqueeze(-1)
    best = assistant_logprobs.float().clamp_min(torch.finfo(torch.float32).min)
    best = best.masked_fill(~eligible, -torch.inf).argmax(-1) + 1
    defer = ~base_correct & any_right if method == "a" else ~base_correct
    labels = torch.where(defer, best, 0)
    return labels.masked_fill(~base_correct & ~any_right, -1) if ignore_both_wrong else labels


@torch.no_grad()
def uncertainty_features(logits: Tensor) -> Tensor:
    """Four numbers that say how sure a next-token distribution is.

    Args:
        logits (`torch.Tensor` of shape `(..., vocabulary)`): next-token logits, after the architecture's own
            soft-capping or scaling; `-inf` is allowed.

    Returns:
        `torch.Tensor` of shape `(..., 4)`, float32, without gradient: entropy (nats), log entropy, top probability,
        log(1 - top probability). Entropy and 1 - top probability are bounded below by 1e-6 inside the logarithms.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    blocks = [F.log_softmax(block, dim=-1, dtype=_exact(block)) for block in rows.split(_rows_per_block(rows))]
    features = torch.cat([_uncertainty(logprobs, logprobs.amax(-1)) for logprobs in blocks])
    return features.view(*logits.shape[:-1], 4)


def _uncertainty(logprobs: Tensor, top: Tensor) -> Tensor:
    """[`uncertainty_features`] `(rows, 4)` from log-probabilities `(rows, vocabulary)` and their maxima `(rows,)`."""
    blocks = logprobs.split(_rows_per_block(logprobs))
    scratch = torch.empty_like(blocks[0])  # one for all blocks: a new one for each would leave the heap in pieces
    products = (torch.exp(block, out=scratch[: len(block)]).mul_(block) for block in blocks)
    entropy = -torch.cat([product.nansum(-1) for product in products])  # nansum: 0 * log 0 is nan
    log_entropy = entropy.clamp_min(SMALLEST_UNCERTAINTY).log()
    log_rest = (-torch.expm1(top)).clamp_min(SMALLEST_UNCERTAINTY).log()
    return torch.stack([entropy.clamp_min(0.0), log_entropy, top.exp(), log_rest], dim=-1).float()


def _rows_per_block(rows: Tensor) -> int:
    return max(1, ENTROPY_BLOCK // rows.shape[-1])


class TokenStatistics(torch.autograd.Function):
    """What a loss needs of a block of logits, in as few passes over the vocabulary and as little memory as possible.

    `TokenStatistics.apply(logits, tokens)` with `(N, vocabulary)` logits and `(N,)` token ids returns, in this order:

    1. log-probabilities of the tokens, `(N,)` float32, the only differentiable output (its backward works in place);
    2. whether the token is the argmax, `(N,)` bool;
    3. [`uncertainty_features`], `(N, 4)` float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = F.log_softmax(logits, dim=-1, dtype=_exact(logits))
        top, argmax = logprobs.max(-1)
        correct, uncertainty = argmax == tokens, _uncertainty(logprobs, top)
        ctx.save_for_backward(logprobs, tokens)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(correct, uncertainty)
        return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), correct, uncertainty

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        logprobs, tokens = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        of_logits = logprobs.exp_().mul_(-gradient)  # d log p_x / d logits = onehot(x) - p
        return of_logits.scatter_add_(-1, tokens.unsqueeze(-1), gradient).to(ctx.dtype), None


def _exact(values: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, unless float64 came in."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def collapse_warning(mean_deferral: float, deferral_cost: float) -> str | None:
    """What to tell a user whose head is about to defer always, or `None`.

    Args:
        mean_deferral (`float`): mean of d_t over recent target tokens.
        deferral_cost (`float`): c of the run, nats per deferred token.
    """
    if deferral_cost > 0 or math.isnan(mean_deferral) or mean_deferral < 0.95:
        return None
    return (
        f"The mean deferral probability is {mean_deferral:.3f} and deferral_cost is 0: the head is collapsing to "
        "'always defer', and the order of its scores means nothing there. This happens on text that the assistant "
        "wrote itself, or where it is better throughout. Set deferral_cost to about 0.2 nats, or train on reference "
        "text."
    )
