"""What the serving benchmarks share: engines on their own cores, prompts, concurrency, the form of a result.

Real models are folders under COLLM_MODELS (default ~/.cache/collm/models); COLLM_DATA names a folder with
gsm8k/dev.jsonl. A result is written to results/NAME.json and printed as the last line of standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import collm
from benchmarks.decoding.common import ASSISTANT, BASE, MODELS, gsm8k_prompts, machine
from collm.engines.vllm import VLLMEngine

HERE = Path(__file__).parent
ENGINE = {"enforce_eager": True, "block_size": 32, "max_model_len": 1024, "max_num_seqs": 64, "disable_log_stats": True}


def base_checkpoint(name: str = BASE) -> str:
    """A deferral checkpoint of a real base with a zero head (routers on uncertainty need none), kept between runs."""
    folder = Path(tempfile.gettempdir()) / f"collm-benchmark-{name}"
    if not (folder / "config.json").exists():
        model = collm.CoLLMForCausalLM.from_pretrained(str(MODELS / name), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(str(MODELS / name)).save_pretrained(folder)
    return str(folder)


def engine(model: str, cores: str, **options: Any) -> VLLMEngine:
    """A vLLM engine bound to CPU cores."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    return VLLMEngine(model, **{**ENGINE, "dtype": "bfloat16", "enable_prefix_caching": False, **options})


def halves() -> tuple[str, str, str]:
    """Cores of the base, of the assistant, and of an engine that has all of them."""
    cores = [str(c) for c in sorted(os.sched_getaffinity(0))]
    middle = max(1, len(cores) // 2)
    return ",".join(cores[:middle]), ",".join(cores[middle:] or cores), ",".join(cores)


def prompts(count: int) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(MODELS / BASE))
    return [list(p) for p in gsm8k_prompts(tokenizer, count)]


async def at_once(concurrency: int, jobs: Sequence[Callable[[], Awaitable[Any]]]) -> tuple[float, list[Any]]:
    """Seconds and results of all jobs, `concurrency` of them at a time."""
    slots = asyncio.Semaphore(concurrency)

    async def one(job: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await job()

    start = time.perf_counter()
    results = await asyncio.gather(*[one(job) for job in jobs])
    return time.perf_counter() - start, results


def finish(name: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    import vllm

    versions = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "vllm": vllm.__version__, "collm": collm.__version__,
    }  # fmt: skip
    record = {
        "benchmark": name, "settings": settings, "results": results, "versions": versions,
        "machine": {**machine(), "cores": len(os.sched_getaffinity(0))},
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.flush()
    print(json.dumps(record))


__all__ = ["ASSISTANT", "BASE", "MODELS", "at_once", "base_checkpoint", "engine", "finish", "halves", "prompts"]
