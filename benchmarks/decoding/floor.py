"""The plain loop against its floor: the same forwards of the bare models, timed one by one with nothing around them.

A run of the loop records the shape of every forward (rows, chunk, past). Its floor is the sum of the times of the same
forwards, called bare on transformers' own DynamicCache, filled beforehand. `over_floor` counts the base's forward with
its deferral head, `over_architecture` without, as the architecture has it. Models: the Qwen pair, or with --tiny two
random Llamas of 2 layers, where the time is Python's and not arithmetic's.

    COLLM_DATA=data python -m benchmarks.decoding.floor --batch 1
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig

import collm
from benchmarks.decoding.common import batch, finish, gsm8k_prompts, load_pair, median, seconds
from collm.decoding.cache import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cut", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name")
    settings = parser.parse_args()
    base, big, inputs, router = tiny(settings) if settings.tiny else real(settings)

    def run() -> Any:
        torch.manual_seed(0)  # the random router of the tiny models: the same shapes every time
        return base.generate(
            **inputs, assistant=big, router=router, speculate=False, max_new_tokens=settings.new_tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
        )  # fmt: skip

    shapes = record(run)
    run()
    runs: list[dict[str, float]] = []
    for _ in range(settings.repeats):
        loop, out = seconds(run)
        floor = sum(bare(base if is_base else big, past, sizes) for is_base, past, sizes in shapes)
        architecture = sum(bare(base if is_base else big, past, sizes, head=False) for is_base, past, sizes in shapes)
        per_token = 1000 / out.stats["new_tokens"]
        runs.append({
            "over_floor": loop / floor, "over_architecture": loop / architecture, "loop_ms_per_token": loop * per_token,
            "floor_ms_per_token": floor * per_token, "architecture_ms_per_token": architecture * per_token,
            "deferral_rate": out.stats["deferrals"][0] / out.stats["new_tokens"],
        })  # fmt: skip
        print({name: round(value, 3) for name, value in runs[-1].items()}, flush=True)
    results = {name: round(median([r[name] for r in runs]), 3) for name in runs[0]}
    name = settings.name or f"floor_{'tiny' if settings.tiny else 'pair'}_{settings.batch}"
    finish(name, vars(settings), results)


def real(settings: Any) -> tuple[Any, Any, dict, str]:
    base, big, tokenizer = load_pair(device=settings.device)
    inputs = batch(gsm8k_prompts(tokenizer, settings.batch), tokenizer.pad_token_id, settings.device)
    return base, big, inputs, f"entropy:cut={settings.cut}"


def tiny(settings: Any) -> tuple[Any, Any, dict, str]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    models = [AutoModelForCausalLM.from_config(config).eval().to(settings.device) for _ in range(2)]
    for model in models:
        model.generation_config = GenerationConfig()
    prompts = torch.randint(3, 1000, (settings.batch, 32), device=settings.device)
    return collm.CoLLMForCausalLM.from_base(models[0]), models[1], {"input_ids": prompts}, "random:rate=0.25"


def record(run: Any) -> list[tuple[bool, list[int], list[int]]]:
    """Run the loop and note for each forward whether it was the base's, and each row's past and chunk."""
    shapes = []
    forward = Reader._forward

    def noting(self: Reader, rows: list[int], chunks: list[list[int]], keep: int) -> Any:
        is_base = isinstance(self.model, collm.CoLLMForCausalLM)
        shapes.append((is_base, [self.length.get(row, 0) for row in rows], [len(chunk) for chunk in chunks]))
        return forward(self, rows, chunks, keep)

    Reader._forward = noting  # type: ignore[method-assign]
    try:
        run()
    finally:
        Reader._forward = forward  # type: ignore[method-assign]
    return shapes


@torch.no_grad()
def bare(model: Any, past: list[int], sizes: list[int], head: bool = True) -> float:
    """Seconds of one forward over `sizes` new tokens on a cache of `past` tokens, right-aligned."""
    config, rows, width = model.config, len(past), max(sizes)
    ends = [p + s for p, s in zip(past, sizes, strict=True)]
    before = max(ends) - width
    device, dtype = model.device, next(model.parameters()).dtype
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers if before else 0):
        states = torch.zeros(rows, heads, before, dim, device=device, dtype=dtype)
        cache.update(states, states.clone(), layer)
    ids = torch.ones(rows, width, dtype=torch.long, device=device)
    mask = None
    if min(ends) < max(ends):
        padding = torch.tensor([max(ends) - end for end in ends], device=device)
        mask = (torch.arange(max(ends), device=device) >= padding[:, None]).long()
    arguments = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    if head or not isinstance(model, collm.CoLLMForCausalLM):
        return seconds(lambda: model(**arguments, logits_to_keep=1))[0]
    return seconds(lambda: type(model).base_class.forward(model, **arguments, logits_to_keep=1))[0]


if __name__ == "__main__":
    main()
