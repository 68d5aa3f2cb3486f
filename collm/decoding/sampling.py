"""Choosing tokens: greedily, or with randomness that is a function of seed, row, step and token alone.

Sampling takes argmax_v (score_v + g_v) with Gumbel noise g_v (the Gumbel-max trick: an exact draw from softmax(score)).
The noise comes from a counter-based generator instead of a stream, so that it does not matter which model asks, how
often, in what batch, or whether the token is a draft that is asked for again. Two consequences:

- a row's text does not depend on its neighbours, and rolling back needs no bookkeeping;
- two models that draw for the same position share their noise, so they draw the same token whenever their
  distributions nearly agree: with probability at least (1 - TV) / (1 + TV), TV their total variation distance (Daliri
  et al., 2025, *Coupling without Communication and Drafter-Invariant Speculative Decoding*). A draft is accepted when
  the tokens are equal, so that speculation under sampling returns the very tokens of the plain loop, not only the same
  distribution. (Accepting with probability min(1, P_1 / P_0) accepts a little more, 1 - TV, and gives that up.)
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
ROUTER, TOKEN = 1, 2  # purposes: noise for the router and for the token are independent


def mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of 64-bit integers that scatters all bits."""
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) & MASK
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) & MASK
    return x ^ (x >> 31)


def noise_key(seed: int, row: int, step: int, purpose: int) -> int:
    """64-bit key of one row's noise at one step."""
    key = seed & MASK
    for part in (row, step, purpose):
        key = mix((key + (part + 1) * GOLDEN) & MASK)
    return key


def to_uniform(bits: int) -> float:
    """The upper 53 bits as a number strictly between 0 and 1."""
    return ((bits >> 11) + 0.5) / (1 << 53)


def uniform(seed: int, row: int, step: int, purpose: int = ROUTER) -> float:
    """One uniform number in (0, 1)."""
    return to_uniform(mix(noise_key(seed, row, step, purpose)))


def gumbel(keys: list[int], vocabulary: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise.

    Args:
        keys (`list[int]`): one [`noise_key`] for each row.
        vocabulary (`int`): tokens; token v's noise is a function of key and v, whatever the size of the vocabulary.

    Returns:
        `torch.Tensor` of shape `(rows, vocabulary)`, float64.
    """
    counter = torch.arange(1, vocabulary + 1, device=device) * _signed(GOLDEN)
    bits = torch.tensor([[_signed(key)] for key in keys], device=device) + counter
    bits = (bits ^ _shift_right(bits, 30)) * _signed(MULTIPLIERS[0])
    bits = (bits ^ _shift_right(bits, 27)) * _signed(MULTIPLIERS[1])
    bits = bits ^ _shift_right(bits, 31)
    uniforms = (_shift_right(bits, 11).double() + 0.5) / (1 << 53)
    return -(-uniforms.log()).log()


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Logical shift: torch's shifts of int64 keep the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
