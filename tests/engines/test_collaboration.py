"""One request over transformers engines: the same tokens as a decode without caches, whoever writes."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collm.decoding.cache import _Layer
from collm.engines.collaboration import Request, collaborate
from collm.engines.session import Gate, Sampling
from collm.engines.transformers import TransformersEngine, TransformersSession
from collm.errors import AssistantError, ConfigurationError
from tests.conftest import VOCAB_SIZE, tiny_collm, tiny_model
from tests.decoding.test_cache import STATEFUL
from tests.engines.oracle import oracle

PROMPT = [5, 9, 23, 41, 17]


async def collect(request, base, assistants, **kwargs):
    written = [piece async for piece in collaborate(request, base, assistants, **kwargs)]
    return (
        [t for w in written for t in w.token_ids],
        [s for w in written for s in w.source],
        [d for w in written for d in w.deferral_probs],
        written,
    )


def engines(num_assistants=1, architecture="llama"):
    base = tiny_collm(architecture, num_assistants=num_assistants)
    helpers = [tiny_model(architecture, seed=k) for k in range(1, num_assistants + 1)]
    return base, helpers, TransformersEngine(base, "base"), [TransformersEngine(h, "a") for h in helpers]


def held(*some) -> list[int]:
    """Sequences that engines still hold; sessions are freed in the engine's thread, in turn."""
    return [row for engine in some for row in engine._thread.submit(lambda e=engine: list(e.reader.length)).result()]


