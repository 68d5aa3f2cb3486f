"""A writer over serving engines (vLLM, or transformers in sessions): many answers at once, batched continuously."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from collm.configuration import DeferralConfig
from collm.decoding.routers import resolve_router, threshold_of_rate
from collm.engines.collaboration import Request, collaborate
from collm.engines.session import Sampling
from collm.errors import ConfigurationError
from collm.evaluation.generations import Generation
from collm.evaluation.runner import Problem, answer_limit

# Seconds for one assistant token: nobody waits at the other end, and at first every prompt is read before any token.
PATIENCE = 1800.0


class LateEngines:
    """
    Engines that start together when one of them is to write: where every text is there already, none does.

    Args:
        start (callable): starts the base's and the assistants'.
    """

    def __init__(self, start: Callable[[], tuple[Any, list[Any]]]) -> None:
        self._start = start
        self._started: list[Any] = []

    def __getitem__(self, k: int) -> LateEngine:
        return LateEngine(self, k)

    def get(self, k: int) -> Any:
        """The base's (0) or an assistant's engine."""
        if not self._started:
            base, assistants = self._start()
            self._started = [base, *assistants]
        return self._started[k]

    async def close(self, k: int) -> None:
        """Ends that engine, if they were started."""
        if self._started:
            await self._started[k].close()


@dataclass
class LateEngine:
    """One of [`LateEngines`], in the place of an engine."""

    engines: LateEngines
    k: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engines.get(self.k), name)

    async def close(self) -> None:
        await self.engines.close(self.k)


@dataclass
class EngineWriter:
    """
    Writes through engines, which batch continuously: as many problems at once as the batch size says.

    Args:
        base ([`~collm.engines.session.Engine`]): the base, or a single model where there are no assistants.
        assistants (sequence of engines): those to ask.
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        eos_ids (`frozenset[int]`): tokens that end an answer.
        deferral ([`DeferralConfig`]): the checkpoint's, for its threshold and table.
        options (`dict`): arguments of `generate` that engines know: `threshold`, `deferral_rate`, `router`,
            `do_sample`, `temperature`, `top_p`.
        max_new_tokens, seed: as in [`~collm.evaluation.runner.ModelWriter`].

    Raises:
        [`ConfigurationError`]: a combiner other than "assistant": engines do not hand out whole distributions.
    """

    base: Any
    assistants: Sequence[Any]
    tokenizer: Any
    eos_ids: frozenset[int]
    deferral: DeferralConfig
    options: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 512
    seed: int = 0
    loop: asyncio.Runner = field(default_factory=asyncio.Runner)  # engines live in one event loop

    def __post_init__(self) -> None:
        if self.options.get("combiner") not in (None, "assistant"):
            raise ConfigurationError(
                "combiners need whole distributions, which engines keep: use --engine transformers"
            )

    def write(self, problems: Sequence[Problem], at_once: int) -> Generator[list[Generation], None, None]:
        """Answers as they are finished: where one ends, the next problem begins. Their `seconds` add up to the
        wall-clock time."""
        if not problems:
            return
        longest = min(engine.max_length for engine in (self.base, *self.assistants))  # late ones start, off the clock
        waiting, running = iter(problems), set[asyncio.Task[Generation]]()
        started = time.perf_counter()

        async def some() -> list[Generation]:
            """Waits until at least one answer is finished."""
            more = islice(waiting, at_once - len(running))
            running.update(asyncio.ensure_future(self._write(problem, longest)) for problem in more)
            if not running:
                return []
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running.difference_update(done)
            return [task.result() for task in done]

        async def stop() -> None:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

        try:
            while finished := self.loop.run(some()):
                seconds = round((time.perf_counter() - started) / len(finished), 4)
                started = time.perf_counter()
                for generation in finished:
                    generation.seconds = seconds
                yield finished
        finally:
            self.loop.run(stop())

    def close(self) -> None:
        """Ends the engines and their event loop."""
        for engine in (self.base, *self.assistants):
            self.loop.run(engine.close())
        self.loop.close()

    async def _write(self, problem: Problem, longest: int) -> Generation:
        request = Request(
            problem.prompt_ids,
            answer_limit(problem, self.max_new_tokens, longest),
            self._threshold(),
            self.options.get("router") if self.assistants else "never",
            self._sampling(problem.id),
            self.eos_ids,
            report=bool(self.assistants),
        )
        ids: list[int] = []
        source: list[int] = []
        probabilities: list[float] = []
        finish = None
        answer: Any = collaborate(request, self.base, self.assistants, assistant_timeout=PATIENCE)
        async with aclosing(answer) as pieces:
            async for piece in pieces:
                ids += piece.token_ids
                source += piece.source
                probabilities += [d for d in piece.deferral_probs if d is not None]
                finish = piece.finish or finish
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Generation(problem.id, text, ids, source, probabilities, finish == "length")

    def _threshold(self) -> float:
        rate = self.options.get("deferral_rate")
        if rate is not None:
            return threshold_of_rate(self.deferral, rate, resolve_router(self.options.get("router")))
        return self.options.get("threshold", self.deferral.threshold)

    def _sampling(self, number: int) -> Sampling:
        seed = self.seed * 1_000_000 + number  # greedy too: routers may draw
        if not self.options.get("do_sample"):
            return Sampling(seed=seed)
        return Sampling(
            temperature=self.options.get("temperature", 1.0), top_p=self.options.get("top_p", 1.0), seed=seed
        )
