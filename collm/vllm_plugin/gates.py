"""Deferral as reserved tokens: hard gates written into extra columns of the logits.

The vocabulary of a deferral checkpoint is V tokens; the plugin's model has V + R. The R reserved columns are gates: one
group of K for each router that can decide inside the engine, one column for each assistant in a group,

    column = max(logits) + S * score - C      for the assistant that the head prefers (argmax_k z_k)
    column = max(logits) - 2C                 for the others

with `score` in logits, nats or a probability (see `ROUTERS`). C is so large that no gate ever wins, or has any
probability, for a request that does not ask. A request asks with vLLM's stock parameters: it adds C - S * cut to the
columns of one router (`logit_bias`) and stops on them (`stop_token_ids`). Then a column beats every token exactly where
score > cut, greedy or sampled, with any threshold for any request of the batch. Relative to the maximum, so that the
base's own logits keep every bit. S and C are powers of two: float32 resolves a score to 8e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collm.errors import ConfigurationError, did_you_mean

S = float(2**17)
C = float(2**23)
MAX_SCORE = 30.0  # S * MAX_SCORE must stay well below C

# router -> what its score is; a request's cut is in the same unit
ROUTERS = {
    "learned": "logit of the deferral probability d_t",
    "entropy": "entropy of the base's next-token distribution, nats",
    "top_probability": "1 - the base's top probability",
}


def num_reserved(num_assistants: int) -> int:
    """R: ids that the plugin adds to the vocabulary."""
    return len(ROUTERS) * num_assistants


def reserved_ids(vocab_size: int, num_assistants: int, router: str = "learned") -> list[int]:
    """The K ids on which a request of `router` stops; the k-th says "assistant k + 1 writes"."""
    if router not in ROUTERS:
        raise ConfigurationError(
            f'router "{router}" does not decide inside of the engine; allowed are {", ".join(ROUTERS)}.'
            f"{did_you_mean(router, ROUTERS)}"
        )
    first = vocab_size + list(ROUTERS).index(router) * num_assistants
    return list(range(first, first + num_assistants))


def gate_bias(cut: float) -> float:
    """The `logit_bias` with which a request opens a gate where score > cut."""
    return C - S * cut


def score_of_logprob(logprob: float) -> float:
    """The score in a gate's raw log-probability, up to (logsumexp - max of the base's logits) / S < 1e-4."""
    return (logprob + C) / S


def write_gates(logits: Tensor, deferral_logits: Tensor, uncertainty: Tensor, vocab_size: int) -> Tensor:
    """
    Write the gates into the reserved columns, in place.

    Args:
        logits (`torch.Tensor` of shape `(batch, vocab_size + R)`, float32): the architecture's logits; what the
            reserved columns hold is overwritten.
        deferral_logits (`torch.Tensor` of shape `(batch, K)`, float32): z.
        uncertainty (`torch.Tensor` of shape `(batch, 4)`, float32): see [`~collm.losses.uncertainty_features`].
        vocab_size (`int`): V.

    Returns:
        `logits`; columns below V are what they were.
    """
    head = deferral_logits.logsumexp(-1).clamp(-MAX_SCORE, MAX_SCORE)  # d_t = sigmoid(logsumexp_k z_k)
    scores = torch.stack([head, uncertainty[:, 0], 1 - uncertainty[:, 2]], dim=-1)  # (batch, routers)
    preferred = torch.zeros_like(deferral_logits).scatter_(-1, deferral_logits.argmax(-1, keepdim=True), 1.0)
    gates = torch.where(preferred[:, None, :] > 0, S * scores[:, :, None] - C, -2 * C)  # (batch, routers, K)
    logits[:, vocab_size:] = logits[:, :vocab_size].amax(-1, keepdim=True) + gates.flatten(1)
    return logits
