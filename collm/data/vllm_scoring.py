"""Scoring by vLLM, for assistants that are too big or too slow for one device under transformers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from collm.errors import AssistantError


class VLLMScorer:
    """A [`~data.scoring.Scorer`] over vLLM's prompt log-probabilities.

    Log-probabilities are vLLM's raw ones (float32, over the assistant's whole vocabulary); a target is correct where
    its rank is 1. vLLM wants room for one generated token, which is thrown away.

    Args:
        name (`str`): Hub name or local folder.
        engine_args: fields of vLLM's `EngineArgs` (`dtype`, `tensor_parallel_size`, `gpu_memory_utilization`, ...).

    Raises:
        [`AssistantError`]: vLLM is not installed, or cannot load the assistant.
    """

    def __init__(self, name: str, **engine_args: Any) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise AssistantError(
                f'engine="vllm" needs vLLM ({error}): pip install "collm[vllm]" on a GPU machine, or leave engine out.'
            ) from error
        logging.getLogger("vllm").setLevel(logging.WARNING)
        try:
            self.engine = LLM(name, skip_tokenizer_init=True, max_logprobs=1, **engine_args)
        except (OSError, ValueError, RuntimeError) as error:
            raise AssistantError(f'vLLM cannot load the assistant "{name}": {error}') from error
        self.sampling = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0, detokenize=False)

    def __call__(self, input_ids: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, Tensor]:
        prompts = [{"prompt_token_ids": row} for row in input_ids]
        answers = self.engine.generate(prompts, self.sampling, use_tqdm=False)
        said = [
            answer.prompt_logprobs[t][label]
            for answer, row in zip(answers, labels, strict=True)
            for t, label in enumerate(row)
            if t > 0 and label != -100
        ]
        return (
            torch.tensor([token.logprob for token in said], dtype=torch.float32),
            torch.tensor([token.rank == 1 for token in said], dtype=torch.bool),
        )
