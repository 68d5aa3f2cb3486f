"""An assistant behind an OpenAI-compatible server: our own, on loopback."""

from __future__ import annotations

import asyncio

import pytest

from collm.engines.collaboration import Request, collaborate
from collm.engines.http import HTTPEngine
from collm.engines.session import Sampling
from collm.engines.transformers import TransformersEngine
from collm.errors import AssistantError, AssistantRefusal
from tests.conftest import VOCAB_SIZE, tiny_collm, tiny_tokenizer
from tests.engines.oracle import oracle
from tests.serving.running import running


def remote_assistant():
    """A server whose model, at threshold 1, is a plain language model."""
    return running(threshold=1.0, app={"api_keys": ["key"]})


async def collect(base, helper, **kwargs):
    request = Request([5, 9, 23], 16, 0.5, **kwargs)
    try:
        written = [w async for w in collaborate(request, TransformersEngine(base, "base"), [helper])]
    finally:
        await helper.close()
    return [t for w in written for t in w.token_ids], [s for w in written for s in w.source]


@pytest.mark.parametrize("token_ids", [True, False])
def test_the_answer_is_the_oracle_with_token_ids_and_with_text(token_ids):
    with remote_assistant() as server:
        base = tiny_collm(seed=5)
        helper = HTTPEngine(server.url, tiny_tokenizer(), api_key="key", token_ids=token_ids)
        if not token_ids:  # this tokenizer's text has no spaces, so prompts do not survive the round trip as text
            helper.tokenizer.decode = lambda ids: " ".join(helper.tokenizer.convert_ids_to_tokens(ids))
        answer = asyncio.run(collect(base, helper))
        truth = oracle(base, [server.base], [5, 9, 23], 16, 0.5)
        assert answer == (truth.tokens, truth.source)
        assert sum(truth.source) > 2


def byte_tokenizer():
    """A token for each byte, and <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, **{b: i for i, b in enumerate(bytes_, 1)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_text_has_no_beginning_of_its_own_and_no_half_characters():
    helper, prompts, text = HTTPEngine("http://nowhere", byte_tokenizer(), token_ids=False), [], "!"

    async def complete(body):
        prompts.append(body["prompt"])
        return {"text": text}

    async def write(prompt):
        return [piece.token_ids async for piece in helper.open(prompt, Sampling()).decode(1)]

    helper.complete = complete
    whole = helper.tokenizer.encode("é?")  # <s>, two bytes of the letter, the question mark
    assert asyncio.run(write(whole)) == [helper.tokenizer.encode("!", add_special_tokens=False)]
    text = "\ufffd"
    helper.tokenizer.add_tokens([text])
    with pytest.raises(AssistantRefusal, match="part of a character"):
        asyncio.run(write(whole))
    with pytest.raises(AssistantRefusal, match="ends within a character"):
        asyncio.run(write(whole[:2]))
    assert prompts == ["é?", "é?"]


@pytest.mark.parametrize("answered", [VOCAB_SIZE, -1, True])
def test_an_answer_that_is_no_token_id_is_an_assistant_error(answered):
    helper, base = HTTPEngine("http://nowhere", tiny_tokenizer()), tiny_collm(seed=5)

    async def complete(body):
        return {"token_ids": [answered]}

    helper.complete = complete
    with pytest.raises(AssistantError, match=f"token.id.*{answered}"):
        asyncio.run(collect(base, helper))
    tokens, source = asyncio.run(collect(base, helper, on_assistant_error="fallback"))
    assert (tokens, source) == (oracle(base, [], [5, 9, 23], 16, 1.0).tokens, [0] * 16)


def test_sampling_travels_with_its_seed():
    with remote_assistant() as server:
        base = tiny_collm(seed=5)

        def answer(seed):
            helper = HTTPEngine(server.url, tiny_tokenizer(), api_key="key")
            return asyncio.run(collect(base, helper, sampling=Sampling(temperature=1.0, seed=seed)))

        assert answer(1) == answer(1) != answer(2)


def test_a_refusal_and_a_dead_server_are_assistant_errors():
    with remote_assistant() as server:
        with pytest.raises(AssistantError, match="401"):
            asyncio.run(collect(tiny_collm(seed=5), HTTPEngine(server.url, tiny_tokenizer(), api_key="wrong")))
    with pytest.raises(AssistantError, match="ConnectError"):
        asyncio.run(collect(tiny_collm(seed=5), HTTPEngine(server.url, tiny_tokenizer(), retries=1)))


def test_connections_are_reused_and_lost_answers_are_asked_for_again():
    import httpx

    with remote_assistant() as server:
        helper = HTTPEngine(server.url, tiny_tokenizer(), api_key="key")
        calls = []

        class Flaky(httpx.AsyncBaseTransport):
            def __init__(self):
                self.real = httpx.AsyncHTTPTransport()

            async def handle_async_request(self, request):
                calls.append(request.url.path)
                if len(calls) % 3 == 0:
                    raise httpx.ReadError("lost")
                return await self.real.handle_async_request(request)

            async def aclose(self):
                await self.real.aclose()

        helper.client = httpx.AsyncClient(headers=helper.client.headers, transport=Flaky())
        base = tiny_collm(seed=5)
        truth = oracle(base, [server.base], [5, 9, 23], 16, 0.5)
        assert asyncio.run(collect(base, helper)) == (truth.tokens, truth.source)
        assert len(calls) > sum(truth.source) + 1
