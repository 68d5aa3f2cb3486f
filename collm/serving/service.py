"""What the server does, apart from HTTP: engines, admission, and one answer from prompt to text."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from collm.configuration import DeferralConfig
from collm.decoding.routers import Router, learned, threshold_of_rate
from collm.engines.collaboration import Asked, Request, Written, collaborate
from collm.engines.session import Engine
from collm.errors import AssistantRefusal, CoLLMError

from .breaker import CircuitBreaker
from .metrics import Metrics
from .text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BusyError(CoLLMError):
    """The queue is full. `retry_after` (`int`): seconds after which trying again makes sense."""

    def __init__(self, retry_after: int):
        super().__init__(f"The server is at capacity; try again in {retry_after} s.")
        self.retry_after = retry_after


class UnknownModelError(CoLLMError):
    """A model name that this server does not serve."""


@dataclass
class Limits:
    """
    Args:
        max_running (`int`): answers that are written at once.
        max_waiting (`int`): answers that wait for their turn; beyond that, 429.
        max_tokens (`int`, *optional*): tokens of one answer, at most.
        assistant_timeout (`float`): seconds for one assistant token.
    """

    max_running: int = 128
    max_waiting: int = 512
    max_tokens: int | None = None
    assistant_timeout: float = 60.0


@dataclass
class Delta:
    """What one step adds to one answer."""

    text: str
    token_ids: list[int]
    source: list[int]
    deferral_probs: list[float | None]
    finish: str | None = None
    fallback_from: int | None = None  # index of the first token that the base writes because an assistant failed


@dataclass
class Answer:
    """All deltas of an answer in one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    deferral_probs: list[float | None] = field(default_factory=list)
    finish: str | None = None
    fallback_from: int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.source += delta.source
        self.deferral_probs += delta.deferral_probs
        self.finish = delta.finish or self.finish
        self.fallback_from = delta.fallback_from if delta.fallback_from is not None else self.fallback_from


