"""A model of transformers in this process: needs nothing beside collm.

All sessions share one [`~collm.decoding.cache.Reader`], the KV cache that `generate` uses. A single thread runs its
forwards, each over every session that waits for one by then, so that requests are batched as they come and the event
loop stays free. vLLM does the same with paged memory and kernels of its own; use it where many requests come at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from collm.decoding.cache import Reading, reader_for
from collm.decoding.sampling import TOKEN, gumbel, noise_key
from collm.errors import AssistantError
from collm.losses import deferral_probabilities, uncertainty_features

from .session import MAX_LOGIT, Gate, Piece, Sampling, Tokens

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 4096  # where the checkpoint does not say
MAX_BATCH = 64  # sessions in one forward


@dataclass
class _Step:
    """A session that waits for its next token."""

    session: TransformersSession
    gate: Gate | None
    future: asyncio.Future


class TransformersEngine:
    """One model; base or assistant.

    Args:
        model ([`~transformers.PreTrainedModel`]): a deferral model, or any causal language model as an assistant.
        name (`str`): for logs and metrics.
        max_length (`int`, *optional*): longest sequence; what the checkpoint's config says by default.
    """

    def __init__(self, model: Any, name: str, max_length: int | None = None):
        self.model = model.eval()
        self.name = name
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
        self.max_length = min(max_length or limit, limit)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.deferral = getattr(model.config, "deferral", None)
        self.reader = reader_for(model, 0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collm-engine")
        self._names = itertools.count()
        self._waiting: list[_Step] = []
        self._worker: asyncio.Task | None = None

    @classmethod
    def load(
        cls,
        model: str,
        name: str | None = None,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> TransformersEngine:
        """Load a checkpoint: with its deferral head where it has one."""
        from collm import CoLLMForCausalLM

        with_head = getattr(AutoConfig.from_pretrained(model), "deferral", None) is not None
        kind = CoLLMForCausalLM if with_head else AutoModelForCausalLM
        return cls(kind.from_pretrained(model, dtype=dtype).to(device), name or model, max_length)

    def open(self, prompt_ids: Sequence[int], sampling: Sampling) -> TransformersSession:
        return TransformersSession(self, list(prompt_ids), sampling)

    def row(self) -> int:
        """A name for one more sequence."""
        return next(self._names)

    async def healthy(self) -> bool:
        return True

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def drop(self, row: int) -> None:
        """Free what a session holds, between two forwards."""
        with contextlib.suppress(RuntimeError):  # closed: nothing is held any more
            self._thread.submit(self.reader.drop, row)

    async def step(self, session: TransformersSession, gate: Gate | None) -> Any:
        """What `session.choose` returns, after the next forward."""
        step = _Step(session, gate, asyncio.get_running_loop().create_future())
        self._waiting.append(step)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await step.future

    async def _work(self) -> None:
        """Run steps as long as somebody waits, as many of them together as wait by then."""
        batch: list[_Step] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                batch = [step for step in batch if not step.future.done()]  # nor cancelled
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)
                for step, result in zip(batch, results, strict=True):
                    if isinstance(result, Exception) and not step.future.done():
                        step.future.set_exception(result)
                    elif not step.future.done():
                        step.future.set_result(result)
        except BaseException as error:  # the engine was closed, or the event loop ends
            for step in [*batch, *self._waiting]:
                if not step.future.done():
                    step.future.set_exception(RuntimeError(f"stopped: {error}"))
            self._waiting = []
            if not isinstance(error, Exception):
                raise
        finally:
            self._worker = None

    def forward(self, rows: list[int], chunks: list[list[int]]) -> Reading:
        """Read a chunk of each row; see [`~collm.decoding.cache.Reader`]."""
        return self.reader.read(rows, chunks)

    @torch.inference_mode()
    def _run(self, batch: list[_Step]) -> list[Any]:
        """One forward over what the sessions have not read, and their choices; a session's failure is its result."""
        for step in batch:
            step.session.recover()
        unread = [step.session for step in batch if step.session.unread]
        try:
            if unread:
                reading = self.forward([s.row for s in unread], [s.unread for s in unread])
                logits, probs = reading.logits[:, -1].float().cpu(), None
                if reading.deferral_logits is not None:
                    probs = deferral_probabilities(reading.deferral_logits[:, -1]).cpu()
                for i, session in enumerate(unread):  # a view would keep the whole batch's logits
                    session.read(logits[i : i + 1].clone(), None if probs is None else probs[i : i + 1])
            return [step.session.choose(step.gate) for step in batch]
        except Exception as error:
            if len(batch) == 1:
                return [error]
        # Here and not in the handler, where the error would keep what the forward has allocated.
        return [result for step in batch for result in self._run([step])]  # whose failure is it?


