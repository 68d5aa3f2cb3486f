"""Memory and time of one training step: transformers' cross-entropy, ours, and the marginal loss written naively.

    python benchmarks/loss/run.py --layers 24 --dtype float32 --output benchmarks/loss/results/cpu-float32.json

Each variant runs in a process of its own, on random weights and the same made-up batch. A step is forward and backward
without optimiser. Memory is the peak of the resident set between the decoder's output and the end of backward, above
what the process held when the decoder had just returned: weights, their gradient buffers and activations. Where other
programs keep the machine busy, read `cpu_time_ratio` of a run with `--threads 1`. The last line of standard output is
one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = ("transformers", "collm", "naive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="0 leaves embedding, norm and LM head: the loss alone")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--steps", type=int, default=3, help="timed steps, after a short one to warm up; the median is reported"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return

    results = {}
    for variant in arguments.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", variant]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[variant] = json.loads(output.splitlines()[-1])
        print(f"{variant}: {results[variant]}", file=sys.stderr)
    reference = results.get("transformers")
    if reference:
        for result in results.values():
            result["memory_ratio"] = round(result["memory_mib"] / reference["memory_mib"], 3)
            result["time_ratio"] = round(result["seconds"] / reference["seconds"], 3)
            result["cpu_time_ratio"] = round(result["cpu_seconds"] / reference["cpu_seconds"], 3)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "only")}
    report = {"settings": settings, "machine": machine(), "results": results}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def measure(variant: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds and peak memory of a variant's step, and its loss."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import collm

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=arguments.vocabulary, hidden_size=arguments.hidden, intermediate_size=4864,
        num_hidden_layers=arguments.layers, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).train()
    if variant != "transformers":
        model = collm.CoLLMForCausalLM.from_base(model)
    ids = torch.randint(0, arguments.vocabulary, (arguments.batch, arguments.length))
    logprobs = -torch.rand(arguments.batch, arguments.length, 1) * 5

    def loss() -> torch.Tensor:
        if variant == "transformers":
            return model(input_ids=ids, labels=ids, use_cache=False).loss
        if variant == "collm":
            return model(input_ids=ids, labels=ids, assistant_logprobs=logprobs).loss
        out = model(input_ids=ids, use_cache=False)
        base = out.logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        z, assistant = out.deferral_logits[:, :-1].flatten(0, 1), logprobs[:, 1:].flatten(0, 1)
        return collm.marginal_likelihood_loss(base.flatten(), assistant, z)

    held: list[float] = []

    def decoder_is_done(*_: object) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        held.append(memory("VmRSS"))

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradient buffers count as weights
    batch = ids, logprobs
    ids, logprobs = ids[:1, :32], logprobs[:1, :32]  # to warm up
    loss().backward()
    ids, logprobs = batch
    model.base_model.register_forward_hook(decoder_is_done)
    seconds, peaks, value = [], [], 0.0
    for _ in range(arguments.steps):
        model.zero_grad(set_to_none=False)
        start = time.perf_counter(), time.process_time()
        summed = loss()
        summed.backward()
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        peaks.append(memory("VmHWM") - held[-1])
        value = summed.item()
        del summed
    return {
        "seconds": round(statistics.median(wall for wall, _ in seconds), 3),
        "cpu_seconds": round(statistics.median(cpu for _, cpu in seconds), 3),
        "memory_mib": round(statistics.median(peaks), 1),
        "held_mib": round(held[-1], 1),
        "loss": round(value, 5),
    }


def memory(entry: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(entry))
    return int(line.split()[1]) / 1024


def machine() -> dict[str, object]:
    """Where and with what a result was measured."""
    import torch
    import transformers

    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    main()
