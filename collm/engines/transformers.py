"""A model of transformers in this process: needs nothing beside collm, and decodes one sequence at a time.

Each session owns a KV cache; a single thread runs the steps of all sessions in turn, so that the event loop stays free.
Where many requests come at once, use vLLM, which batches them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from collm.decoding.sampling import TOKEN, gumbel, noise_key
from collm.errors import AssistantError
from collm.losses import deferral_probabilities, uncertainty_features

from .session import Gate, Piece, Sampling

DEFAULT_MAX_LENGTH = 4096  # where the checkpoint does not say


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
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collm-engine")

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

    async def healthy(self) -> bool:
        return True

    async def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def forward(self, token_ids: list[int], cache: DynamicCache) -> tuple[Tensor, Tensor | None]:
        """Read tokens; the next token's logits `(1, vocabulary)` and pi `(1, K + 1)`, both float32 on the CPU."""
        inputs = torch.tensor([token_ids], device=self.model.device)
        out = self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        probs = deferral_probabilities(out.deferral_logits[:, -1]).cpu() if self.deferral is not None else None
        return out.logits[:, -1].float().cpu(), probs


class TransformersSession:
    """One sequence and its cache."""

    def __init__(self, engine: TransformersEngine, prompt_ids: list[int], sampling: Sampling):
        self._engine = engine
        self._tokens = prompt_ids
        self._computed = 0
        self._seen: tuple[Tensor, Tensor | None]
        self._cache: DynamicCache | None = DynamicCache(config=engine.model.config)
        self._bias = sampling.logit_bias
        self._seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        self._greedy = sampling.temperature == 0
        self._warpers = _warpers(sampling)

    def extend(self, token_ids: Sequence[int]) -> None:
        self._tokens.extend(token_ids)

    def retract(self) -> None:
        del self._tokens[-1]

    async def decode(
        self, max_tokens: int, stop_ids: frozenset[int] = frozenset(), gate: Gate | None = None, report: bool = False
    ) -> AsyncIterator[Piece]:
        for left in range(max_tokens, 0, -1):
            try:
                step = asyncio.get_running_loop().run_in_executor(self._engine.thread, self._step, gate)
                token, d, assistant, asked = await step
            except RuntimeError as error:
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
        self._cache = None

    def _step(self, gate: Gate | None) -> tuple[int, float, int, bool]:
        """The next token, d_t, the preferred assistant, and whether the gate is open; in the engine's thread."""
        if self._cache is None:
            raise AssistantError("the session is closed.")
        if self._computed < len(self._tokens):
            self._seen = self._engine.forward(self._tokens[self._computed :], self._cache)
            self._computed = len(self._tokens)
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
        return float(torch.logit(torch.tensor(d, dtype=torch.float64)))
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