class TransformersSession(Tokens):
    """One sequence and its cache."""

    def __init__(self, engine: TransformersEngine, prompt_ids: list[int], sampling: Sampling):
        self._engine = engine
        super().__init__(prompt_ids)
        self._computed = 0
        self._seen: tuple[Tensor, Tensor | None]
        self.row = engine.row()
        self._closed = False
        self._bias = {token: bias for token, bias in sampling.logit_bias.items() if token < engine.vocab_size}
        self._seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        self._greedy = sampling.temperature == 0
        self._warpers = _warpers(sampling)

    async def decode(
        self, max_tokens: int, stop_ids: frozenset[int] = frozenset(), gate: Gate | None = None, report: bool = False
    ) -> AsyncIterator[Piece]:
        for left in range(max_tokens, 0, -1):
            try:
                if self._closed:
                    raise AssistantError("the session is closed.")
                token, d, assistant, asked = await self._engine.step(self, gate)
            except AssistantError:
                raise
            except Exception as error:
                logger.exception("%s failed", self._engine.name)  # the answer says what, the log says where
                raise AssistantError(f"{self._engine.name} failed: {error}") from error
            probs = [d] if report else None
            if asked:
                yield Piece([], [] if report else None, "deferral", assistant, d if report else None)
                return
            self._tokens.append(token)
            full = left == 1 or len(self._tokens) >= self._engine.max_length
            finish = "stop" if token in stop_ids else "length" if full else None
            yield Piece([token], probs, finish, preferred=assistant)  # type: ignore[arg-type]
            if finish:
                return

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.drop(self.row)

    @property
    def unread(self) -> list[int]:
        return self._tokens[self._computed :]

    def read(self, logits: Tensor, probs: Tensor | None) -> None:
        """The next token's logits `(1, vocabulary)` and pi `(1, K + 1)`, both float32 on the CPU."""
        self._seen, self._computed = (logits, probs), len(self._tokens)

    def recover(self) -> None:
        """Begin again where a forward that failed, of this session or another, has left the reader elsewhere."""
        if self._engine.reader.length.get(self.row, 0) != self._computed:
            self._engine.reader.drop(self.row)
            self._computed = 0

    def choose(self, gate: Gate | None) -> tuple[int, float, int, bool]:
        """The next token, d_t, the preferred assistant, and whether the gate is open; in the engine's thread."""
        logits, probs = self._seen[0].clone(), self._seen[1]
        d = 1 - float(probs[0, 0]) if probs is not None else 0.0
        assistant = int(probs[0, 1:].argmax()) + 1 if probs is not None else 1
        if gate is not None and _score(gate.router, logits, d) > gate.cut:
            return -1, d, assistant, True
        return self._choose(logits), d, assistant, False

    def _choose(self, logits: Tensor) -> int:
        if self._bias:
            logits[:, list(self._bias)] += torch.tensor(list(self._bias.values()))
        logits = self._warpers(torch.tensor([self._tokens]), logits)
        if self._greedy:
            return int(logits.argmax())
        noise = gumbel([noise_key(self._seed, 0, len(self._tokens), TOKEN)], logits.shape[-1], logits.device)
        return int((logits.double() + noise).argmax())


def _score(router: str, logits: Tensor, d: float) -> float:
    if router == "learned":
        logit = float(torch.logit(torch.tensor(d, dtype=torch.float64)))
        return min(max(logit, -MAX_LOGIT), MAX_LOGIT)  # within the cuts of "always" and "never"
    uncertainty = uncertainty_features(logits)[0]
    return float(uncertainty[0] if router == "entropy" else 1 - uncertainty[2])


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    chosen = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chosen.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        chosen.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p > 0:
        chosen.append(MinPLogitsWarper(sampling.min_p))
    return chosen
