"""One batch of N prompts against N runs of one prompt, tokens per second; and the memory beyond models and caches.

COLLM_DATA=data python -m benchmarks.decoding.batching --batch 8
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding.common import batch, finish, gsm8k_prompts, load_pair, median, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cut", type=float, default=0.6)
    parser.add_argument("--ways", nargs="+", choices=("plain", "speculation"), default=["plain", "speculation"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    settings = parser.parse_args()
    base, big, tokenizer = load_pair(device=settings.device)
    prompts = gsm8k_prompts(tokenizer, settings.batch)
    weights = sum(p.numel() * p.element_size() for m in (base, big) for p in m.parameters())

    def run(rows: list[list[int]], speculate: bool) -> Any:
        return base.generate(
            **batch(rows, tokenizer.pad_token_id, settings.device), assistant=big, speculate=speculate, do_sample=False,
            router=f"entropy:cut={settings.cut}", max_new_tokens=settings.new_tokens, eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True,
        )  # fmt: skip

    run(prompts[:1], False)
    ways = {name: name == "speculation" for name in settings.ways}
    peaks, times, out = dict.fromkeys(ways, 0), {name: [] for name in ways}, {}
    for _ in range(settings.repeats):
        for name, speculate in ways.items():
            with Peak() as peak:
                took, out[name] = seconds(lambda speculate=speculate: run(prompts, speculate))
            times[name].append(took)
            peaks[name] = max(peaks[name], peak.bytes)
            print(name, round(took, 2), flush=True)
    results: dict[str, Any] = {}
    for name, speculate in ways.items():
        alone = sum(seconds(lambda p=p, speculate=speculate: run([p], speculate))[0] for p in prompts)
        tokens, together = out[name].stats["new_tokens"], median(times[name])
        caches = sum(cache_bytes(m, sum(map(len, prompts)) + tokens) for m in (base, big))
        results[name] = {
            "tokens_per_second": round(tokens / together, 2),
            "tokens_per_second_alone": round(tokens / alone, 2),
            "times_faster_than_alone": round(alone / together, 2),
            "time_over_first": round(together / median(times[settings.ways[0]]), 3),
            "memory_beyond_models_and_caches": round((peaks[name] - caches) / (weights + caches), 4),
            "stats": {k: v for k, v in out[name].stats.items() if k != "fallback"},
        }
        print(name, results[name], flush=True)
    finish("batching", vars(settings), results)


def cache_bytes(model: Any, tokens: int) -> int:
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * dim
        * tokens
        * next(model.parameters()).element_size()
    )


class Peak:
    """Peak of allocated memory during a block, beyond what was there before: of the GPU, else of the process."""

    def __enter__(self) -> Peak:
        self.running, self.before, self.bytes = True, resident(), 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, resident() - self.before)
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
