"""The OpenAI-compatible server, driven by the official client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
import torch

from collm.engines.http import HTTPEngine
from collm.engines.transformers import TransformersEngine
from collm.errors import ConfigurationError
from collm.serving.app import create_app
from collm.serving.service import Limits
from tests.conftest import tiny_model, tiny_tokenizer
from tests.engines.oracle import oracle
from tests.serving.running import make_service, running

PROMPT = "w1 w2 3 + 4 ="


def client_of(server, **options):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as one:
        yield one


def expected(server, prompt_ids, max_tokens, threshold, **kwargs):
    return oracle(server.base, server.assistants, prompt_ids, max_tokens, threshold, stop_ids={2}, **kwargs)


def test_completion_is_the_oracle_and_says_who_wrote_what(server, client):
    ids = tiny_tokenizer().encode(PROMPT)
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=16, temperature=0, extra_body={"threshold": 0.5, "return_source": True}
    )
    choice, truth = answer.choices[0], expected(server, ids, 16, 0.5)
    assert choice.token_ids == truth.tokens
    assert choice.source == truth.source
    assert choice.deferral_probs == pytest.approx(truth.deferral_probs, abs=1e-4)
    assert choice.text == tiny_tokenizer().decode([t for t in truth.tokens if t != 2], skip_special_tokens=True)
    assert answer.usage.deferred_tokens == sum(truth.source)
    assert answer.usage.completion_tokens == len(truth.tokens)
    assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    ("model", "body", "threshold"),
    [
        ("tiny@0.3", {}, 0.3),
        ("tiny@1", {}, 1.0),
        ("tiny@-1", {}, -1.0),
        ("tiny@rate=0.1", {}, 0.8),
        ("tiny", {"deferral_rate": 0.5}, 0.4),
        ("tiny", {}, 0.5),
    ],
)
def test_the_threshold_comes_through_the_model_name_or_the_body(server, client, model, body, threshold):
    ids = [5, 6, 7, 8]
    body = {"return_source": True, **body}
    answer = client.completions.create(model=model, prompt=ids, max_tokens=12, temperature=0, extra_body=body)
    truth = expected(server, ids, 12, threshold)
    assert (answer.choices[0].token_ids, answer.choices[0].source) == (truth.tokens, truth.source)


def test_chat_goes_through_the_chat_template(server, client):
    messages = [{"role": "user", "content": "1 + 2 ="}]
    ids = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=8, temperature=0, extra_body={"return_token_ids": True}
    )
    truth = expected(server, ids, 8, 0.5)
    assert answer.choices[0].token_ids == truth.tokens
    assert answer.choices[0].prompt_token_ids == ids
    assert answer.choices[0].message.role == "assistant"


def test_streaming_is_the_whole_answer_in_pieces(client):
    arguments = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0}
    arguments["extra_body"] = {"return_source": True}
    whole = client.completions.create(**arguments)
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [t for c in chunks if c.choices for t in c.choices[0].token_ids] == whole.choices[0].token_ids
    assert [s for c in chunks if c.choices for s in c.choices[0].source] == whole.choices[0].source
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason

    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "1"}], max_tokens=5, temperature=0, stream=True
    )
    deltas = [c.choices[0].delta for c in stream]
    assert deltas[0].role == "assistant"
    assert all(d.role is None for d in deltas[1:])


def test_stop_strings_cut_the_text_whole_and_streamed(client):
    arguments = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**arguments).choices[0].text
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    whole = client.completions.create(**arguments, stop=["zzz", stop]).choices[0]
    assert whole.text == free[: free.index(stop)]
    assert whole.finish_reason == "stop"
    streamed = client.completions.create(**arguments, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == whole.text


def test_tokens_behind_a_stop_string_are_dropped_however_many_arrive_at_once():
    with running() as server, client_of(server) as client:
        arguments = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0}
        arguments["extra_body"] = {"return_token_ids": True, "return_source": True}
        free = client.completions.create(**arguments).choices[0].text
        stop = free[len(free) // 2 : len(free) // 2 + 3]
        alone = client.completions.create(**arguments, stop=stop)

        open_session = server.service.base.open

        def ahead(*settings):  # an engine that is ahead of its reader
            session = open_session(*settings)
            decode = session.decode

            async def together(*given, **options):
                pieces = [piece async for piece in decode(*given, **options)]
                token_ids = [token for piece in pieces for token in piece.token_ids]
                deferral_probs = [d for piece in pieces for d in piece.deferral_probs]
                yield replace(pieces[-1], token_ids=token_ids, deferral_probs=deferral_probs)

            session.decode = together
            return session

        server.service.base.open = ahead
        again = client.completions.create(**arguments, stop=stop)
    assert again.choices == alone.choices
    assert again.usage == alone.usage
    assert 0 < len(alone.choices[0].token_ids) < 40


def test_several_prompts_and_answers_are_in_order(client):
    answer = client.completions.create(
        model="tiny", prompt=[[5, 6], [7, 8]], n=2, max_tokens=6, temperature=1.0, seed=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.prompt_token_ids for c in answer.choices] == [[5, 6], [5, 6], [7, 8], [7, 8]]
    assert answer.choices[0].token_ids != answer.choices[1].token_ids
    again = client.completions.create(
        model="tiny", prompt=[7, 8], max_tokens=6, temperature=1.0, seed=4, extra_body={"return_token_ids": True}
    )
    assert again.choices[0].token_ids == answer.choices[3].token_ids


def test_stop_token_ids_ignore_eos_and_logit_bias(client):
    base = {"model": "tiny@1", "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 10}
    free = client.completions.create(**base, extra_body={"return_token_ids": True}).choices[0].token_ids
    stopped = client.completions.create(**base, extra_body={"return_token_ids": True, "stop_token_ids": [free[3]]})
    assert stopped.choices[0].token_ids == free[: free.index(free[3]) + 1]
    forced = client.completions.create(**base, logit_bias={"2": 100}, extra_body={"return_token_ids": True})
    assert forced.choices[0].token_ids == [2]
    assert forced.choices[0].finish_reason == "stop"
    assert forced.choices[0].text == ""
    ignoring = client.completions.create(
        **base, logit_bias={"2": 100}, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    assert ignoring.choices[0].token_ids == [2] * 10


def test_an_assistant_may_have_a_prompt_of_its_own(server, client):
    answer = client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=12, temperature=0,
        extra_body={"assistant_prompts": [[9, 9]], "return_source": True},
    )  # fmt: skip
    truth = expected(server, [5, 6, 7], 12, 0.5, assistant_prompts=[[9, 9]])
    assert (answer.choices[0].token_ids, answer.choices[0].source) == (truth.tokens, truth.source)


def test_models_health_metrics_and_tokenize(server, client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert httpx.get(server.url + "/health").json() == {"status": "ok", "assistants": {"assistant-1": "ok"}}
    tokens = httpx.post(server.url + "/tokenize", json={"prompt": "1 + 2"}).json()
    assert tokens == {"tokens": tiny_tokenizer().encode("1 + 2"), "count": 3, "max_model_len": 256}
    assert httpx.post(server.url + "/detokenize", json={"tokens": [5, 6]}).json()["prompt"] == "12"
    client.completions.create(model="tiny@-1", prompt=[5], max_tokens=3, extra_body={"ignore_eos": True})
    metrics = httpx.get(server.url + "/metrics").text
    read = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line[0] != "#"}
    assert read['collm_tokens_total{source="assistant"}'] >= 3
    assert read['collm_handoff_seconds_count{assistant="assistant-1"}'] >= 3
    assert read["collm_running"] == 0
    assert read['collm_requests_total{route="/v1/completions",status="200"}'] >= 1


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "other"}, 404, 'has "tiny"'),
        ({"model": "tiny@high"}, 400, "name@0.6"),
        ({"model": "tiny@0.2", "threshold": 0.3}, 400, "both"),
        ({"model": "tiny@rate=0.9"}, 400, "calibrated range"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "NaN"}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100000}, 400, "256"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [64]}, 400, "vocabulary"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"logit_bias": {"w1": 3}}, 400, "token ids"),
        ({"logit_bias": {"5000": 3}}, 400, "vocabulary"),
        ({"router": "entropie:cut=1"}, 400, "Did you mean"),
        ({"router": "margin:cut=1"}, 400, "top_probability"),
        ({"treshold": 0.3}, 400, "treshold"),
        ({"n": 1000}, 400, "n"),
        ({"stop": ["x"] * 100}, 400, "stop"),
        ({"presence_penalty": 1.0}, 400, "presence_penalty"),
        ({"assistant_prompts": [[5], [6]]}, 400, "2 prompts"),
        ({"stream_options": {"include_usage": True}}, 400, "stream"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_reason(server, change, status, says):
    body = json.dumps({"model": "tiny", "prompt": [5, 6], "max_tokens": 4, **change})
    answer = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["code"] == status


def test_bodies_that_are_no_json_or_too_large_are_refused():
    with running(app={"max_body_bytes": 1000}) as server:
        url = server.url + "/v1/completions"
        assert httpx.post(url, content=b"{").status_code == 400
        assert httpx.post(url, content=b"\xff\xfe", headers={"content-type": "application/json"}).status_code == 400
        assert httpx.post(url, content=b"x" * 2000).status_code == 413
        assert (
            httpx.post(url, content=(b"x" * 100 for _ in range(20))).status_code == 413
        )  # chunked: no length declared


def test_an_api_key_is_needed_where_one_is_set():
    with running(app={"api_keys": ["sesame", "other"]}) as server:
        with pytest.raises(openai.AuthenticationError):
            client_of(server, api_key="wrong").models.list()
        with client_of(server, api_key="sesame") as client:
            assert client.completions.create(model="tiny", prompt=[5], max_tokens=2).usage.completion_tokens >= 1
        assert httpx.get(server.url + "/health").status_code == 200


def test_no_cross_origin_header_unless_asked(server):
    assert (
        "access-control-allow-origin" not in httpx.get(server.url + "/health", headers={"origin": "http://x"}).headers
    )
    with running(app={"cors_origins": ["http://x"]}) as other:
        headers = httpx.get(other.url + "/health", headers={"origin": "http://x"}).headers
        assert headers["access-control-allow-origin"] == "http://x"


class Slow(TransformersEngine):
    def forward(self, rows, chunks):
        time.sleep(0.02)
        return super().forward(rows, chunks)


def slow_helper(seed=1):
    return [Slow(tiny_model(seed=seed), "slow")]


def test_a_full_queue_answers_429_with_retry_after_and_nobody_else_suffers():
    with running(helpers=slow_helper(), limits=Limits(max_running=2, max_waiting=2)) as server:
        body = {"model": "tiny@-1", "prompt": [5, 6], "max_tokens": 20, "ignore_eos": True}

        def ask(_):
            return httpx.post(server.url + "/v1/completions", json=body, timeout=60)

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(12)))
        codes = sorted(a.status_code for a in answers)
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 4
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        assert server.service.admitted == 0


def test_a_client_that_leaves_frees_its_place_streaming_or_not():
    with running(helpers=slow_helper()) as server:
        body = {"model": "tiny@-1", "prompt": [5, 6], "max_tokens": 200, "ignore_eos": True}
        with httpx.stream("POST", server.url + "/v1/completions", json={**body, "stream": True}) as stream:
            next(stream.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/completions", json=body, timeout=0.2)
        deadline = time.monotonic() + 3
        while server.service.admitted and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.service.admitted == 0


def test_running_answers_are_finished_when_the_server_is_told_to_stop():
    with running(helpers=slow_helper()) as server:
        body = {"model": "tiny@-1", "prompt": [5, 6], "max_tokens": 40, "ignore_eos": True}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, server.url + "/v1/completions", json=body, timeout=30)
            while not server.service.admitted:
                time.sleep(0.01)
            server.server.should_exit = True
            assert answer.result().json()["usage"]["completion_tokens"] == 40
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")


class Switch(TransformersEngine):
    """An assistant that can be unplugged."""

    dead = False
    calls = 0

    def forward(self, rows, chunks):
        self.calls += 1
        if self.dead:
            raise RuntimeError("connection lost")
        return super().forward(rows, chunks)


@pytest.mark.parametrize("prefetch", [False, True])
def test_error_policy_fallback_policy_breaker_and_recovery(prefetch):
    helper = Switch(tiny_model(seed=1), "switch")
    with running(helpers=[helper], prefetch=prefetch) as server, client_of(server) as client:
        breaker = server.service.breakers[0]
        breaker.cooldown = breaker.pause = 3.0
        arguments = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0}
        healthy = client.completions.create(**arguments)
        assert healthy.usage.deferred_tokens > 0

        helper.dead = True
        for _ in range(3):
            with pytest.raises(openai.APIStatusError) as caught:
                client.completions.create(**arguments)
            assert caught.value.status_code == 502
        assert breaker.is_open
        calls = helper.calls
        assert "not asked" in str(httpx.get(server.url + "/health").json())
        with pytest.raises(openai.APIError, match="not available"):
            list(client.completions.create(**arguments, stream=True))  # an event that says so, then the end

        fallback = {"on_assistant_error": "fallback", "return_source": True}
        alone = client.completions.create(**arguments, extra_body=fallback)
        assert alone.usage.deferred_tokens == 0
        assert len(alone.choices[0].token_ids) == alone.usage.completion_tokens > 0
        truth = expected(server, [5, 6, 7], 20, 0.5)
        assert alone.choices[0].fallback_from == truth.source.index(1)
        assert alone.choices[0].token_ids == expected(server, [5, 6, 7], 20, 1.0).tokens
        assert helper.calls == calls  # while the breaker is open nobody asks, nor prefetches

        helper.dead = False
        time.sleep(max(0.0, breaker.next_trial - time.monotonic()))
        assert client.completions.create(**arguments).choices[0].text == healthy.choices[0].text
        assert not breaker.is_open


def test_a_blank_key_opens_nothing():
    with pytest.raises(ConfigurationError, match="empty"):
        create_app(make_service()[0], ["", "key"])


def test_a_users_mistake_about_a_remote_assistant_does_not_shut_it_off():
    with running(threshold=1.0) as remote:
        helper = HTTPEngine(remote.url.replace("http://", "http://me:secret@"), tiny_tokenizer())
        with running(helpers=[helper]) as server:
            completions = server.url + "/v1/completions"
            good = {"model": "tiny@-1", "prompt": [5, 6], "max_tokens": 3, "temperature": 0}
            assert httpx.post(completions, json=good).is_success
            helper.vocab_size = server.service.vocab_size = 10**6  # so that the token is refused behind us, not by us
            for _ in range(4):
                refused = httpx.post(completions, json={**good, "logit_bias": {"99999": 1}})
                assert refused.status_code == 502
                assert "not in the vocabulary" in refused.text
            assert httpx.post(completions, json=good).is_success
            pages = [httpx.get(server.url + path).text for path in ("/health", "/metrics", "/v1/models")]
            assert all("secret" not in page and "127.0.0.1" in page for page in pages)


def test_an_assistant_with_token_ids_that_the_base_lacks_falls_back_or_is_502_and_is_shut_off():
    helper = HTTPEngine("http://127.0.0.1:1", tiny_tokenizer())

    async def complete(body):
        return {"token_ids": [152000]}

    helper.complete = complete
    with running(helpers=[helper]) as server:
        completions = server.url + "/v1/completions"
        body = {"model": "tiny@-1", "prompt": [5, 6], "max_tokens": 3, "temperature": 0}
        alone = httpx.post(completions, json={**body, "on_assistant_error": "fallback"})
        assert alone.is_success
        for _ in range(2):
            failed = httpx.post(completions, json=body)
            assert (failed.status_code, "token id 152000" in failed.text) == (502, True)
        assert server.service.breakers[0].is_open


def test_health_does_not_wait_for_a_slow_assistant():
    class Hanging(TransformersEngine):
        asked = 0

        async def healthy(self):
            self.asked += 1
            if self.asked > 1:  # behind the one at the start
                await asyncio.sleep(60)
            return True

    helper = Hanging(tiny_model(seed=1), "hanging")
    with running(helpers=[helper]) as server:
        for _ in range(2):
            assert httpx.get(server.url + "/health", timeout=5).json()["status"] == "ok"
        assert helper.asked == 2  # one at a time


def test_without_a_seed_answers_are_independent():
    with running() as server, client_of(server) as client:
        body = {"router": "random:rate=0.5", "return_source": True, "ignore_eos": True}
        answer = client.completions.create(model="tiny", prompt=[5, 6], max_tokens=24, n=4, extra_body=body)
    assert len({tuple(choice.source) for choice in answer.choices}) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_server_is_said_in_the_apis_shape(stream, monkeypatch):
    with running() as server:
        monkeypatch.setattr(server.service, "_delta", lambda *_: 1 / 0)
        body = {"model": "tiny", "prompt": [5, 6], "stream": stream}
        answer = httpx.post(server.url + "/v1/completions", json=body)
        error = json.loads(answer.text.removeprefix("data: ").split("\n")[0])["error"]
        assert (error["code"], "division" in error["message"]) == (500, False)
        counted = f'route="/v1/completions",status="{200 if stream else 500}"'
        assert counted in httpx.get(server.url + "/metrics").text


def test_more_answers_than_there_are_places_are_not_put_off():
    with running(limits=Limits(max_running=2, max_waiting=2)) as server:
        answer = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": [5], "n": 5})
        assert (answer.status_code, "4 at once" in answer.text) == (400, True)


@pytest.mark.parametrize("router", ["ema", "random:rate=0.2", "entropy:cut=1"])
def test_a_rate_is_the_heads(server, router):
    body = {"model": "tiny@rate=0.1", "prompt": [5, 6], "router": router}
    answer = httpx.post(server.url + "/v1/completions", json=body)
    assert (answer.status_code, "learned router" in answer.text) == (400, True)


def test_null_is_what_is_not_said(client):
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stream", "max_tokens", "seed", "stop"))
    assert client.completions.create(model="tiny", prompt=[5, 6], extra_body=nothing).usage.completion_tokens <= 16


def test_concurrent_requests_do_not_mix(server, client):
    cases = [([5 + i, 6, 7 + i], 6 + i, [0.2, 0.5, 0.8][i % 3]) for i in range(12)]

    def ask(case):
        prompt, length, threshold = case
        body = {"threshold": threshold, "return_source": True}
        choice = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=length, temperature=0, extra_body=body
        ).choices[0]
        return choice.token_ids, choice.source

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, cases))
    for (prompt, length, threshold), answer in zip(cases, answers, strict=True):
        truth = expected(server, prompt, length, threshold)
        assert answer == (truth.tokens, truth.source)
    assert threading.active_count() < 60


def test_the_sessions_of_the_models_are_float32_here(server):
    assert server.base.dtype == torch.float32  # token-for-token comparisons above are float32 claims