class Service:
    """
    A base and its assistants behind one name.

    Args:
        name (`str`): the served name.
        base ([`~collm.engines.session.Engine`]), assistants (K engines).
        tokenizer (`PreTrainedTokenizerBase`): of all of them.
        deferral ([`DeferralConfig`]): the checkpoint's.
        threshold (`float`, *optional*): of requests that give none; the checkpoint's by default.
        on_assistant_error (`str`): of requests that give none: `"error"` or `"fallback"`.
        limits ([`Limits`], *optional*).
        eos_ids (`frozenset[int]`): tokens that end an answer.
        prefetch (`bool`): assistants that answer read each prompt while the base does; see [`collaborate`].
    """

    def __init__(
        self,
        name: str,
        base: Engine,
        assistants: Sequence[Engine],
        tokenizer: PreTrainedTokenizerBase,
        deferral: DeferralConfig,
        threshold: float | None = None,
        on_assistant_error: Literal["error", "fallback"] = "error",
        limits: Limits | None = None,
        eos_ids: frozenset[int] = frozenset(),
        prefetch: bool = False,
    ):
        self.name, self.base, self.assistants, self.tokenizer = name, base, list(assistants), tokenizer
        self.deferral = deferral
        self.threshold = deferral.threshold if threshold is None else threshold
        self.on_assistant_error = on_assistant_error
        self.limits = limits or Limits()
        self.eos_ids = eos_ids
        self.prefetch = prefetch
        self.vocab_size = base.vocab_size
        self.metrics = Metrics()
        self.breakers = [CircuitBreaker(trial_time=self.limits.assistant_timeout) for _ in self.assistants]
        self.created = int(time.time())
        self.admitted = 0
        self._slots = asyncio.Semaphore(self.limits.max_running)
        self._seconds_per_answer = 1.0
        self._probes: dict[int, asyncio.Task[bool]] = {}

    # ------------------------------------------------------------------------------------------------- thresholds

    def threshold_of(
        self, model: str, threshold: float | None = None, rate: float | None = None, router: Router = learned
    ) -> float:
        """The threshold of a request: from its model name (`name@0.6`, `name@rate=0.2`), its fields, or the server's.

        Raises:
            UnknownModelError: another model.
            CalibrationError: a rate, and the checkpoint has no table that answers it, or not for this router.
            CoLLMError: the name and the fields both say something, or what follows `@` is not a threshold.
        """
        suffix = model.removeprefix(self.name)
        if suffix == model or (suffix and suffix[0] != "@"):
            raise UnknownModelError(f'There is no model "{model[:200]}" here; this server has "{self.name}".')
        if suffix:
            if threshold is not None or rate is not None:
                raise CoLLMError("The model name and the request's fields both set the threshold; use one of them.")
            threshold, rate = self._parse(suffix[1:])
        if rate is not None:
            return threshold_of_rate(self.deferral, rate, router)
        return self.threshold if threshold is None else threshold

    @staticmethod
    def _parse(text: str) -> tuple[float | None, float | None]:
        is_rate = text.startswith("rate=")
        try:
            value = float(text.removeprefix("rate="))
        except ValueError:
            value = math.nan
        if not (0 if is_rate else -1) <= value <= 1:
            raise CoLLMError(f'"@{text[:50]}" is neither a threshold (name@0.6) nor a rate (name@rate=0.2).')
        return (None, value) if is_rate else (value, None)

    # --------------------------------------------------------------------------------------------------- admission

    @property
    def max_length(self) -> int:
        """Longest prompt and answer together."""
        return min(engine.max_length for engine in [self.base, *self.assistants])

    def check_count(self, answers: int) -> None:
        """Refuse what could not be admitted even if nothing else were asked.

        Raises:
            CoLLMError: more answers than there are places.
        """
        places = self.limits.max_running + self.limits.max_waiting
        if answers > places:
            raise CoLLMError(f"the request asks for {answers} answers; this server takes {places} at once.")

    def admit(self, answers: int) -> None:
        """Take places for `answers` answers; give each back with `leave`.

        Raises:
            BusyError: the queue is full.
        """
        if self.admitted + answers > self.limits.max_running + self.limits.max_waiting:
            self.metrics.refused.inc()
            waves = max(1, self.admitted / self.limits.max_running)
            raise BusyError(max(1, math.ceil(waves * self._seconds_per_answer)))
        self.admitted += answers
        self._gauge()

    def leave(self, answers: int) -> None:
        self.admitted -= answers
        self._gauge()

    def _gauge(self) -> None:
        running = min(self.admitted, self.limits.max_running)
        self.metrics.running.set(running)
        self.metrics.waiting.set(self.admitted - running)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        start = time.perf_counter()
        async with self._slots:
            self.metrics.queue_time.observe(time.perf_counter() - start)
            yield

    # ----------------------------------------------------------------------------------------------------- answers

    async def answer(
        self, request: Request, stops: Sequence[str] = (), skip_special_tokens: bool = True
    ) -> AsyncIterator[Delta]:
        """Write one answer: tokens, their text, until a stop string, a stop token or the length.

        Raises:
            AssistantError: an engine failed and the request does not fall back.
        """
        detokenizer = Detokenizer(self.tokenizer, skip_special_tokens, request.prompt_ids)
        stopper = StopStrings(stops)
        written = deferred = 0
        start = time.perf_counter()
        handing_off = 0.0

        def observe(asked: Asked) -> None:
            nonlocal handing_off
            handing_off += asked.seconds
            self._heard(asked)

        async with self._slot():
            begin = time.perf_counter()
            pieces = collaborate(
                request,
                self.base,
                self.assistants,
                self._available,
                observe,
                self.limits.assistant_timeout,
                prefetch=lambda k: self.prefetch and not self.breakers[k - 1].is_open,
            )
            try:
                async with aclosing(pieces):  # type: ignore[type-var]
                    async for piece in pieces:
                        if not written and piece.token_ids:
                            self.metrics.first_token.observe(time.perf_counter() - start)
                        delta = self._delta(piece, detokenizer, stopper, written)
                        written += len(delta.token_ids)
                        deferred += sum(k > 0 for k in delta.source)
                        yield delta
                        if delta.finish:
                            break
            except (GeneratorExit, asyncio.CancelledError):
                self.metrics.abandoned.inc()
                raise
            finally:
                self._account(begin, start, handing_off, written, deferred, len(request.prompt_ids))

    def _delta(self, piece: Written, detokenizer: Detokenizer, stopper: StopStrings, written: int) -> Delta:
        """The piece with its text; a stop string ends it behind the token that completes it, however many came."""
        ends = piece.finish is not None
        shown = len(piece.token_ids) - (piece.finish == "stop")  # the stop token is not text
        text = "" if shown else stopper.add(detokenizer.add([], final=ends), final=ends)
        for n, token in enumerate(piece.token_ids[:shown], start=1):
            final = ends and n == shown
            text += stopper.add(detokenizer.add([token], final=final), final=final)
            if stopper.stopped is not None:
                piece = replace(
                    piece,
                    token_ids=piece.token_ids[:n],
                    source=piece.source[:n],
                    deferral_probs=piece.deferral_probs[:n],
                    finish="stop",
                )
                break
        if piece.fallback:
            self.metrics.fallbacks.inc()
        begins = written + len(piece.token_ids) if piece.fallback else None
        return Delta(text, piece.token_ids, piece.source, piece.deferral_probs, piece.finish, begins)

    def _available(self, k: int) -> bool:
        return self.breakers[k - 1].allow()

    def _heard(self, asked: Asked) -> None:
        name, breaker = self.assistants[asked.assistant - 1].name, self.breakers[asked.assistant - 1]
        if asked.error is None:
            breaker.success()
            self.metrics.handoff.labels(name).observe(asked.seconds)
            self.metrics.engine_time.labels(name).inc(asked.seconds)
        else:
            if isinstance(asked.error, AssistantRefusal):
                breaker.success()  # it is there: what it would not do is the request's affair
            elif asked.asked:
                breaker.failure()
            self.metrics.assistant_errors.labels(name).inc()
        self.metrics.breaker_open.labels(name).set(breaker.is_open)

    def _account(
        self, begin: float, start: float, handing_off: float, written: int, deferred: int, prompt: int
    ) -> None:
        seconds = time.perf_counter() - begin
        self._seconds_per_answer += 0.1 * (seconds - self._seconds_per_answer)
        m = self.metrics
        m.answer_time.observe(time.perf_counter() - start)
        m.engine_time.labels(self.base.name).inc(max(0.0, seconds - handing_off))
        m.prompt_tokens.inc(prompt)
        m.tokens.labels("base").inc(written - deferred)
        m.tokens.labels("assistant").inc(deferred)
        if written:
            m.deferral_rate.observe(deferred / written)

    # ------------------------------------------------------------------------------------------------------ health

    async def health(self, patience: float | None = 1.0) -> dict[str, Any]:
        """Whether the base can answer, and which assistants are asked at present.

        Args:
            patience (`float`, *optional*): seconds for the assistants to say that they are there, which tells their
                limits; `None`: until each has answered or failed. A slow assistant does not make the base ill.
        """
        for k, engine in enumerate(self.assistants):
            if k not in self._probes or self._probes[k].done():
                self._probes[k] = asyncio.create_task(engine.healthy())
        if self._probes:
            await asyncio.wait(self._probes.values(), timeout=patience)
        return {
            "status": "ok" if await self.base.healthy() else "base engine is down",
            "assistants": {
                engine.name: "not asked at present" if breaker.is_open else "ok"
                for engine, breaker in zip(self.assistants, self.breakers, strict=True)
            },
        }

    async def close(self) -> None:
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        for engine in [self.base, *self.assistants]:
            await engine.close()