@pytest.mark.parametrize("num_assistants", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_greedy_collaboration_is_the_oracle_token_for_token(architecture, num_assistants):
    base, helpers, base_engine, helper_engines = engines(num_assistants, architecture)
    for threshold in (-1.0, 0.3, 0.5, 0.7, 1.0):
        request = Request(PROMPT, 20, threshold, report=True)
        tokens, source, probs, written = asyncio.run(collect(request, base_engine, helper_engines))
        expected = oracle(base, helpers, PROMPT, 20, threshold)
        assert (tokens, source) == (expected.tokens, expected.source)
        assert probs == pytest.approx(expected.deferral_probs, abs=1e-4)
        assert written[-1].finish == "length"
    assert {0, *range(1, num_assistants + 1)} >= set(source)


def test_every_model_reads_every_token_once():
    _, _, base_engine, (helper_engine,) = engines()
    _, source, _, _ = asyncio.run(collect(Request(PROMPT, 20, 0.5), base_engine, [helper_engine]))
    assert 0 < sum(source) < 20
    last_ask = max(i for i, s in enumerate(source) if s)
    assert base_engine.reader.tokens == len(PROMPT) + 19  # nobody reads the last token
    assert helper_engine.reader.tokens == len(PROMPT) + last_ask


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_requests_that_come_together_share_forwards_and_stay_the_oracle(architecture):
    base, helpers, base_engine, helper_engines = engines(1, architecture)
    requests = [Request(PROMPT[: 1 + i % 5], 6 + i, t) for i, t in enumerate((-1.0, 0.3, 0.5, 0.5, 0.7, 1.0, 0.5, 0.4))]

    async def together():
        return await asyncio.gather(*(collect(r, base_engine, helper_engines) for r in requests))

    tokens = 0
    for request, (text, source, _, _) in zip(requests, asyncio.run(together()), strict=True):
        expected = oracle(base, helpers, list(request.prompt_ids), request.max_tokens, request.threshold)
        assert (text, source) == (expected.tokens, expected.source)
        tokens += len(text)
    assert base_engine.reader.calls < tokens / 2
    assert not held(base_engine, *helper_engines)  # every session gave back its place


def test_a_request_that_fails_takes_no_other_with_it(caplog):
    _, _, base_engine, helper_engines = engines()
    forward = base_engine.forward

    def faulty(rows, chunks):
        if any(61 in chunk for chunk in chunks):
            raise RuntimeError("out of memory")
        return forward(rows, chunks)

    base_engine.forward = faulty
    good, bad = Request(PROMPT, 8, 1.0), Request([61, *PROMPT], 8, 1.0)

    async def together():
        asked = [collect(r, base_engine, helper_engines) for r in (good, bad, good)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, failed, second = asyncio.run(together())
    assert first[0] == second[0]
    assert len(first[0]) == 8
    assert isinstance(failed, AssistantError)
    assert "out of memory" in str(failed)
    [logged] = caplog.records
    assert "RuntimeError: out of memory" in (logged.exc_text or "")  # the log has the traceback


def test_a_session_keeps_its_own_logits_alone():
    engine = TransformersEngine(tiny_model(), "a")

    async def together():
        sessions = [engine.open(PROMPT, Sampling()) for _ in range(4)]
        await asyncio.gather(*(decoded(session, 2) for session in sessions))
        return [session._seen[0].untyped_storage().nbytes() for session in sessions]

    assert asyncio.run(together()) == [VOCAB_SIZE * 4] * 4
    assert engine.reader.calls == 2


async def decoded(session, count) -> list[int]:
    return [token async for piece in session.decode(count) for token in piece.token_ids]


def failing_once(function, at):
    """`function`, which raises at its `at`-th call."""
    calls = itertools.count(1)

    def called(*args):
        if next(calls) == at:
            raise torch.OutOfMemoryError("no memory left")
        return function(*args)

    return called


@pytest.mark.filterwarnings("ignore")  # mamba warns about kernels that are not installed
@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize(
    ("architecture", "what"), [("llama", "layer"), ("mamba", "layer"), ("llama", "logits"), ("llama", "buffer")]
)
def test_a_failure_amid_a_batch_changes_no_answer(architecture, what, at, monkeypatch):
    if architecture == "mamba":
        config = AutoConfig.for_model("mamba", vocab_size=VOCAB_SIZE, **STATEFUL["mamba"])
        model = AutoModelForCausalLM.from_config(config).eval()
        for matrix in (p for p in model.parameters() if p.dim() > 1):  # else it repeats one token whatever it has read
            torch.nn.init.normal_(matrix, std=0.5)
        last_layer = model.backbone.layers[-1]
    else:
        model = tiny_model()
        last_layer = model.model.layers[-1]
    engine = TransformersEngine(model, "a")
    long = [3 + i % 50 for i in range(100)]

    def greedy(prompt, count):
        text = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        return text[len(prompt) :]

    first = greedy(PROMPT, 3)
    expected = [first, greedy([*PROMPT, *first, 7, 8, 9], 4), greedy(long, 4), greedy(PROMPT[1:], 4)]

    async def write():
        one, two, three = (engine.open(prompt, Sampling()) for prompt in (PROMPT, long, PROMPT[1:]))
        texts = [await decoded(one, 3)]
        one.extend([7, 8, 9])
        if what == "layer":
            last_layer.register_forward_pre_hook(failing_once(lambda *_: None, at))
        elif what == "logits":
            monkeypatch.setattr(TransformersSession, "read", failing_once(TransformersSession.read, at))
        else:
            monkeypatch.setattr(_Layer, "reserve", failing_once(_Layer.reserve, at))
        return texts + await asyncio.gather(*(decoded(session, 4) for session in (one, two, three)))

    assert asyncio.run(write()) == expected


def test_biases_beyond_the_vocabulary_are_left_out():
    engine = TransformersEngine(tiny_model(), "a")
    sampling = Sampling(logit_bias={7: 1000.0, 10**6: 1000.0})
    assert asyncio.run(decoded(engine.open(PROMPT, sampling), 2)) == [7, 7]


@pytest.mark.parametrize(
    "router",
    [
        "entropy:cut=2.0",
        "top_probability:cut=0.5",
        "random:rate=0.4",
        "sampled",
        "always",
        "never",
        "ema",
        "scheduled:steps=8",
    ],
)
def test_other_routers_are_the_oracle(router):
    base, helpers, base_engine, helper_engines = engines()
    request = Request(PROMPT, 20, 0.5, router=router, sampling=Sampling(seed=0))
    tokens, source, _, _ = asyncio.run(collect(request, base_engine, helper_engines))
    expected = oracle(base, helpers, PROMPT, 20, 0.5, router=router)
    assert (tokens, source) == (expected.tokens, expected.source)


@pytest.mark.parametrize(
    ("num_assistants", "router", "message"),
    [(1, "margin:cut=0.1", "top_probability"), (2, "sampled", "the base and 2 assistants")],
)
def test_a_router_that_needs_more_than_engines_tell_is_refused(num_assistants, router, message):
    _, _, base_engine, helper_engines = engines(num_assistants)
    with pytest.raises(ConfigurationError, match=message):
        asyncio.run(collect(Request(PROMPT, 4, router=router), base_engine, helper_engines))


def test_a_stop_token_ends_the_answer_whoever_writes_it():
    _, _, base_engine, helper_engines = engines()
    free, source, _, _ = asyncio.run(collect(Request(PROMPT, 20, 0.5), base_engine, helper_engines))
    for writer in (0, 1):
        step = source.index(writer)
        stop = free[step]
        tokens, _, _, written = asyncio.run(
            collect(Request(PROMPT, 20, 0.5, stop_ids=frozenset([stop])), base_engine, helper_engines)
        )
        assert tokens == free[: free.index(stop) + 1]
        assert written[-1].finish == "stop"


def test_sampling_with_a_seed_is_reproducible_and_another_seed_differs():
    _, _, base_engine, helper_engines = engines()

    def answer(seed):
        request = Request(PROMPT, 24, 0.5, sampling=Sampling(temperature=1.0, seed=seed))
        return asyncio.run(collect(request, base_engine, helper_engines))[0]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_a_prompt_of_its_own_for_the_assistant():
    base, helpers, base_engine, helper_engines = engines()
    own = [3, 4, 5]
    request = Request(PROMPT, 16, 0.5, assistant_prompts=[own])
    tokens, source, _, _ = asyncio.run(collect(request, base_engine, helper_engines))
    expected = oracle(base, helpers, PROMPT, 16, 0.5, assistant_prompts=[own])
    assert (tokens, source) == (expected.tokens, expected.source)


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.7, 1.0])
def test_prefetched_prompts_change_no_token_and_are_read_once(threshold):
    base, helpers, base_engine, helper_engines = engines(num_assistants=2)
    request = Request(PROMPT, 20, threshold)
    tokens, source, _, _ = asyncio.run(collect(request, base_engine, helper_engines, prefetch=lambda k: k == 1))
    expected = oracle(base, helpers, PROMPT, 20, threshold)
    assert (tokens, source) == (expected.tokens, expected.source)
    for k, engine in enumerate(helper_engines, start=1):
        asked = [i for i, writer in enumerate(source) if writer == k]
        wanted = k == 1 and threshold < 1
        assert engine.reader.tokens == (len(PROMPT) + asked[-1] if asked else len(PROMPT) if wanted else 0)
    assert not held(base_engine, *helper_engines)


