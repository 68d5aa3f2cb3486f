"""vLLM in this process' care: each session is one resumable request of an `AsyncLLM`.

`AsyncLLM.generate` takes an async generator of `StreamingInput`. Between two chunks the engine keeps the KV cache of
every computed token and forgets the last sampled one. That is a hand-off: a base stops on a reserved id (forgotten),
the next chunk is the assistant's token, and the base goes on. Where a session stopped on a real token, that one was not
computed either, so it is pushed with the next chunk.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.inputs import TokensPrompt
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from collm.checkpoints import link_full_checkpoint
from collm.configuration import DeferralConfig
from collm.errors import AssistantError
from collm.vllm_plugin.gates import gate_bias, reserved_ids, score_of_logprob

from .session import Finish, Gate, Piece, Sampling, Tokens, sigmoid

# Scheduled ahead, a step would be computed behind every hand-off and thrown away.
DEFAULTS = {"async_scheduling": False}

_FINISH: dict[str | None, Finish | None] = {None: None, "stop": "stop", "length": "length"}


class VLLMEngine:
    """One model in one vLLM engine; base or assistant.

    Args:
        model (`str`): checkpoint folder or Hub id; of a head-only checkpoint, its base is read with it.
        name (`str`, *optional*): for logs and metrics; the model by default.
        engine_args: fields of vLLM's `AsyncEngineArgs` (`tensor_parallel_size`, `gpu_memory_utilization`, ...).
    """

    def __init__(self, model: str, name: str | None = None, **engine_args: Any):
        self.name = name or model
        self._links = tempfile.TemporaryDirectory(prefix="collm-")
        model = self._links.name if link_full_checkpoint(model, self._links.name) else model
        defaults = DEFAULTS
        if current_platform.is_cpu() and "max_num_batched_tokens" not in engine_args:
            # vLLM 0.32 winds a seeded request's generator back after each part of a prompt; those of CPUs cannot be,
            # and the engine dies: there, prompts are read whole.
            defaults = {**DEFAULTS, "enable_chunked_prefill": False}
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **{**defaults, **engine_args}))
        model_config = self.engine.model_config
        self.max_length = model_config.max_model_len
        deferral = getattr(model_config.hf_config, "deferral", None)
        self.deferral = DeferralConfig.from_any(deferral) if deferral is not None else None
        self.vocab_size = getattr(model_config.hf_text_config, "real_vocab_size", model_config.get_vocab_size())
        self._ids = itertools.count()

    def open(self, prompt_ids: Sequence[int], sampling: Sampling) -> VLLMSession:
        return VLLMSession(self, list(prompt_ids), sampling)

    def request_id(self) -> str:
        return f"{self.name}-{next(self._ids)}"

    async def healthy(self) -> bool:
        return not self.engine.errored

    async def close(self) -> None:
        if hasattr(self, "engine"):  # the first time
            self.engine.shutdown()
            del self.engine  # its destructor would fail if it ran when the interpreter ends
            self._links.cleanup()

    def gate_ids(self, router: str) -> list[int]:
        assert self.deferral is not None
        return reserved_ids(self.vocab_size, self.deferral.num_assistants, router)


class VLLMSession(Tokens):
    """One resumable request."""

    def __init__(self, engine: VLLMEngine, prompt_ids: list[int], sampling: Sampling):
        self._engine = engine
        self._sampling = sampling
        super().__init__(prompt_ids)
        self._computed = 0  # tokens that the engine has read; its KV cache holds them
        self._chunks: asyncio.Queue[StreamingInput] = asyncio.Queue()
        self._outputs: AsyncGenerator | None = None

    async def decode(
        self, max_tokens: int, stop_ids: frozenset[int] = frozenset(), gate: Gate | None = None, report: bool = False
    ) -> AsyncIterator[Piece]:
        gate_ids = self._engine.gate_ids(gate.router) if gate else []
        head_ids = self._engine.gate_ids("learned") if report else []
        params = self._sampling_params(max_tokens, stop_ids, gate, gate_ids, head_ids)
        if self._computed == len(self._tokens):
            # A position is to be decoded again, because an assistant failed there: an engine has no other way to do
            # that than to start anew. Its prefix cache, where there is one, spares most of it.
            await self.close()
        chunk = StreamingInput(TokensPrompt(prompt_token_ids=self._tokens[self._computed :]), params)
        self._computed = len(self._tokens)
        self._chunks.put_nowait(chunk)
        if self._outputs is None:
            self._outputs = self._engine.engine.generate(self._stream(), params, self._engine.request_id())
        finish = None
        while finish is None:
            output = await self._next_output()
            tokens, finish = list(output.token_ids), output.finish_reason
            if finish not in _FINISH:  # "abort", "error"
                raise AssistantError(f"{self._engine.name} gave a session up: {finish}.")
            scores = [self._score(entry, head_ids) for entry in output.logprobs] if report else None
            probs = [d for d, _ in scores] if scores is not None else None
            if finish is not None and tokens[-1] in gate_ids:
                self._tokens += tokens[:-1]
                self._computed = len(self._tokens)
                yield Piece(
                    tokens[:-1],
                    probs and probs[:-1],
                    "deferral",
                    assistant=gate_ids.index(tokens[-1]) + 1,
                    deferral_prob=probs[-1] if probs else None,
                )
                return
            self._tokens += tokens
            self._computed = len(self._tokens) - 1  # the last one is read with what follows
            yield Piece(tokens, probs, _FINISH[finish], preferred=scores[-1][1] if scores else 1)

    async def _next_output(self) -> CompletionOutput:
        assert self._outputs is not None
        try:
            return (await anext(self._outputs)).outputs[0]
        except StopAsyncIteration:
            raise AssistantError(f"{self._engine.name} ended a session that was not closed.") from None
        except Exception as error:
            raise AssistantError(f"{self._engine.name} failed: {error}") from error

    async def close(self) -> None:
        if self._outputs is not None:
            outputs, self._outputs = self._outputs, None
            self._computed = 0
            await outputs.aclose()  # aborts the request: its KV blocks are free

    async def _stream(self) -> AsyncGenerator[StreamingInput, None]:
        while True:
            yield await self._chunks.get()

    def _sampling_params(
        self, max_tokens: int, stop_ids: frozenset[int], gate: Gate | None, gate_ids: list[int], head_ids: list[int]
    ) -> SamplingParams:
        s = self._sampling
        bias = {token: value for token, value in s.logit_bias.items() if token < self._engine.vocab_size}
        if gate:
            bias |= dict.fromkeys(gate_ids, gate_bias(gate.cut))
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed_at(len(self._tokens)),
            repetition_penalty=s.repetition_penalty,
            logit_bias=bias or None,
            stop_token_ids=[*stop_ids, *gate_ids],
            ignore_eos=True,  # which tokens end an answer is the caller's `stop_ids`
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            logprob_token_ids=head_ids or None,
            skip_clone=True,
        )

    @staticmethod
    def _score(entry: dict[int, Any], head_ids: list[int]) -> tuple[float, int]:
        """d_t and the preferred assistant: only its column is a score, the others are far below."""
        scores = [score_of_logprob(entry[i].logprob) for i in head_ids]
        best = max(range(len(scores)), key=scores.__getitem__)
        return sigmoid(scores[best]), best + 1
