"""The session protocol: one sequence inside one engine, whose computed tokens are never computed again.

    session = engine.open(prompt_ids, sampling)         # nothing is computed yet
    async for piece in session.decode(max_tokens=64, gate=Gate("learned", 0.0)):
        ...                                             # tokens as the engine writes them
    session.extend([token])                             # somebody else wrote this one
    async for piece in session.decode(...): ...         # reads what it missed in one chunk, and goes on
    await session.close()                               # frees its memory in the engine at once

A session is used by one coroutine. Between two calls of `decode` it may be extended; the last token that a `decode`
wrote may be taken back (`retract`). An engine serves any number of sessions at once and batches them as it can.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class Sampling:
    """How whoever writes chooses a token.

    Args:
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy.
        top_p, top_k, min_p (*optional*): as everywhere; `top_k` 0 keeps all tokens.
        seed (`int`, *optional*): with it a request is reproducible, whatever else the engine is doing.
        repetition_penalty (`float`, *optional*, defaults to 1.0): over prompt and answer.
        logit_bias (`dict[int, float]`): added to the logits of token ids.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    def seed_at(self, position: int) -> int | None:
        """The seed of a chunk that starts at `position`: servers start a generator anew with every chunk (an engine of
        vLLM in this process goes on with that of a session's first)."""
        return None if self.seed is None else (self.seed * 1_000_003 + position * 7_919) % 2**31


@dataclass(frozen=True)
class Gate:
    """Where a base session stops and defers: the score of `router` exceeds `cut`; see [`~collm.vllm_plugin.gates`].

    `"learned"`: logit of d_t; `"entropy"`: nats; `"top_probability"`: 1 - the largest next-token probability.
    """

    router: str
    cut: float


Finish = Literal["stop", "length", "deferral"]


@dataclass(frozen=True)
class Piece:
    """What a session wrote since the last piece.

    Attributes:
        token_ids (`list[int]`): tokens, in order. A stop token is among them.
        deferral_probs (`list[float]`, *optional*): d_t of each token, if asked for.
        finish (*optional*): why `decode` ends with this piece: `"stop"` (a stop token), `"length"` (max_tokens or the
            engine's limit), `"deferral"` (an assistant is to write the next token).
        assistant (`int`): with `"deferral"`, which one, from 1; else 0.
        deferral_prob (`float`, *optional*): with `"deferral"`, d_t of the token that is to be written.
        preferred (`int`): with `report` and no gate, the assistant that the head prefers at the last token.
    """

    token_ids: list[int]
    deferral_probs: list[float] | None = None
    finish: Finish | None = None
    assistant: int = 0
    deferral_prob: float | None = None
    preferred: int = 1


class Session(Protocol):
    """One sequence in one engine."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens that somebody else wrote; they are computed with the next `decode`."""
        ...

    def retract(self) -> None:
        """Take back the last token that `decode` wrote; it was not computed yet, so nothing is lost."""
        ...

    def decode(
        self, max_tokens: int, stop_ids: frozenset[int] = frozenset(), gate: Gate | None = None, report: bool = False
    ) -> AsyncIterator[Piece]:
        """Write up to `max_tokens` tokens, until a stop token or until the gate opens.

        Args:
            max_tokens (`int`): at least 1. A deferral costs none.
            stop_ids (`frozenset[int]`): token ids that end the answer.
            gate ([`Gate`], *optional*): where to defer; needs a base with a deferral head.
            report (`bool`, *optional*): fill in `deferral_probs`.

        Raises:
            AssistantError: the engine is gone, or answered with something that is not a token.
        """
        ...

    async def close(self) -> None:
        """Free everything that the sequence holds in the engine; safe to call twice and from a `finally`."""
        ...


class Tokens:
    """The part of a [`Session`] that is the same in every engine: its tokens, computed or not."""

    def __init__(self, tokens: list[int]):
        self._tokens = tokens

    def extend(self, token_ids: Sequence[int]) -> None:
        self._tokens.extend(token_ids)

    def retract(self) -> None:
        del self._tokens[-1]


class Engine(Protocol):
    """Something that decodes sequences.

    Attributes:
        name (`str`): for logs and metrics.
        max_length (`int`): longest sequence, prompt and answer together, in tokens.
        vocab_size (`int`): ids that it understands.
    """

    name: str
    max_length: int
    vocab_size: int

    def open(self, prompt_ids: Sequence[int], sampling: Sampling) -> Session: ...

    async def healthy(self) -> bool: ...

    async def close(self) -> None: ...


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


MAX_LOGIT = 30.0  # sigmoid(30) is 1 in float32


def cut_of_threshold(threshold: float) -> float:
    """The cut of the learned gate for d_t > threshold: logit(threshold), finite; below 0 always open, from 1 never."""
    if threshold >= 1:
        return 2 * MAX_LOGIT
    if threshold <= 0:
        return -2 * MAX_LOGIT if threshold < 0 else -MAX_LOGIT
    return math.log(threshold) - math.log1p(-threshold)
