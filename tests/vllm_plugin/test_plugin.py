"""Deferral checkpoints in vLLM: alone they are the base, in sessions they are the oracle; K = 1 and 2."""

from __future__ import annotations

import asyncio
import math
import random

import pytest
import torch

from collm.errors import AssistantError
from collm.vllm_plugin import gates
from tests.engines.oracle import oracle

CASES = [("llama", 1), ("qwen2", 2), ("gemma2", 1), ("mixtral", 2)]


def logits_with_room(vocab_size=16, rows=64, num_assistants=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(rows, vocab_size, generator=generator) * 4
    z = torch.randn(rows, num_assistants, generator=generator) * 3
    room = torch.zeros(rows, gates.num_reserved(num_assistants))
    from collm.losses import uncertainty_features

    return real, z, gates.write_gates(torch.cat([real, room], -1), z, uncertainty_features(real), vocab_size)


def test_without_a_request_no_gate_has_any_probability_and_no_logit_changes():
    real, _, gated = logits_with_room()
    assert torch.equal(gated[:, :16], real)
    for temperature in (1.0, 100.0):
        assert (gated / temperature).softmax(-1)[:, 16:].max() == 0
    assert torch.allclose(gated.log_softmax(-1)[:, :16], real.log_softmax(-1))


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_gate_opens_exactly_where_the_probability_exceeds_the_threshold(threshold):
    from collm.engines.session import cut_of_threshold
    from collm.losses import deferral_probabilities

    _, z, gated = logits_with_room()
    ids = gates.reserved_ids(16, 2)
    gated[:, ids] += gates.gate_bias(cut_of_threshold(threshold))
    defer = 1 - deferral_probabilities(z)[:, 0] > threshold
    best = gated.argmax(-1)
    assert torch.equal(best >= 16, defer)
    assert torch.equal((best - 16)[defer], z.argmax(-1)[defer])


def test_the_score_survives_the_round_trip_through_log_probabilities():
    _, z, gated = logits_with_room()
    logprobs = gated.log_softmax(-1)
    ids = gates.reserved_ids(16, 2)
    for row in range(len(z)):
        score = max(gates.score_of_logprob(float(logprobs[row, i])) for i in ids)
        assert score == pytest.approx(float(z[row].logsumexp(-1)), abs=2e-4)


def test_an_unknown_router_names_those_that_exist():
    with pytest.raises(ValueError, match="entropy"):
        gates.reserved_ids(16, 2, "entropie")


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own
@pytest.mark.parametrize(("architecture", "num_assistants"), CASES)
def test_64_concurrent_requests_with_mixed_thresholds_and_lengths_are_the_oracle(
    tmp_path, architecture, num_assistants
):
    """And the plain base in the same engine is the base's own greedy text, no reserved id in its log-probabilities."""
    from collm.engines.collaboration import Request, collaborate
    from collm.engines.session import Sampling
    from collm.engines.vllm import VLLMEngine
    from tests.vllm_plugin.support import ENGINE, save_assistant, save_base

    folder, base = save_base(tmp_path / "base", architecture, num_assistants, head_only=architecture == "llama")
    saved = [save_assistant(tmp_path / f"a{k}", architecture, k) for k in range(1, num_assistants + 1)]
    helpers = [model for _, model in saved]
    rng = random.Random(0)
    requests = [
        Request(
            [rng.randrange(3, 64) for _ in range(rng.randint(3, 60))],
            rng.randint(8, 40),
            rng.choice([-1.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]),
            router=rng.choice([None, None, None, "entropy:cut=1.5", "random:rate=0.3"]),
            sampling=Sampling(seed=0),  # for the random router: greedy otherwise
            report=rng.random() < 0.5,
        )
        for _ in range(64)
    ]

    async def run():
        engine = VLLMEngine(folder, **ENGINE)
        assistants = [VLLMEngine(path, **ENGINE) for path, _ in saved]

        async def answer(request):
            prefetch = request.max_tokens % 2 == 0
            written = [w async for w in collaborate(request, engine, assistants, prefetch=lambda k: prefetch)]
            return (
                [t for w in written for t in w.token_ids],
                [s for w in written for s in w.source],
                [d for w in written for d in w.deferral_probs],
            )

        try:
            answers = await asyncio.gather(*[answer(r) for r in requests])
            alone = await plain_base(engine, requests[0].prompt_ids)
            assert all(e.engine.output_processor.get_num_unfinished_requests() == 0 for e in [engine, *assistants])
            sampled = [
                await answer(Request(requests[0].prompt_ids, 24, 0.5, sampling=Sampling(temperature=0.8, seed=s)))
                for s in (1, 1, 2)
            ]
            fallback = [
                w
                async for w in collaborate(
                    Request(requests[0].prompt_ids, 24, 0.4, on_assistant_error="fallback"), engine, [Unplugged()] * 2
                )
            ]
        finally:
            for e in [engine, *assistants]:
                await e.close()
        return answers, alone, sampled, fallback

    answers, alone, sampled, fallback = asyncio.run(run())
    kinds = set()
    for request, (tokens, source, probs) in zip(requests, answers, strict=True):
        expected = oracle(base, helpers, request.prompt_ids, request.max_tokens, request.threshold, request.router)
        assert tokens == expected.tokens
        assert source == expected.source
        if request.report:
            assert probs == pytest.approx(expected.deferral_probs, abs=2e-4)
        kinds |= set(source)
    assert kinds == set(range(num_assistants + 1))

    tokens, logprobs = alone
    assert tokens == oracle(base, helpers, requests[0].prompt_ids, 12, 1.0).tokens
    with torch.no_grad():
        own = base(torch.tensor([requests[0].prompt_ids])).logits[0, -1].log_softmax(-1)
    assert {i: e.logprob for i, e in logprobs[0].items()} == pytest.approx(
        {i: float(own[i]) for i in logprobs[0]}, abs=1e-4
    )
    # An assistant that fails: the base decodes the position once more, and goes on alone.
    assert [t for w in fallback for t in w.token_ids] == oracle(base, [], requests[0].prompt_ids, 24, 1.0).tokens
    assert sum(w.fallback for w in fallback) == 1
    assert sampled[0] == sampled[1] != sampled[2]
    assert all(0 <= t < 64 for s in sampled for t in s[0])


class Unplugged:
    """An assistant that is gone."""

    name = "unplugged"

    def open(self, prompt_ids, sampling):
        raise AssistantError("connection lost")


async def plain_base(engine, prompt_ids):
    """What `vllm serve CHECKPOINT` would answer."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=20)
    outputs = [o async for o in engine.engine.generate(TokensPrompt(prompt_token_ids=prompt_ids), params, "plain")]
    (completion,) = outputs[-1].outputs
    assert all(math.isfinite(e.logprob) and i < 64 for entry in completion.logprobs for i, e in entry.items())
    return list(completion.token_ids), completion.logprobs
