"""Speculation against the plain loop, and both against the rivals, on GSM8K prompts at batch 1.

For each prompt, one after the other: the plain loop and speculation; with --ablation also speculation without reading
along (drafting alone); with --rivals also the base alone, the assistant alone, and transformers' assisted generation of
the assistant drafted by the base. No trained head is needed: the entropy router with --cut defers where the base is
unsure. With --cost-ratio the gate drafts as it would for a larger assistant; counts are then what that one would see,
times are not.

    COLLM_DATA=data python -m benchmarks.decoding.speculation --prompts 6 --cut 0.5
"""

from __future__ import annotations

import argparse
import time

import torch

import collm.decoding.generation as generation
import collm.decoding.speculation as speculation
from benchmarks.decoding.common import ASSISTANT, BASE, finish, gsm8k_prompts, load_pair, median, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--cut", type=float, default=0.5, help="entropy (nats) above which the base defers")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--cost-ratio", type=float, help="of an assistant pass in base steps, for the gate")
    parser.add_argument("--seconds", type=float, default=300, help="start no prompt after this")
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--assistant", default=ASSISTANT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="speculation")
    settings = parser.parse_args()
    if settings.cost_ratio:
        generation.step_cost = lambda model: settings.cost_ratio if model is big else 1.0
    base, big, tokenizer = load_pair(settings.base, settings.assistant, settings.device)
    length = {"max_new_tokens": settings.new_tokens, "do_sample": False}
    ours = {**length, "assistant": big, "router": f"entropy:cut={settings.cut}", "return_dict_in_generate": True}
    ways = {
        "plain": lambda ids: base.generate(input_ids=ids, speculate=False, **ours),
        "speculation": lambda ids: base.generate(input_ids=ids, speculate=True, **ours),
    }
    if settings.ablation:
        ways["drafting_alone"] = lambda ids: without_reading_along(lambda: ways["speculation"](ids))
    if settings.rivals:
        ways |= {
            "base": lambda ids: base.generate(input_ids=ids, **length),
            "assistant": lambda ids: big.generate(input_ids=ids, **length),
            "assisted_generation": lambda ids: big.generate(input_ids=ids, assistant_model=base, **length),
        }
    begun = time.perf_counter()
    prompts = gsm8k_prompts(tokenizer, settings.prompts, settings.skip)
    warm = torch.tensor([prompts[0][:16]], device=settings.device)
    for way in ways.values():
        way(warm) if settings.device == "cuda" else None
    rows: list[dict] = []
    for prompt in prompts:
        if time.perf_counter() - begun > settings.seconds:
            break
        rows.append(measure(ways, torch.tensor([prompt], device=settings.device)))
        print({way: round(row["ms_per_token"], 1) for way, row in rows[-1].items()}, flush=True)
    finish(settings.name, vars(settings), summary(rows, list(ways)))


def measure(ways: dict, ids: torch.Tensor) -> dict[str, dict]:
    """One prompt, every way: milliseconds per new token, and what the loop counted."""
    row: dict[str, dict] = {}
    for name, way in ways.items():
        time_taken, out = seconds(lambda way=way: way(ids))
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        new = sequences.shape[1] - ids.shape[1]
        row[name] = {"ms_per_token": 1000 * time_taken / new, "tokens": sequences[0, ids.shape[1] :].tolist()}
        if not isinstance(out, torch.Tensor):
            row[name]["stats"] = out.stats
    return row


def without_reading_along(run):
    kept, speculation.MAX_READ_ALONG = speculation.MAX_READ_ALONG, 0
    try:
        return run()
    finally:
        speculation.MAX_READ_ALONG = kept


def summary(rows: list[dict[str, dict]], ways: list[str]) -> dict:
    result: dict = {"prompts": len(rows)}
    for way in ways:
        result[way] = {
            "ms_per_token": round(median([r[way]["ms_per_token"] for r in rows]), 1),
            "time_over_plain": round(median([r[way]["ms_per_token"] / r["plain"]["ms_per_token"] for r in rows]), 3),
        }
        stats = [r[way]["stats"] for r in rows if "stats" in r[way]]
        if stats:
            tokens, deferrals = (sum(s["new_tokens"] for s in stats), sum(s["deferrals"][0] for s in stats))
            result[way] |= {
                "deferral_rate": round(deferrals / tokens, 3),
                "assistant_passes_per_deferral": round(sum(s["assistant_calls"][0] for s in stats) / deferrals, 3),
                "base_steps_per_token": round(sum(s["base_calls"] for s in stats) / tokens, 3),
                "stand_ins_accepted": round(
                    sum(s["accepted"] for s in stats) / max(1, sum(s["drafted"] for s in stats)), 3
                ),
                "same_tokens_as_plain": sum(r[way]["tokens"] == r["plain"]["tokens"] for r in rows),
            }
    return result


if __name__ == "__main__":
    main()
