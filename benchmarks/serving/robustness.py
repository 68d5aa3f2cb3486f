"""What a server of two vLLM engines does with clients that leave, nonsense, and an assistant that dies.

    python -m benchmarks.serving.robustness soak      # 2,000 requests, 20% of clients gone in mid-stream, 5% malformed
    python -m benchmarks.serving.robustness kill      # the assistant's process killed and restarted under load
    python -m benchmarks.serving.robustness counters  # tokens that each engine computed, by its own scheduler

Tiny random models in float32, made on the spot. The load comes over HTTP from another process. The last line of
standard output is one JSON object; the exit code is 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.serving.common import at_once, finish, halves

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

import httpx
import uvicorn

from collm.configuration import DeferralConfig
from collm.engines.collaboration import Request, collaborate
from collm.engines.vllm import VLLMEngine
from collm.serving.app import create_app
from collm.serving.service import Limits, Service
from tests.conftest import tiny_tokenizer
from tests.vllm_plugin.support import ENGINE, save_assistant, save_base

TIMEOUT = 120.0


def tiny_pair() -> tuple[str, str]:
    """Folders of a tiny deferral checkpoint and a tiny assistant."""
    root = Path(tempfile.mkdtemp(prefix="collm-benchmark-"))
    return save_base(root / "base", "llama")[0], save_assistant(root / "assistant", "llama", 1)[0]


def engines(folders: tuple[str, str], **options: Any) -> list[VLLMEngine]:
    started = []
    for folder, cores in zip(folders, halves(), strict=False):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
        started.append(VLLMEngine(folder, name=Path(folder).name, **{**ENGINE, **options}))
    return started


def serve(base, assistants, limits=None, policy="error"):
    """A listening server of this process' event loop, and its service."""
    service = Service(
        "tiny", base, assistants, tiny_tokenizer(), DeferralConfig(), on_assistant_error=policy,
        limits=limits or Limits(max_running=64, max_waiting=4096), eos_ids=frozenset([2]),
    )  # fmt: skip
    return service, uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="error"))


async def started(server) -> str:
    while not server.started:
        await asyncio.sleep(0.02)
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


# --------------------------------------------------------------------------------------------------------------- soak


def wanted(rng: random.Random) -> dict[str, Any]:
    """One well-formed request."""
    body: dict[str, Any] = {
        "model": rng.choice(["tiny", "tiny@0.3", "tiny@0.7", "tiny@-1", "tiny@1"]),
        "prompt": [rng.randrange(3, 64) for _ in range(rng.randint(2, 80))],
        "max_tokens": rng.randint(1, 60),
        "temperature": 0,
        "return_source": True,
    }
    if rng.random() < 0.2:
        body["stop"] = [f"w{rng.randrange(10)}"]
    if rng.random() < 0.2:
        body["ignore_eos"] = True
    return body


def malformed(rng: random.Random) -> bytes:
    good = {"model": "tiny", "prompt": [5], "max_tokens": 4}
    return rng.choice(
        [
            b"{", b"\xff\x00", b"[]", b'"x"', b"",
            *(json.dumps({**good, **bad}).encode() for bad in (
                {"temperature": "hot"}, {"prompt": {}}, {"max_tokens": -3}, {"model": 7}, {"stop": [[]]}, {"n": 10**9},
                {"prompt": [10**9]}, {"logit_bias": {"x": 1}}, {"threshold": 5}, {"router": "no"}, {"stream": "maybe"},
            )),
        ]
    )  # fmt: skip


