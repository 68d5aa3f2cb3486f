"""Throughput of two collaborating vLLM engines against four references, on the same machine, models and prompts.

    python -m benchmarks.serving.throughput collaboration protocol alone

collaboration  the floor: the same chunks replayed on each engine alone, without waiting for the other. At concurrency 1
               the two cannot overlap, so the floor is the sum of both times; at 32 it is the slower engine's.
protocol       what the paper's code does: for every token an HTTP request with the whole text, no session, no prefix
               cache, and the full vocabulary's log-probabilities as JSON, from the same engines. It writes a sample of
               the tokens that ours wrote, each behind the text that precedes it.
alone          the assistant writes everything, in one vLLM engine on all cores. Ours twice: both engines on all cores,
               their threads sleeping while they wait (OMP_WAIT_POLICY=passive), and each on its own half.

Engines: bfloat16, eager, no prefix cache. The router is the base's entropy at a cut, so that no training is involved;
every request writes exactly `tokens` tokens. The last line of standard output is one JSON object for each part.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse

from benchmarks.serving.common import ASSISTANT, MODELS, at_once, base_checkpoint, engine, finish, halves, prompts
from collm.engines.collaboration import Asked, Request, collaborate
from collm.engines.session import Gate, Sampling


async def collaboration_run(base, helper, texts, tokens, cut, concurrency) -> dict[str, Any]:
    """Time of our collaboration, and what each engine was handed."""
    asked: list[Asked] = []

    async def one(prompt):
        request = Request(prompt, tokens, router={"name": "entropy", "cut": cut})
        written, times = [], []
        async for w in collaborate(request, base, [helper], observe=asked.append):
            times.append(time.perf_counter())
            written.append((w.token_ids, w.source))
        return [t for ids, _ in written for t in ids], [s for _, s in written for s in s], times

    seconds, answers = await at_once(concurrency, [lambda p=p: one(p) for p in texts])
    total = sum(len(ids) for ids, _, _ in answers)
    deferred = sum(sum(source) for _, source, _ in answers)
    return {
        "seconds": seconds, "tokens": total, "tokens_per_second": total / seconds, "deferral_rate": deferred / total,
        "answers": answers, "assistant_seconds": statistics.median(a.seconds for a in asked) if asked else 0.0,
    }  # fmt: skip


async def replay_base(base, texts, answers, tokens, cut, concurrency) -> float:
    """The base's chunks, each pushed the moment the engine is ready for it."""

    async def one(prompt, ids):
        session = base.open(prompt, Sampling())
        done = 0
        while done < tokens:
            async for piece in session.decode(tokens - done, gate=Gate("entropy", cut)):
                done += len(piece.token_ids)
            if piece.finish == "deferral":
                session.extend([ids[done]])
                done += 1
        await session.close()

    return (await at_once(concurrency, [lambda p=p, a=a: one(p, a[0]) for p, a in zip(texts, answers, strict=True)]))[0]


async def replay_assistant(helper, texts, answers, concurrency) -> float:
    """The assistant's chunks: what it missed, one token of its own, and so on."""

    async def one(prompt, ids, source):
        session = helper.open(prompt, Sampling())
        handed = 0
        for at in [i for i, s in enumerate(source) if s]:
            session.extend(ids[handed:at])
            async for _ in session.decode(1):
                pass
            handed = at + 1
        await session.close()

    jobs = [lambda p=p, a=a: one(p, a[0], a[1]) for p, a in zip(texts, answers, strict=True)]
    return (await at_once(concurrency, jobs))[0]


