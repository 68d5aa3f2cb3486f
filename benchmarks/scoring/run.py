"""Scoring against a bare forward over the same batches: throughput and peak memory, in one run.

    python benchmarks/scoring/run.py --model PATH/qwen2.5-coder-1.5b-instruct --data gsm8k/train.jsonl \\
        --output benchmarks/scoring/results/qwen2.5-coder-1.5b-cpu.json
    python benchmarks/scoring/run.py --output benchmarks/scoring/results/tiny-cpu.json         # a tiny random model

In turn and several times over: the bare forward over all batches as a user of transformers writes it (`model(input_ids,
attention_mask)`, logits of all positions), the smallest forward there is (`logits_to_keep=1`), and the loop of `collm
score`, its files included. Tokens count without padding. A ratio is the median over the repeats of
tokens per second against the bare forward of the same repeat; memory is the peak of the resident set (of the device's
allocator on a GPU) during one pass, weights included. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from collm.data.formatting import format_rows
from collm.data.reading import read_rows
from collm.data.scoring import AssistantSettings, load_scorer, plan_batches, score_batches
from collm.data.tokenizers import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name; without it, a tiny random model on random tokens")
    parser.add_argument("--data", help="JSON lines of GSM8K")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as folder:
        if arguments.model:
            data = read_rows(arguments.data, split=f"train[:{arguments.rows}]")
            rows, _ = format_rows(data, load_tokenizer(arguments.model), task="gsm8k")
            name = arguments.model
        else:
            name, rows = tiny(folder), random_rows(arguments.rows)
        result = measure(name, rows, Path(folder), arguments)

    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "data", "model")}
    settings["model"] = Path(arguments.model).name if arguments.model else "tiny random Llama"
    report = {"settings": settings, "machine": machine(arguments), "results": result}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def measure(name: str, rows: Dataset, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    scorer = load_scorer(AssistantSettings(name, dtype=arguments.dtype), device)
    model = scorer.model  # type: ignore[attr-defined]
    plan = list(enumerate(plan_batches([len(ids) for ids in rows["input_ids"]], arguments.batch_tokens)))

    @torch.inference_mode()
    def forward(batches: list[tuple[int, list[int]]], **options: int) -> None:
        for _, batch in batches:
            model(**padded(rows[batch], device), use_cache=False, **options)

    variants: dict[str, Callable[[list[tuple[int, list[int]]]], None]] = {
        "bare": forward,
        "smallest": lambda batches: forward(batches, logits_to_keep=1),
        "scoring": lambda batches: collections.deque(score_batches(scorer, name, rows, batches, folder), maxlen=0),
    }
    tokens = sum(len(ids) for ids in rows["input_ids"])
    for run in variants.values():
        run(plan[:1])
    rates: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(arguments.repeats):
        for variant in (list(variants) * 2)[repeat % 3 : repeat % 3 + 3]:  # each one first, second, third in turn
            start = time.perf_counter()
            variants[variant](plan)
            synchronise(device)
            rates[variant].append(tokens / (time.perf_counter() - start))
        print(f"repeat {repeat + 1}: " + str({v: round(r[-1], 1) for v, r in rates.items()}), file=sys.stderr)
    peaks = {variant: peak_mib(lambda run=run: run(plan[:1]), device) for variant, run in variants.items()}
    return {
        "tokens": tokens,
        "targets": sum(label != -100 for labels in rows["labels"] for label in labels),
        "batches": len(plan),
        "tokens_per_second": {v: round(statistics.median(r), 1) for v, r in rates.items()},
        "throughput_ratio": ratio(rates, "scoring", "bare"),
        "throughput_ratio_to_smallest": ratio(rates, "scoring", "smallest"),
        "held_mib": round(peak_mib(lambda: None, device), 1),
        "peak_mib": {v: round(p, 1) for v, p in peaks.items()},
        "memory_ratio": round(peaks["scoring"] / peaks["bare"], 3),
        "memory_ratio_to_smallest": round(peaks["scoring"] / peaks["smallest"], 3),
    }


def ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    return round(statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3)


def padded(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    length = max(len(row) for row in batch["input_ids"])
    ids = torch.tensor([row + [0] * (length - len(row)) for row in batch["input_ids"]])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch["input_ids"]])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def tiny(folder: str) -> str:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/tiny")
    return f"{folder}/tiny"


def random_rows(count: int) -> Dataset:
    """Lengths and shares of targets as in GSM8K: about 180 tokens, half of them targets."""
    generator = torch.Generator().manual_seed(0)
    lengths = (120 + 120 * torch.rand(count, generator=generator)).int().tolist()
    ids = [torch.randint(0, 8192, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]}
    )


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(run: Callable[[], None], device: torch.device) -> float:
    """Peak memory while `run` runs, weights included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts anew
    run()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), platform.machine()
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
