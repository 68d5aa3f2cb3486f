"""Time to the first token of a stream: `collm serve` against `vllm serve` with the base alone, over HTTP.

    python -m benchmarks.serving.latency

Both servers get the base on the same cores with the same engine arguments; ours has an assistant on the other cores,
and runs once without --prefetch and once with it. One request at a time, each prompt once, no prefix cache. The last
line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx

from benchmarks.serving.common import ASSISTANT, ENGINE, MODELS, base_checkpoint, finish, halves, prompts

FLAGS = {k: v for k, v in ENGINE.items() if k != "disable_log_stats"} | {"enable_prefix_caching": False}


async def first_tokens(
    url: str, model: str, texts: list[list[int]], kinds: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """Median seconds to the first chunk with a token, for each kind of request, which take turns at each prompt."""
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    async with httpx.AsyncClient(timeout=300, trust_env=False) as http:
        for text in texts:
            for kind, extra in kinds.items():
                body = {"model": model, "prompt": text, "max_tokens": 2, "temperature": 0, "stream": True, **extra}
                start = time.perf_counter()
                async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    found = False
                    async for line in answer.aiter_lines():  # to the end: the next request finds idle engines
                        if not found and line.startswith("data: {") and json.loads(line[6:])["choices"]:
                            times[kind].append(time.perf_counter() - start)
                            found = True
    return {kind: statistics.median(seconds[2:]) for kind, seconds in times.items()}


def start(command: list[str], cores: str, port: int) -> subprocess.Popen:
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores} if cores else {**os.environ}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    for _ in range(3000):
        if process.poll() is not None:
            raise SystemExit(f"{command} exited with {process.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                return process
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(f"{command} did not start")


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--cut", type=float, default=0.5)
    options = parser.parse_args()
    base, port = base_checkpoint(), 18474
    own, others, _ = halves()
    texts = prompts(options.prompts + 2)
    medians: dict[str, Any] = {}

    # The server itself: the command `vllm serve` asks for the metadata of a package that vllm-cpu does not bring.
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base]
    vllm += ["--port", str(port), "--dtype", "bfloat16"]
    vllm += ["--served-model-name", "base", "--enforce-eager", "--no-enable-prefix-caching"]
    vllm += ["--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "64"]
    process = start(vllm, own, port)
    try:
        medians |= asyncio.run(first_tokens(f"http://127.0.0.1:{port}", "base", texts, {"vllm_serve_base": {}}))
    finally:
        stop(process)

    ours = [sys.executable, "-m", "collm.cli", "serve", "--model", base, "--assistant", str(MODELS / ASSISTANT)]
    ours += ["--engine", "vllm", "--port", str(port), "--dtype", "bfloat16", "--served-model-name", "pair"]
    ours += ["--base-devices", own, "--assistant-devices", others, "--log-level", "error"]
    ours += ["--engine-args", json.dumps(FLAGS), "--assistant-engine-args", json.dumps(FLAGS)]
    kinds: dict[str, dict[str, Any]] = {
        "never": {"threshold": 1},
        "deferred": {"threshold": -1},  # the first token is the assistant's
        "router": {"router": f"entropy:cut={options.cut}"},
    }
    for suffix, flags in (("", []), ("_prefetch", ["--prefetch"])):
        process = start([*ours, *flags], "", port)
        try:
            named = {kind + suffix: extra for kind, extra in kinds.items()}
            medians |= asyncio.run(first_tokens(f"http://127.0.0.1:{port}", "pair", texts, named))
        finally:
            stop(process)
    plain = medians["vllm_serve_base"]
    ratios = {name: seconds / plain for name, seconds in medians.items()}
    finish("latency", vars(options), {"median_seconds": medians, "over_vllm_serve": ratios})


if __name__ == "__main__":
    main()