async def step_time(some, prompt, tokens=24) -> float:
    """Median seconds of one decoding step of one sequence."""
    session, times = some.open(prompt, Sampling()), []
    async for _ in session.decode(tokens):
        times.append(time.perf_counter())
    await session.close()
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def handoff_overhead(answers, base_step: float, assistant_step: float) -> dict[str, float]:
    """Time of a deferred token between two tokens, over one base step plus one assistant step."""
    deferred = []
    for _, source, times in answers:
        for i in range(1, len(times)):
            if source[i] and len(times) == len(source):
                deferred.append(times[i] - times[i - 1])
    median = statistics.median(deferred)
    return {
        "deferred_token_ms": median * 1e3, "base_step_ms": base_step * 1e3, "assistant_step_ms": assistant_step * 1e3,
        "ratio": median / (base_step + assistant_step),
    }  # fmt: skip


def pair():
    """Base and assistant, each on its own half of the cores."""
    own, others, _ = halves()
    return engine(base_checkpoint(), own, max_logprobs=-1), engine(str(MODELS / ASSISTANT), others, max_logprobs=-1)


def show(concurrency: int, *found: Any) -> None:
    """What was measured last, for whoever watches: a result file comes at the end."""
    print(f"concurrency {concurrency}:", *found, file=sys.stderr, flush=True)


async def run_collaboration(options, base, helper) -> dict[str, Any]:
    texts = prompts(64)
    await collaboration_run(base, helper, texts[:2], 8, options.cut, 2)  # warm
    results: dict[str, Any] = {}
    for concurrency, count in options.loads:
        ours = await collaboration_run(base, helper, texts[:count], options.tokens, options.cut, concurrency)
        answers = ours.pop("answers")
        alone = await replay_base(base, texts[:count], answers, options.tokens, options.cut, concurrency)
        reading = await replay_assistant(helper, texts[:count], answers, concurrency)
        floor = alone + reading if concurrency == 1 else max(alone, reading)
        results[f"concurrency_{concurrency}"] = {
            **ours, "base_alone_seconds": alone, "assistant_alone_seconds": reading,
            "of_floor": floor / ours["seconds"],
        }  # fmt: skip
        show(concurrency, results[f"concurrency_{concurrency}"])
        if concurrency == 1:
            steps = await step_time(base, texts[0]), await step_time(helper, texts[0])
            results["handoff"] = handoff_overhead(answers, *steps)
    return results


