"""What the decoding benchmarks share: models, prompts, the machine, medians, and the form of a result.

Real models are folders under COLLM_MODELS (default ~/.cache/collm/models), prompts JSON lines with a `question`
(COLLM_DATA names a folder with gsm8k/dev.jsonl). A result is written to results/NAME.json and printed as the last line
of stdout.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import collm

HERE = Path(__file__).parent
MODELS = Path(os.environ.get("COLLM_MODELS", "~/.cache/collm/models")).expanduser()
BASE, ASSISTANT = "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"
INSTRUCTION = "Solve the problem step by step. End with the answer after ####."


def load_pair(base: str = BASE, assistant: str = ASSISTANT, device: str = "cpu") -> tuple[Any, Any, Any]:
    """Base with a new (zero) head, assistant, tokenizer; bfloat16."""
    model = collm.CoLLMForCausalLM.from_pretrained(str(MODELS / base), dtype=torch.bfloat16).eval().to(device)
    helper = AutoModelForCausalLM.from_pretrained(str(MODELS / assistant), dtype=torch.bfloat16).eval().to(device)
    for m in (model, helper):  # greedy, and nothing else: benchmarks set what they need
        m.generation_config = transformers.GenerationConfig(
            eos_token_id=m.generation_config.eos_token_id, pad_token_id=m.generation_config.pad_token_id
        )
    return model, helper, AutoTokenizer.from_pretrained(str(MODELS / base))


def gsm8k_prompts(tokenizer: Any, count: int, skip: int = 0) -> list[list[int]]:
    """Token ids of the first `count` problems as chat prompts."""
    path = Path(os.environ.get("COLLM_DATA", ".")).expanduser() / "gsm8k" / "dev.jsonl"
    questions = [json.loads(line)["question"] for line in path.read_text().splitlines()[skip : skip + count]]
    chats = [[{"role": "user", "content": f"{question}\n{INSTRUCTION}"}] for question in questions]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


def batch(prompts: list[list[int]], pad: int, device: Any = "cpu") -> dict[str, torch.Tensor]:
    """Left-padded `input_ids` and `attention_mask`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock time of one call, and what it returned."""
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - start, result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """What the numbers were measured on, in general terms."""
    model = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "threads": torch.get_num_threads(), "gpu": gpu}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def finish(name: str, settings: dict[str, Any], results: dict[str, Any], save: bool = True) -> None:
    """Write results/NAME.json and print it as one JSON object, the last line of stdout."""
    record = {
        "benchmark": name,
        "settings": settings,
        "results": results,
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "collm": collm.__version__,
        },
    }
    if save:
        (HERE / "results" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.flush()
    print(json.dumps(record))
