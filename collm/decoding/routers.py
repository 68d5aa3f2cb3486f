"""Routers: who writes the next token. Each is a small pure function of what is known before the token is written.

A router takes a [`RoutingContext`] and returns, for each row, 0 (the base writes) or k (assistant k writes); a router
with a memory returns `(writers, state)` and finds `state` in the context of the row's next token. Being pure, it can be
called for a draft that is thrown away later. The same functions serve the batched loop and the serving engines.

Name one by a string (`"learned"`, `"entropy:cut=1.2"`), a dictionary (`{"name": "entropy", "cut": 1.2}`), or pass a
callable.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collm.configuration import DeferralConfig
from collm.errors import CalibrationError, ConfigurationError, did_you_mean

from .registry import Spec, bind, parse_spec


@dataclass
class RoutingContext:
    """What a router sees for one token of each of several rows.

    Args:
        writer_probs (`torch.Tensor` of shape `(rows, K + 1)`): pi, float32; column 0 is the base.
        threshold (`float` or `torch.Tensor` of shape `(rows,)`): eta, the threshold in force.
        base_logits (`torch.Tensor` of shape `(rows, vocabulary)`, *optional*): the base's next-token logits, before
            any logits processor. `None` where an engine does not hand them out.
        step (`torch.Tensor` of shape `(rows,)`, *optional*): long, index of the token among the new tokens, from 0.
        uniform (`torch.Tensor` of shape `(rows,)`, *optional*): float64 in (0, 1), a function of seed, row and step.
        state (`torch.Tensor` of shape `(rows,)` or `(rows, S)`, *optional*): what the router returned for the row's
            previous token; NaN for a row's first token, `None` if no row has one.
    """

    writer_probs: Tensor
    threshold: float | Tensor
    base_logits: Tensor | None = None
    step: Tensor | None = None
    uniform: Tensor | None = None
    state: Tensor | None = None

    @property
    def deferral_probs(self) -> Tensor:
        """`(rows,)` float32: d_t = 1 - pi(0 | x_<t)."""
        return 1 - self.writer_probs[:, 0]

    @functools.cached_property
    def base_logprobs(self) -> Tensor:
        """`(rows, vocabulary)` float32, nats."""
        if self.base_logits is None:
            raise ConfigurationError("This router needs the base's logits, which this engine does not hand out.")
        return torch.log_softmax(self.base_logits.float(), dim=-1)

    def ask_where(self, defer: Tensor) -> Tensor:
        """`(rows,)` long: where `defer` is true, the assistant argmax_{k>=1} pi(k | x_<t); elsewhere 0."""
        if self.writer_probs.shape[1] == 2:  # one assistant
            return defer.long()
        return torch.where(defer, self.writer_probs[:, 1:].argmax(dim=-1) + 1, 0)


Router = Callable[[RoutingContext], "Tensor | tuple[Tensor, Tensor]"]


def learned(context: RoutingContext) -> Tensor:
    """The deferral head: ask where d_t > eta (Shen et al., 2024). eta = 1 never asks, eta < 0 always does."""
    return context.ask_where(context.deferral_probs > context.threshold)


def ema(context: RoutingContext, decay: float = 0.5) -> tuple[Tensor, Tensor]:
    """The head smoothed over tokens: s_t = decay s_{t-1} + (1 - decay) d_t, s_0 = d_0; ask where s_t > eta (CPR)."""
    d = context.deferral_probs
    if context.state is None:
        smoothed = d
    else:
        smoothed = torch.where(context.state.isnan(), d, decay * context.state + (1 - decay) * d)
    return context.ask_where(smoothed > context.threshold), smoothed


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": lambda x: (x < 1).float(),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + torch.cos(math.pi * x)) / 2,
    "exponential": lambda x: torch.where(x < 1, torch.exp(-5 * x), 0.0),
}


def scheduled(context: RoutingContext, shape: str = "linear", steps: int = 32) -> Tensor:
    """The head under a threshold that starts at "never" and reaches eta after `steps` new tokens:

    eta_t = eta + (1 - eta) g(t / steps), with g falling from 1 to 0: `linear` 1 - x, `cosine` (1 + cos(pi x)) / 2,
    `exponential` exp(-5 x), `constant` 1 throughout (the base writes the first `steps` tokens alone).
    """
    if shape not in SCHEDULES:
        raise ConfigurationError(
            f'shape is "{shape}"; allowed are {", ".join(SCHEDULES)}.{did_you_mean(shape, SCHEDULES)}'
        )
    if context.step is None:
        raise ConfigurationError(
            "The scheduled router needs the step of each token, which this engine does not hand out."
        )
    progress = (context.step.float() / max(steps, 1)).clamp(max=1.0)
    threshold = context.threshold + (1 - context.threshold) * SCHEDULES[shape](progress)
    return context.ask_where(context.deferral_probs > threshold)


def random(context: RoutingContext, rate: float) -> Tensor:
    """Ask with probability `rate`, whatever the text: the control that reviewers ask for."""
    return context.ask_where(_uniform(context) < rate)


def entropy(context: RoutingContext, cut: float) -> Tensor:
    """Ask where the base's next-token entropy exceeds `cut` nats."""
    logprobs = context.base_logprobs
    return context.ask_where(-(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(dim=-1) > cut)


def top_probability(context: RoutingContext, cut: float) -> Tensor:
    """Ask where the base's largest next-token probability is below `cut`."""
    return context.ask_where(context.base_logprobs.amax(dim=-1).exp() < cut)


def margin(context: RoutingContext, cut: float) -> Tensor:
    """Ask where the base's two largest next-token probabilities differ by less than `cut`."""
    top = context.base_logprobs.topk(2, dim=-1).values.exp()
    return context.ask_where(top[:, 0] - top[:, 1] < cut)


def always(context: RoutingContext) -> Tensor:
    """The assistant that the head prefers writes everything."""
    return context.ask_where(torch.ones_like(context.deferral_probs, dtype=torch.bool))


def never(context: RoutingContext) -> Tensor:
    """The base writes everything."""
    return context.ask_where(torch.zeros_like(context.deferral_probs, dtype=torch.bool))


def sampled(context: RoutingContext) -> Tensor:
    """Z_t drawn from pi(. | x_<t): when the writer samples too, ancestral sampling of the marginal model, exactly."""
    below = context.writer_probs.double().cumsum(dim=-1) <= _uniform(context).unsqueeze(-1)
    return below.sum(dim=-1).clamp(max=context.writer_probs.shape[1] - 1)


def _uniform(context: RoutingContext) -> Tensor:
    if context.uniform is None:
        raise ConfigurationError(
            "This router needs a random number for each token, which this engine does not hand out."
        )
    return context.uniform


ROUTERS: dict[str, Callable[..., Any]] = {
    "learned": learned,
    "ema": ema,
    "scheduled": scheduled,
    "random": random,
    "entropy": entropy,
    "top_probability": top_probability,
    "margin": margin,
    "always": always,
    "never": never,
    "sampled": sampled,
}

# Routers that decide by the threshold; the others have a cut or a rate of their own.
THRESHOLD_ROUTERS = (learned, ema, scheduled)


def resolve_router(spec: Spec | None) -> Router:
    """The router that `spec` names; `None` is the learned head.

    Raises:
        [`ConfigurationError`]: an unknown name or parameter, or a parameter that is missing.
    """
    return bind(*parse_spec("router", "learned" if spec is None else spec, ROUTERS))


def uses_threshold(router: Router) -> bool:
    """Whether the router decides by the threshold (a callable of the user's is taken to)."""
    function = function_of(router)
    return function in THRESHOLD_ROUTERS or function not in ROUTERS.values()


def threshold_of_rate(deferral: DeferralConfig, rate: float, router: Router = learned) -> float:
    """The threshold that the checkpoint's calibration table has for a deferral rate.

    Raises:
        [`CalibrationError`]: the table does not answer that rate, or was not measured with this router.
    """
    if function_of(router) is not learned:
        raise CalibrationError(
            f"deferral_rate={rate} with another router than the learned one: the calibration table was measured with "
            "the learned router; pass threshold= instead, or the router's own cut or rate."
        )
    return deferral.threshold_for_rate(rate)


def uses_randomness(router: Router) -> bool:
    """Whether the router draws random numbers (a callable of the user's is taken to)."""
    function = function_of(router)
    return function in (random, sampled) or function not in ROUTERS.values()


def function_of(router: Router) -> Router:
    """The function of [`ROUTERS`], or of the user's, that a router with bound parameters calls."""
    return router.func if isinstance(router, functools.partial) else router


def route(router: Router, context: RoutingContext) -> tuple[Tensor, Tensor | None]:
    """Call a router and return `(writers, state)`, with `state` None for a router without a memory."""
    result = router(context)
    return result if isinstance(result, tuple) else (result, None)
