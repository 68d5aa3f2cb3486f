"""Sessions of vLLM's engines, beside what tests/vllm_plugin compares with the oracle."""

from __future__ import annotations

import asyncio

import pytest

from collm.engines.session import Sampling


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_seeded_answers_to_more_than_one_step_reads_are_reproducible(tmp_path):
    from collm.engines.vllm import VLLMEngine
    from tests.vllm_plugin.support import ENGINE, save_base

    folder, _ = save_base(tmp_path, "llama")
    prompts = [[3 + (7 * i + n) % 60 for i in range(500)] for n in range(20)]  # an engine reads 2048 or 4096 at once

    async def answer(engine, prompt):
        session = engine.open(prompt, Sampling(temperature=0.9, seed=1))
        try:
            return [token async for piece in session.decode(8) for token in piece.token_ids]
        finally:
            await session.close()

    async def run():
        engine = VLLMEngine(folder, **ENGINE)
        try:
            return [await asyncio.gather(*[answer(engine, prompt) for prompt in prompts]) for _ in range(2)]
        finally:
            await engine.close()

    first, second = asyncio.run(run())
    assert first == second
    assert all(len(tokens) == 8 for tokens in first)
