"""How far should speculation draft? Recorded deferrals replayed against settings of the gate, seconds each.

    python -m benchmarks.decoding.gate --texts sweep/texts/entropy-0.2.jsonl --data gsm8k/dev.jsonl --trace trace.json

The trace has, for every token of texts that a pair wrote (`collm sweep` keeps them), whether the assistant wrote it,
the base's probability of its own choice, and whether that choice was the token: one reading by the base, kept in
--trace. The replay drafts with the library's `DraftGate`, counts base steps and assistant passes, and puts prices on
them, in milliseconds as measured on this machine: a base step alone and with tokens read along, an assistant pass and
each token in it. What is drafted behind a wrong stand-in is taken to defer as often as the text does. The rows "none
right" answer for two models that never agree: there, drafting can only lose.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import collm.decoding.speculation as speculation
from benchmarks.decoding.common import BASE, MODELS, finish
from collm.decoding.speculation import DraftGate

Token = tuple[int, float, int]  # source, the base's probability of its choice, whether that was the token
FAST = (0.15, 0.25, 0.3, 0.35, 0.55, 0.65, 0.75, 0.8, 0.9, 0.95, 8.0, 2.0)  # what the gate had before
STEP, STEP_WITH_MORE, PASS, PASS_TOKEN = 95.0, 113.0, 175.0, 7.5
SAVED = 0.35  # of the base's steps, by reading along
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
RESUMED = 0.25  # of the tokens discarded, written after all and read along


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="of a sweep, one collaborative run")
    parser.add_argument("--data", help="its problems")
    parser.add_argument("--limit", type=int, default=44, help="texts")
    parser.add_argument("--tokens", type=int, default=128, help="of each text, for the replay")
    parser.add_argument("--instruction", default=INSTRUCTION)
    parser.add_argument("--base", default=str(MODELS / BASE))
    parser.add_argument("--trace", type=Path, required=True)
    settings = parser.parse_args()
    if not settings.trace.is_file():
        settings.trace.write_text(json.dumps(record(settings)))
    texts = [[tuple(token) for token in text[: settings.tokens]] for text in json.loads(settings.trace.read_text())]
    none_right = [[(s, p, 0 if s else right) for s, p, right in text] for text in texts]
    asked = [right for text in texts for s, _, right in text if s]
    results: dict[str, Any] = {
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "deferred": round(len(asked) / sum(map(len, texts)), 3),
        "stand_ins_right": round(sum(asked) / len(asked), 3),
    }
    now = (*speculation.PRIOR_ACCEPTANCE, speculation.SHAPE_WEIGHT, speculation.LEVEL_WEIGHT)
    for name, constants in (("learns_fast", FAST), ("gate", now)):
        *prior, shape, level = constants
        speculation.PRIOR_ACCEPTANCE = tuple(prior)
        speculation.SHAPE_WEIGHT, speculation.LEVEL_WEIGHT = shape, level
        for ratio in (2.5, 4.0, 6.0):
            results[f"{name}, cost ratio {ratio:g}"] = replay(texts, ratio)
        results[f"{name}, cost ratio 4, none right"] = replay(none_right, 4.0)
    for name, counts in results.items():
        print(f"{name:40}", counts)
    shown = {key: value for key, value in vars(settings).items() if key in ("limit", "tokens")}
    finish("gate", shown, results)


def record(settings: argparse.Namespace) -> list[list[Token]]:
    """Read texts with the base."""
    from transformers import AutoModelForCausalLM

    from collm.data.tokenizers import load_tokenizer
    from collm.evaluation.options import DataOptions

    data = DataOptions(settings.data, "gsm8k", instruction=settings.instruction)
    prompts = {problem.id: problem.prompt_ids for problem in data.problems(load_tokenizer(settings.base))}
    model = AutoModelForCausalLM.from_pretrained(settings.base, dtype=torch.bfloat16).eval()
    lines = [json.loads(line) for line in settings.texts.read_text(encoding="utf-8").splitlines()[1:]]
    trace = []
    for line in lines[: settings.limit]:
        prompt, text = prompts[line["id"]], line["token_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].float()
        probability, choice = logits.softmax(-1).max(-1)
        right = (choice == torch.tensor(text)).int()
        trace.append(list(zip(line["source"], probability.tolist(), right.tolist(), strict=True)))
    return trace


def replay(texts: list[list[Token]], ratio: float) -> dict[str, float]:
    """Counts, and time over that of the plain loop, of drafting through the texts with a gate of this cost ratio."""
    plain = spent = passes = steps = 0.0
    token_cost = STEP_WITH_MORE * (1 - SAVED)
    for text in texts:
        last = 0
        for i, (source, _, _) in enumerate(text):
            plain += STEP
            if source:
                plain, last = plain + PASS + PASS_TOKEN * (i + 1 - last), i + 1
        gate, start, read = DraftGate(ratio, saved=0.0), 0, 0
        while start < len(text):
            waiting, survival, end = [], 1.0, start
            while end < len(text):  # draft until the gate shuts
                source, probability, _ = text[end]
                if source:
                    waiting.append(end)
                    survival *= gate.acceptance(probability)
                    if not gate.is_open(survival):
                        break
                end += 1
            end = min(end, len(text) - 1)
            steps += (end + 1 - start) * (1 - SAVED)
            spent += (end + 1 - start) * token_cost
            if not waiting:
                break
            passes, spent = passes + 1, spent + PASS + PASS_TOKEN * max(end + 1 - read, 1)
            wrong = next((at for at in waiting if not text[at][2]), None)
            for at in waiting:
                if wrong is None or at <= wrong:
                    gate.record(text[at][1], bool(text[at][2]))
            if wrong is None:
                spent, read, after = spent - 0.9 * token_cost, end + 1, end + 1  # the next token is known
            else:
                spent, read, after = spent - RESUMED * (end - wrong) * token_cost, wrong, wrong + 1
            gate.tokens += after - start
            gate.deferrals += sum(source > 0 for source, _, _ in text[start:after])
            start = after
    deferred = sum(source > 0 for text in texts for source, _, _ in text)
    tokens = sum(map(len, texts))
    return {
        "time_over_plain": round(spent / plain, 3),
        "assistant_passes_per_deferral": round(passes / deferred, 3),
        "base_steps_per_token": round(steps / tokens, 3),
    }


if __name__ == "__main__":
    main()
