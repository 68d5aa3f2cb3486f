"""Combiners: what is written once an assistant is asked. Each is a small pure function of the models' distributions.

A combiner takes a [`CombiningContext`] and returns scores `(rows, vocabulary)`, log-probabilities up to a constant per
row. Logits processors, warpers and greedy choice or sampling apply to these scores. The same functions serve the
batched loop and any engine that hands out whole distributions.

Name one by a string (`"mixture"`, `"contrastive:alpha=0.1,beta=0.5"`), a dictionary, or pass a callable.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .registry import Spec, bind, parse_spec


@dataclass
class CombiningContext:
    """What a combiner sees for one deferred token of each of several rows, on one device.

    Args:
        base_logits (`torch.Tensor` of shape `(rows, vocabulary)`): the base's next-token logits, true logits of the
            whole vocabulary, before any logits processor.
        assistant_logits (`torch.Tensor` of shape `(rows, vocabulary)`): those of the assistant that was asked; columns
            that its vocabulary lacks are -inf.
        deferral_probs (`torch.Tensor` of shape `(rows,)`): d_t, float32.
        others (`dict[str, torch.Tensor]`): logits `(rows, vocabulary)` of further models that the combiner named.
    """

    base_logits: Tensor
    assistant_logits: Tensor
    deferral_probs: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def base_logprobs(self) -> Tensor:
        """`(rows, vocabulary)` float32: log P_0, nats."""
        return torch.log_softmax(self.base_logits.float(), dim=-1)

    @functools.cached_property
    def assistant_logprobs(self) -> Tensor:
        """`(rows, vocabulary)` float32: log P_k, nats."""
        return torch.log_softmax(self.assistant_logits.float(), dim=-1)


Combiner = Callable[[CombiningContext], Tensor]


def assistant(context: CombiningContext) -> Tensor:
    """The assistant writes: its own logits (Shen et al., 2024)."""
    return context.assistant_logits


def mixture(context: CombiningContext) -> Tensor:
    """(1 - d) P_0 + d P_k, computed as a logsumexp."""
    d = context.deferral_probs.float().unsqueeze(-1)
    return torch.logaddexp(context.base_logprobs + torch.log1p(-d), context.assistant_logprobs + d.log())


def confident(context: CombiningContext) -> Tensor:
    """Whichever model gives its favourite token the higher probability; a tie goes to the assistant."""
    base_top = context.base_logprobs.amax(dim=-1, keepdim=True)
    assistant_top = context.assistant_logprobs.amax(dim=-1, keepdim=True)
    return torch.where(base_top > assistant_top, context.base_logprobs, context.assistant_logprobs)


def contrastive(context: CombiningContext, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """Contrastive decoding, the assistant as expert and the base as amateur:

    (1 + beta) log P_k - beta log P_0 on the tokens with P_k >= alpha max P_k, -inf elsewhere (the expert's mask).
    Log-probabilities and logits differ by a constant per row, so this is the published rule on logits.
    Source: Li et al. (2023); O'Brien and Lewis (2023), whose alpha = 0.1 and beta = 0.5 are the defaults.
    """
    expert, amateur = context.assistant_logprobs, context.base_logprobs
    plausible = expert >= expert.amax(dim=-1, keepdim=True) + math.log(alpha)
    return torch.where(plausible, (1 + beta) * expert - beta * amateur, -torch.inf)


def proxy_tuning(context: CombiningContext, untuned: Any, weight: float = 1.0) -> Tensor:
    """Proxy tuning: log P_k + weight (log P_0 - log P_untuned); the base is the small tuned model.

    `untuned` is the base before tuning, a model (it keeps a cache of its own). -inf on tokens that one of the three
    lacks. Source: Liu et al. (2024).
    """
    expert, anti_expert = context.base_logprobs, torch.log_softmax(context.others["untuned"].float(), dim=-1)
    missing = expert.isneginf() | anti_expert.isneginf()
    return (context.assistant_logprobs + weight * (expert - anti_expert)).masked_fill(missing, -torch.inf)


COMBINERS: dict[str, Callable[..., Any]] = {
    "assistant": assistant,
    "mixture": mixture,
    "confident": confident,
    "contrastive": contrastive,
    "proxy_tuning": proxy_tuning,
}

# Parameters that are models: the loop reads them along and hands their logits over in `CombiningContext.others`.
MODEL_PARAMETERS: dict[Callable[..., Any], tuple[str, ...]] = {proxy_tuning: ("untuned",)}


class ResolvedCombiner(NamedTuple):
    """A combiner ready to call, and the further models that it wants logits of, by name."""

    function: Combiner
    models: Mapping[str, Any]


def resolve_combiner(spec: Spec | None) -> ResolvedCombiner:
    """The combiner that `spec` names; `None` is the assistant's own distribution.

    Raises:
        [`ConfigurationError`]: an unknown name or parameter, or a parameter that is missing.
    """
    function, parameters = parse_spec("combiner", "assistant" if spec is None else spec, COMBINERS)
    models = {name: parameters[name] for name in MODEL_PARAMETERS.get(function, ())}
    return ResolvedCombiner(bind(function, parameters), models)