def test_an_assistant_reads_a_prefetched_prompt_while_the_base_reads_it():
    _, helpers, base_engine, _ = engines()
    started, read = threading.Event(), threading.Event()

    class Watched(TransformersEngine):
        def forward(self, rows, chunks):
            started.set()
            read.wait(timeout=30)
            return super().forward(rows, chunks)

    forward = base_engine.forward

    def base_forward(rows, chunks):
        assert started.wait(timeout=30)  # without a prefetch the assistant would begin behind this
        read.set()
        return forward(rows, chunks)

    base_engine.forward = base_forward
    request = Request(PROMPT, 4, -1.0)
    helper_engines = [Watched(helpers[0], "a")]
    _, source, _, _ = asyncio.run(collect(request, base_engine, helper_engines, prefetch=lambda k: True))
    assert source == [1, 1, 1, 1]


def test_a_prefetch_that_fails_is_the_failure_of_the_first_deferral_only():
    _, helpers, base_engine, _ = engines()

    class Dead(Unplugged):
        alive = 0

    def answer(threshold, policy):
        request = Request(PROMPT, 8, threshold, on_assistant_error=policy)
        return asyncio.run(collect(request, base_engine, [Dead(helpers[0], "a")], prefetch=lambda k: True))

    with pytest.raises(AssistantError, match="connection lost"):
        answer(-1.0, "error")
    _, source, _, written = answer(-1.0, "fallback")
    assert source == [0] * 8
    assert any(w.fallback for w in written)
    assert answer(0.9999, "error")[1] == [0] * 8  # never asked
    assert not held(base_engine)


