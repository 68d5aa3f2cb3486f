"""One request: a coroutine over a base session and up to K assistant sessions that write one answer together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from collm.decoding.routers import (
    Router,
    RoutingContext,
    entropy,
    function_of,
    learned,
    margin,
    never,
    resolve_router,
    route,
    sampled,
    top_probability,
)
from collm.decoding.sampling import uniform
from collm.errors import AssistantError, ConfigurationError

from .session import Engine, Gate, Piece, Sampling, Session, cut_of_threshold

ASSISTANT_TIMEOUT = 60.0  # seconds that one assistant token may take


@dataclass
class Request:
    """What one answer is to be.

    Args:
        prompt_ids (`list[int]`): the base's prompt.
        max_tokens (`int`): tokens of the answer, at most.
        threshold (`float`): eta; an assistant writes where d_t > eta. 1 never asks, a negative one always does.
        router (*optional*): name, dictionary or callable, as for `generate`; see [`~collm.decoding.routers`].
        sampling ([`~session.Sampling`]): for whoever writes.
        stop_ids (`frozenset[int]`): token ids that end the answer.
        assistant_prompts (`list[list[int]]`, *optional*): a prompt of its own for each assistant.
        on_assistant_error (`str`): `"error"`: the failure is raised; `"fallback"`: the base goes on alone.
        report (`bool`): give `deferral_probs`.
    """

    prompt_ids: list[int]
    max_tokens: int
    threshold: float = 0.5
    router: Any = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    assistant_prompts: Sequence[Sequence[int]] | None = None
    on_assistant_error: Literal["error", "fallback"] = "error"
    report: bool = False


@dataclass
class Written:
    """Tokens in order, each with its source.

    Attributes:
        token_ids, source (`list[int]`): tokens; 0 for the base, k for assistant k.
        deferral_probs (`list[float | None]`): d_t, if the request asked for a report.
        finish (*optional*): `"stop"` or `"length"` in the last one.
        fallback (`bool`): the assistant was wanted for what follows, and failed; the base goes on alone.
    """

    token_ids: list[int]
    source: list[int]
    deferral_probs: list[float | None]
    finish: str | None = None
    fallback: bool = False


@dataclass
class Asked:
    """What an observer (metrics, the circuit breaker) hears of each hand-off."""

    assistant: int
    seconds: float
    tokens_read: int
    error: Exception | None = None
    asked: bool = True  # else `available` said no


async def collaborate(
    request: Request,
    base: Engine,
    assistants: Sequence[Engine],
    available: Callable[[int], bool] = lambda k: True,
    observe: Callable[[Asked], None] = lambda asked: None,
    assistant_timeout: float = ASSISTANT_TIMEOUT,
    prefetch: Callable[[int], bool] = lambda k: False,
) -> AsyncIterator[Written]:
    """
    Write one answer.

    1. The base writes until its gate opens: whoever wrote the tokens so far, it reads each of them once.
    2. The assistant that the head prefers reads what it has missed, in one chunk, and writes one token.
    3. The base is handed that token. Until a stop token or `max_tokens`.

    An assistant reads the prompt when it is first asked; where `prefetch` says so, while the base does.

    Args:
        request ([`Request`]): the prompt and how to answer it.
        base ([`~session.Engine`]), assistants (K engines): who writes.
        available (`Callable[[int], bool]`): whether assistant k may be asked now; a circuit breaker. Where it may not,
            that counts as its failure.
        observe (`Callable[[Asked], None]`): told of each hand-off.
        assistant_timeout (`float`): seconds for one assistant token.
        prefetch (`Callable[[int], bool]`): whether assistant k reads its prompt at once, so that nobody waits for that
            at the first deferral. For engines on devices of their own; for an answer without a deferral it is in vain.

    Raises:
        AssistantError: the base failed; or an assistant did (a token that the base does not know is a failure too), and
            the request does not want the base to go on alone.
    """
    decider = Decider(request, len(assistants))
    writer = base.open(request.prompt_ids, request.sampling)
    helpers: dict[int, Helper] = {}
    tokens: list[int] = []
    alone = False

    def helper(k: int) -> Helper:
        if k not in helpers:
            prompt = request.assistant_prompts[k - 1] if request.assistant_prompts else request.prompt_ids
            helpers[k] = Helper(assistants[k - 1].open(prompt, request.sampling))
        return helpers[k]

    try:
        for k in range(1, len(assistants) + 1) if decider.asks else ():
            if prefetch(k):
                with contextlib.suppress(AssistantError):  # raised again where it is needed
                    helper(k).prefetch()
        while True:
            # 1. The base writes.
            turn = decider.turn(writer, len(tokens), alone)
            async for piece in turn:
                tokens += piece.token_ids
                finish = None if piece.finish == "deferral" else piece.finish
                if piece.token_ids or finish:
                    probs = piece.deferral_probs if request.report else None
                    count = len(piece.token_ids)
                    yield Written(piece.token_ids, [0] * count, list(probs) if probs else [None] * count, finish)
            if piece.finish != "deferral":
                return

            # 2. The assistant reads what it missed and writes one token.
            k = piece.assistant
            start, asked = time.perf_counter(), available(k)
            try:
                if not asked:
                    raise AssistantError(f"assistant {k} ({assistants[k - 1].name}) is not available at present.")
                async with asyncio.timeout(assistant_timeout):
                    token, missed = await helper(k).write(tokens)
                if not 0 <= token < base.vocab_size:
                    raise AssistantError(
                        f"assistant {k} ({assistants[k - 1].name}) wrote token id {token}; the base knows 0 to "
                        f"{base.vocab_size - 1}. Check that the two have one tokenizer."
                    )
            except (AssistantError, TimeoutError) as error:
                failure = _failure(error, k, assistant_timeout)
                observe(Asked(k, time.perf_counter() - start, 0, failure, asked))
                if request.on_assistant_error == "error":
                    raise failure from None
                alone = True
                yield Written([], [], [], fallback=True)
                continue
            observe(Asked(k, time.perf_counter() - start, missed))
            tokens.append(token)

            # 3. The base is handed that token.
            finish = "stop" if token in request.stop_ids else "length" if len(tokens) == request.max_tokens else None
            yield Written([token], [k], [piece.deferral_prob if request.report else None], finish)
            if finish:
                return
            writer.extend([token])
    finally:
        await asyncio.shield(_close([writer, *helpers.values()]))


class Helper:
    """An assistant's session in one answer.

    Args:
        session ([`~session.Session`]): just opened.
    """

    def __init__(self, session: Session):
        self._session = session
        self._has = 0  # tokens of the answer that the session has
        self._first: asyncio.Task[int] | None = None

    def prefetch(self) -> None:
        """Read the prompt now. The token that this writes is the answer's first, or is taken back unread."""
        self._first = asyncio.create_task(_next_token(self._session))

    async def write(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The token behind `tokens`, those of the answer, and how many of them had to be read for it."""
        token = None
        if self._first is not None:
            token, self._first = await self._first, None
        if token is None or tokens:
            if token is not None:
                self._session.retract()
            self._session.extend(tokens[self._has :])
            token = await _next_token(self._session)
        missed, self._has = len(tokens) - self._has, len(tokens) + 1
        return token, missed

    async def close(self) -> None:
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._session.close()


class Decider:
    """Where a request's router decides: inside the base's engine (a gate), or here, one base token at a time.

    Raises:
        ConfigurationError: the router needs distributions that engines do not hand out.
    """

    def __init__(self, request: Request, num_assistants: int):
        self.request = request
        self.router: Router = resolve_router(request.router)
        self.state: torch.Tensor | None = None
        self.seed = random.getrandbits(63) if request.sampling.seed is None else request.sampling.seed
        self.gate, self.inside = gate_of(self.router, request.threshold, num_assistants)
        self.asks = self.gate is not None or not self.inside

    def turn(self, base: Session, step: int, alone: bool) -> AsyncIterator[Piece]:
        """The base's turn from token `step` on; `alone`: nobody is to be asked any more."""
        left, stop_ids = self.request.max_tokens - step, self.request.stop_ids
        if alone or self.inside:
            return base.decode(left, stop_ids, None if alone else self.gate, self.request.report)
        return self._turn_by_token(base, step)

    async def _turn_by_token(self, base: Session, step: int) -> AsyncIterator[Piece]:
        for at in range(step, self.request.max_tokens):
            piece = await _last_piece(base.decode(1, self.request.stop_ids, report=True))
            assert piece.deferral_probs is not None
            d = piece.deferral_probs[-1]
            if k := self._writer(d, piece.preferred, at):
                base.retract()
                yield Piece([], [], "deferral", k, d)
                return
            last = at + 1 == self.request.max_tokens
            finish: Any = "stop" if piece.finish == "stop" else "length" if last else None
            yield Piece(piece.token_ids, piece.deferral_probs, finish)
            if finish:
                return

    def _writer(self, deferral_prob: float, preferred: int, step: int) -> int:
        probs = torch.zeros(1, preferred + 1)
        probs[0, 0], probs[0, preferred] = 1 - deferral_prob, deferral_prob
        context = RoutingContext(
            writer_probs=probs,
            threshold=self.request.threshold,
            step=torch.tensor([step]),
            uniform=torch.tensor([uniform(self.seed, 0, step)], dtype=torch.float64),
            state=self.state,
        )
        writers, self.state = route(self.router, context)
        return int(writers)


def gate_of(router: Router, threshold: float, num_assistants: int = 1) -> tuple[Gate | None, bool]:
    """The gate that `router` is, and whether it decides inside of the engine at all.

    Raises:
        ConfigurationError: the router needs distributions that engines do not hand out: whole ones of the next token,
            or, with several assistants, that over the writers.
    """
    function = function_of(router)
    cut = router.keywords.get("cut", 0.0) if isinstance(router, functools.partial) else 0.0
    if function is margin:
        raise ConfigurationError(
            'The router "margin" needs whole distributions, which engines keep: take "top_probability".'
        )
    if function is sampled and num_assistants > 1:
        raise ConfigurationError(
            f'The router "sampled" draws among the base and {num_assistants} assistants, of which engines tell the '
            'preferred one only: take "learned", or one assistant.'
        )
    if function is never or (function is learned and threshold >= 1):
        return None, True
    if function is learned:
        return Gate("learned", cut_of_threshold(threshold)), True
    if function is entropy:
        return Gate("entropy", cut), True
    if function is top_probability:
        return Gate("top_probability", 1 - cut), True
    return None, False


def _failure(error: Exception, k: int, timeout: float) -> AssistantError:
    if isinstance(error, AssistantError):
        return error
    return AssistantError(f"assistant {k} wrote nothing within {timeout:g} seconds.")


async def _next_token(session: Session) -> int:
    piece = await _last_piece(session.decode(1))
    if not piece.token_ids:
        raise AssistantError("an assistant answered without a token.")
    return piece.token_ids[-1]


async def _last_piece(pieces: AsyncIterator[Piece]) -> Piece:
    return [piece async for piece in pieces][-1]


async def _close(sessions: Sequence[Session | Helper]) -> None:
    for session in sessions:
        await session.close()