def completions_server(engines: dict[str, Any]):
    """The paper's server: text in, one token and the log-probabilities of the whole vocabulary out, as JSON."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    app = FastAPI()

    @app.post("/{name}")
    async def generate(name: str, http: HTTPRequest) -> JSONResponse:
        body = await http.json()
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False, ignore_eos=True)
        request = engines[name].request_id()
        async for output in engines[name].engine.generate(
            TokensPrompt(prompt_token_ids=body["prompt"]), params, request
        ):
            final = output.outputs[0]
        return JSONResponse({"logprobs": {str(i): entry.logprob for i, entry in final.logprobs[0].items()}})

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    return server


async def published_run(url, texts, answers, every, cut, concurrency) -> dict[str, Any]:
    """Decode as the paper's code does, with the same router on the distributions that come back.

    It keeps nothing from token to token, so that every `every`-th token of a text, written behind what precedes it,
    takes what it would take in its place.
    """
    import httpx
    import numpy as np

    client = httpx.AsyncClient(timeout=600)

    async def distribution(name, text):
        answer = await client.post(f"{url}/{name}", json={"prompt": text})
        table = json.loads(answer.content)["logprobs"]
        ids, values = np.array([int(i) for i in table]), np.array(list(table.values()))
        return ids[values > -1e5], values[values > -1e5]

    async def one(prompt, ids):
        same = deferred = 0
        places = range(every - 1, len(ids), every)
        for at in places:
            text = [*prompt, *ids[:at]]
            candidates, values = await distribution("base", text)
            if -(np.exp(values) * values).sum() > cut:
                deferred += 1
                candidates, values = await distribution("assistant", text)
            same += int(candidates[values.argmax()]) == ids[at]
        return len(places), same, deferred

    jobs = [lambda p=p, a=a: one(p, a) for p, a in zip(texts, answers, strict=True)]
    seconds, counts = await at_once(concurrency, jobs)
    await client.aclose()
    total, same, deferred = (sum(count) for count in zip(*counts, strict=True))
    return {
        "seconds": seconds, "tokens": total, "tokens_per_second": total / seconds, "deferral_rate": deferred / total,
        "same_tokens": f"{same}/{total}",
    }  # fmt: skip


async def run_protocol(options, base, helper) -> dict[str, Any]:
    server = completions_server({"base": base, "assistant": helper})
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.05)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    texts = prompts(64)
    results: dict[str, Any] = {}
    for concurrency, count, every in options.protocol_loads:
        ours = await collaboration_run(base, helper, texts[:count], options.tokens, options.cut, concurrency)
        answers = [answer[0] for answer in ours.pop("answers")]
        theirs = await published_run(url, texts[:count], answers, every, options.cut, concurrency)
        results[f"concurrency_{concurrency}"] = {
            "published": theirs, "ours": ours, "ratio": ours["tokens_per_second"] / theirs["tokens_per_second"]
        }  # fmt: skip
        show(concurrency, results[f"concurrency_{concurrency}"])
    server.should_exit = True
    await serving
    return results


async def run_alone(options) -> dict[str, Any]:
    own, others, every = halves()
    texts = prompts(64)

    async def plain(some, prompt):
        session = some.open(prompt, Sampling())
        count = 0
        async for piece in session.decode(options.tokens):
            count += len(piece.token_ids)
        await session.close()
        return count

    results: dict[str, Any] = {}
    whole = engine(str(MODELS / ASSISTANT), every)
    await at_once(2, [lambda p=p: plain(whole, p) for p in texts[:2]])
    for concurrency, count in options.loads:
        seconds, counts = await at_once(concurrency, [lambda p=p: plain(whole, p) for p in texts[:count]])
        results[f"concurrency_{concurrency}"] = {"assistant_alone": sum(counts) / seconds}
        show(concurrency, results[f"concurrency_{concurrency}"])
    await whole.close()
    placements = (("shared_cores", (every, every), "passive"), ("own_cores", (own, others), "active"))
    for placement, cores, waiting in placements:
        os.environ["OMP_WAIT_POLICY"] = waiting
        base, helper = engine(base_checkpoint(), cores[0]), engine(str(MODELS / ASSISTANT), cores[1])
        await collaboration_run(base, helper, texts[:2], 8, options.cut, 2)
        for concurrency, count in options.loads:
            ours = await collaboration_run(base, helper, texts[:count], options.tokens, options.cut, concurrency)
            ours.pop("answers")
            row = results[f"concurrency_{concurrency}"]
            row[placement] = {**ours, "ratio": ours["tokens_per_second"] / row["assistant_alone"]}
            show(concurrency, placement, row[placement])
        await base.close()
        await helper.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("collaboration", "protocol", "alone"))
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--cut", type=float, default=0.5, help="the entropy above which the base defers, nats")
    parser.add_argument(
        "--loads", type=json.loads, default=[[1, 3], [4, 8], [32, 32]], help="[[concurrency, requests], ..]"
    )
    parser.add_argument("--protocol-loads", type=json.loads, default=[[8, 8, 12], [1, 1, 6], [32, 32, 32]],
                        help="[[concurrency, requests, n: measure every n-th token], ..]")  # fmt: skip
    options = parser.parse_args()
    asyncio.run(measure(options))


async def measure(options) -> None:
    together = {"collaboration": run_collaboration, "protocol": run_protocol}
    if wanted := [name for name in together if name in options.what]:
        base, helper = pair()
        for name in wanted:
            finish(name, vars(options), await together[name](options, base, helper))
        await base.close()
        await helper.close()
    if "alone" in options.what:
        finish("alone", vars(options), await run_alone(options))


if __name__ == "__main__":
    main()