async def client(url: str, count: int, concurrency: int, seed: int) -> dict[str, Any]:
    """Single runs first, then the storm; every finished answer is compared with its twin."""
    rng = random.Random(seed)
    pool = [wanted(rng) for _ in range(60)]
    outcome: Counter = Counter()
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=httpx.Limits(max_connections=None), trust_env=False) as http:
        address = f"{url}/v1/completions"

        def essence(choice):
            return choice["text"], choice["token_ids"], choice["source"], choice["finish_reason"]

        twins = [essence((await http.post(address, json=body)).json()["choices"][0]) for body in pool]

        async def streamed(body, leave_after=None):
            text, tokens, source, finish, events = "", [], [], None, 0
            async with http.stream("POST", address, json={**body, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choice = json.loads(line[6:])["choices"][0]
                    text, finish = text + choice["text"], choice["finish_reason"]
                    tokens, source = tokens + choice["token_ids"], source + choice["source"]
                    events += 1
                    if leave_after is not None and events >= leave_after:
                        return None
            return text, tokens, source, finish

        async def one(kind, index, leave_after):
            try:
                if kind == "malformed":
                    answer = await http.post(
                        address, content=malformed(rng), headers={"content-type": "application/json"}
                    )
                    outcome["refused" if 400 <= answer.status_code < 500 else f"malformed_{answer.status_code}"] += 1
                    return
                if kind == "leave":
                    await streamed(pool[index], leave_after)
                    outcome["left"] += 1
                    return
                if kind == "stream":
                    result = await streamed(pool[index])
                else:
                    answer = await http.post(address, json=pool[index])
                    if answer.status_code != 200:
                        outcome[f"status_{answer.status_code}"] += 1
                        return
                    result = essence(answer.json()["choices"][0])
                outcome["identical" if result == twins[index] else "different"] += 1
                if result != twins[index]:
                    print(f"{kind} {pool[index]}\nalone: {twins[index]}\nnow:   {result}", file=sys.stderr, flush=True)
            except httpx.HTTPError as error:
                outcome[type(error).__name__] += 1

        kinds = rng.choices(["leave", "malformed", "stream", "whole"], [0.20, 0.05, 0.375, 0.375], k=count)
        jobs = [partial(one, kind, rng.randrange(len(pool)), rng.randint(1, 8)) for kind in kinds]
        seconds, _ = await at_once(concurrency, jobs)
    return {"seconds": seconds, "requests": count, "planned": dict(Counter(kinds)), "outcome": dict(outcome)}


async def soak(options) -> tuple[dict[str, Any], bool]:
    both = engines(tiny_pair())
    service, server = serve(both[0], both[1:])
    serving = asyncio.create_task(server.serve())
    command = [sys.executable, "-m", "benchmarks.serving.robustness", "soak", "--client", await started(server)]
    command += ["--requests", str(options.requests), "--concurrency", str(options.concurrency)]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await child.communicate()
    results = json.loads(output.decode().strip().splitlines()[-1])
    await asyncio.sleep(1.0)
    results["left_behind"] = await leftovers(service, both)
    server.should_exit = True
    await serving
    finished = results["outcome"].get("identical", 0)
    expected = results["planned"].get("stream", 0) + results["planned"].get("whole", 0)
    allowed = {"identical", "refused", "left"}
    good = finished == expected and set(results["outcome"]) <= allowed and not any(results["left_behind"].values())
    return results, good


async def leftovers(service: Service, both: list[VLLMEngine]) -> dict[str, int]:
    """What is still there after everybody left: places, requests, and KV blocks by the engines' own account."""
    left = {"admitted": service.admitted}
    for some in both:
        left[f"{some.name}_requests"] = some.engine.output_processor.get_num_unfinished_requests()
        # An engine resets its prefix cache only while no block is in use, and says whether it did.
        left[f"{some.name}_blocks_in_use"] = int(not await some.engine.reset_prefix_cache())
    return left


# --------------------------------------------------------------------------------------------------------------- kill


async def kill(options) -> tuple[dict[str, Any], bool]:
    from collm.engines.http import HTTPEngine

    base_folder, helper_folder = tiny_pair()
    port = 18473

    def start_assistant():
        command = [sys.executable, "-m", "collm.cli", "serve", "--model", base_folder, "--assistant", helper_folder]
        command += ["--engine", "transformers", "--threshold", "-1", "--port", str(port), "--log-level", "error"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def reachable():
        async with httpx.AsyncClient(trust_env=False) as http:
            for _ in range(1200):
                try:
                    return (await http.get(f"http://127.0.0.1:{port}/health")).is_success
                except httpx.TransportError:
                    await asyncio.sleep(0.1)

    assistant = start_assistant()
    await reachable()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = halves()[0]
    base = VLLMEngine(base_folder, name="base", **ENGINE)
    helper = HTTPEngine(f"http://127.0.0.1:{port}", tiny_tokenizer(), timeout=5, retries=1, name="assistant")
    service, server = serve(base, [helper], Limits(max_running=32, max_waiting=4096, assistant_timeout=10))
    for breaker in service.breakers:
        breaker.cooldown = breaker.pause = 1.0
        breaker.longest = 2.0
    serving = asyncio.create_task(server.serve())
    url = await started(server)
    log: list[tuple[float, str, int, int, int]] = []  # when it ended, policy, status, tokens, deferred
    stop = asyncio.Event()
    begin = time.perf_counter()

    async def worker(http, policy):
        rng = random.Random(policy)
        while not stop.is_set():
            body = {
                "model": "tiny", "prompt": [rng.randrange(3, 64) for _ in range(10)], "max_tokens": 24,
                "temperature": 0, "ignore_eos": True, "on_assistant_error": policy,
            }  # fmt: skip
            answer = await http.post(f"{url}/v1/completions", json=body)
            usage = answer.json().get("usage", {})
            ended = time.perf_counter() - begin
            log.append(
                (ended, policy, answer.status_code, usage.get("completion_tokens", 0), usage.get("deferred_tokens", 0))
            )

    async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as http:
        workers = [asyncio.create_task(worker(http, p)) for p in ["fallback"] * 4 + ["error"] * 4]
        await asyncio.sleep(options.phase)
        assistant.send_signal(signal.SIGKILL)
        assistant.wait()
        killed = time.perf_counter() - begin
        await asyncio.sleep(options.phase)
        assistant = start_assistant()
        await reachable()
        back = time.perf_counter() - begin
        await asyncio.sleep(options.phase)
        stop.set()
        await asyncio.gather(*workers)
    await asyncio.sleep(0.5)
    left = await leftovers(service, [base])
    server.should_exit = True
    await serving
    await helper.close()
    assistant.terminate()
    assistant.wait()

    def phase(start, end):
        rows = [r for r in log if start <= r[0] < end]
        return {
            policy: {
                "answers": len(own := [r for r in rows if r[1] == policy]),
                "status": dict(Counter(str(r[2]) for r in own)),
                "complete": sum(r[2] == 200 and r[3] == 24 for r in own),
                "deferred_tokens": sum(r[4] for r in own),
            }
            for policy in ("fallback", "error")
        }

    recovered = [t for t, _, status, _, deferred in log if t > back and status == 200 and deferred]
    results = {
        "healthy": phase(0, killed), "dead": phase(killed, back), "restarted": phase(back, 1e9),
        "seconds_to_recover": min(recovered) - back if recovered else None, "left_behind": left,
    }  # fmt: skip
    fallback = [r for r in log if r[1] == "fallback"]
    clean = all(r[2] in (200, 502) for r in log if r[1] == "error")
    good = all(r[2] == 200 and r[3] == 24 for r in fallback) and clean and bool(recovered) and not any(left.values())
    return results, good


# ----------------------------------------------------------------------------------------------------------- counters


async def counters(options) -> tuple[dict[str, Any], bool]:
    """Compare what the engines' schedulers scheduled with what they were handed."""
    folders = tiny_pair()
    files = [Path(folder) / "scheduled.txt" for folder in folders]
    both = []
    for folder, file, cores in zip(folders, files, halves(), strict=False):
        os.environ.update(COLLM_COUNT_TOKENS=str(file), VLLM_CPU_OMP_THREADS_BIND=cores)
        scheduler = "benchmarks.serving.counting.CountingScheduler"
        both.append(VLLMEngine(folder, name=Path(folder).name, **ENGINE, scheduler_cls=scheduler))
    rng = random.Random(0)
    handed = [0, 0]

    async def one():
        prompt = [rng.randrange(3, 64) for _ in range(rng.randint(2, 200))]
        request = Request(prompt, rng.randint(4, 60), rng.choice([-1.0, 0.3, 0.5, 0.7, 1.0]))
        source = [s async for w in collaborate(request, both[0], both[1:]) for s in w.source]
        handed[0] += len(prompt) + len(source) - 1  # nobody reads the last token
        if any(source):
            handed[1] += len(prompt) + max(i for i, s in enumerate(source) if s)
        return source

    _, sources = await at_once(options.concurrency, [one for _ in range(256)])
    await asyncio.sleep(0.5)
    scheduled = [int(file.read_text()) for file in files]
    for some in both:
        await some.close()
    tokens = sum(map(len, sources))
    results = {
        "requests": 256, "tokens": tokens, "deferral_rate": sum(map(sum, sources)) / tokens,
        "base": {"handed": handed[0], "computed": scheduled[0]},
        "assistant": {"handed": handed[1], "computed": scheduled[1]},
    }  # fmt: skip
    return results, scheduled == handed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("soak", "kill", "counters"))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--phase", type=float, default=8.0, help="seconds of each phase of `kill`")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        print(json.dumps(asyncio.run(client(options.client, options.requests, options.concurrency, seed=1))))
        return 0
    results, good = asyncio.run({"soak": soak, "kill": kill, "counters": counters}[options.what](options))
    settings = {k: v for k, v in vars(options).items() if k != "client"}
    finish(options.what, settings, {**results, "kept": good})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