class Unplugged(TransformersEngine):
    """An assistant whose process dies after `alive` tokens."""

    alive = 3
    error: type[Exception] = RuntimeError

    def forward(self, rows, chunks):
        self.alive -= 1
        if self.alive < 0:
            raise self.error("connection lost")
        return super().forward(rows, chunks)


@pytest.mark.parametrize("error", [RuntimeError, IndexError])
def test_error_policy_raises_and_fallback_policy_goes_on_with_the_base(error, monkeypatch):
    monkeypatch.setattr(Unplugged, "error", error)
    base, helpers, base_engine, _ = engines()
    with pytest.raises(AssistantError, match="connection lost"):
        asyncio.run(collect(Request(PROMPT, 20, 0.5), base_engine, [Unplugged(helpers[0], "a")]))

    request = Request(PROMPT, 20, 0.5, on_assistant_error="fallback")
    tokens, source, _, written = asyncio.run(collect(request, base_engine, [Unplugged(helpers[0], "a")]))
    assert len(tokens) == 20
    assert sum(source) == 3
    at = next(i for i, w in enumerate(written) if w.fallback)
    before = [t for w in written[:at] for t in w.token_ids]
    expected = oracle(base, helpers, [*PROMPT, *before], 20 - len(before), 1.0)
    assert tokens[len(before) :] == expected.tokens


def test_a_token_that_the_base_does_not_know_is_a_failure_of_the_assistant():
    base, _, base_engine, _ = engines()
    wide = TransformersEngine(tiny_model(seed=1, vocab_size=VOCAB_SIZE + 8), "wide")
    request = Request(PROMPT, 8, -1.0, sampling=Sampling(logit_bias={VOCAB_SIZE: 1000.0}))
    heard = []
    with pytest.raises(AssistantError, match="token id 64; the base knows 0 to 63"):
        asyncio.run(collect(request, base_engine, [wide], observe=heard.append))
    request.on_assistant_error = "fallback"
    tokens, source, _, _ = asyncio.run(collect(request, base_engine, [wide], observe=heard.append))
    assert (tokens, source) == (oracle(base, [], PROMPT, 8, 1.0).tokens, [0] * 8)
    assert [(asked.asked, type(asked.error)) for asked in heard] == [(True, AssistantError)] * 2


def test_an_assistant_that_does_not_answer_in_time_is_given_up():
    _, helpers, base_engine, _ = engines()

    class Slow(TransformersEngine):
        def forward(self, rows, chunks):
            import time

            time.sleep(0.5)
            return super().forward(rows, chunks)

    with pytest.raises(AssistantError, match=r"within 0\.05 seconds"):
        asyncio.run(collect(Request(PROMPT, 20, 0.5), base_engine, [Slow(helpers[0], "a")], assistant_timeout=0.05))


def test_a_reader_that_leaves_frees_every_session():
    _, _, base_engine, helper_engines = engines()
    opened = []
    for engine in (base_engine, *helper_engines):

        def remembered(*args, open=engine.open):
            opened.append(open(*args))
            return opened[-1]

        engine.open = remembered

    async def leave():
        stream = collaborate(Request(PROMPT, 50, 0.5), base_engine, helper_engines)
        async for written in stream:
            if written.source == [1]:
                break
        await stream.aclose()

    asyncio.run(leave())
    assert len(opened) == 2
    assert not held(base_engine, *helper_engines)


def test_the_gate_of_the_transformers_session_is_strict_at_its_cut():
    """d_t > eta, not >=: at exactly its own score a position is not deferred."""
    base = tiny_collm()
    engine = TransformersEngine(base, "base")

    async def first(gate):
        session = engine.open(PROMPT, Sampling())
        async for piece in session.decode(1, gate=gate, report=True):
            return piece

    with torch.no_grad():
        d = torch.sigmoid(base(torch.tensor([PROMPT])).deferral_logits[0, -1, 0]).item()
    cut = torch.logit(torch.tensor(d, dtype=torch.float64)).item()
    assert asyncio.run(first(Gate("learned", cut - 1e-3))).finish == "deferral"
    assert asyncio.run(first(Gate("learned", cut + 1e-3))).finish == "length"
