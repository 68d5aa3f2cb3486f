"""Score, initialise, train the head, generate: Co-LLM on GSM8K with a frozen base, on two cores.

    python examples/gsm8k/run.py --base Qwen/Qwen2.5-Coder-0.5B-Instruct \\
        --assistant Qwen/Qwen2.5-Coder-1.5B-Instruct --questions gsm8k/dev.jsonl

Targets are the assistant's own correct solutions (`solutions.jsonl`, from solve.py), or with `--targets reference` the
data set's. Every stage keeps its work in --work and is skipped, or gone on with, in the next run. The result is
results/<targets>.json, with coloured generations as text and as a page beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from solve import INSTRUCTION
from transformers import AutoModelForCausalLM, AutoTokenizer

from collm import CoLLMForCausalLM, DeferralConfig
from collm.data.collator import DataCollatorForCoLLM
from collm.data.formatting import format_rows
from collm.data.reading import read_rows
from collm.data.scoring import AssistantSettings, score_dataset
from collm.data.tasks import gsm8k as reference
from collm.evaluation.metrics import gsm8k
from collm.reporting.html import token_view, write_page
from collm.reporting.terminal import color_tokens
from collm.reporting.view import TokenView
from collm.training.cache import cache_targets
from collm.training.head import HeadTraining, train_head

HERE = Path(__file__).parent
# What the table compares: what the head sees, and the price of a deferred token in nats.
ABLATIONS = [
    (features, cost)
    for features in (["hidden", "uncertainty"], ["hidden"])  # the paper's: hidden
    for cost in (0.2, 0.0)  # the paper's: 0
]
CHOSEN = (["hidden", "uncertainty"], 0.2)
L2 = 1e-3


def main() -> None:
    arguments = parse()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    dataset, report = format_rows(read_rows(training_rows(arguments)), tokenizer)

    # 1. The assistant's log-probabilities of every target token.
    settings = [AssistantSettings(arguments.assistant, "bfloat16")]
    scored = score_dataset(dataset, tokenizer, settings, arguments.work / arguments.targets, 2048, report)

    # 2. The head, once for each ablation; the base reads the text once for each choice of features.
    collator, table, kept = DataCollatorForCoLLM(tokenizer.pad_token_id), [], None
    for features, cost in ABLATIONS:
        model = load(arguments, features, cost)
        cache = arguments.work / f"{arguments.targets}-{'-'.join(features)}"
        trained = train_head(model, scored, collator, cache, l2=L2, held_out=arguments.held_out)
        print(f"{'+'.join(features):20} c = {cost}: {trained}", flush=True)
        table.append({"features": features, **asdict(trained)})
        if (features, cost) == CHOSEN:
            kept = model, trained, cache
    assert kept is not None
    model, trained, cache = kept

    # 3. A threshold for the asked share of tokens, from the training text (`collm calibrate` does this on what the pair
    #    writes), and a checkpoint of a few kilobytes.
    targets = cache_targets(model, scored, collator, cache)
    probabilities = torch.sigmoid(model.deferral_head(model.standardise(targets.features))).flatten()
    model.config.deferral.threshold = float(probabilities.quantile(1 - arguments.rate))
    model.save_pretrained(arguments.work / f"checkpoint-{arguments.targets}")

    # 4. A few answers.
    answers = generate(arguments, model, tokenizer)
    write(arguments, report, model, trained, table, answers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="Hub name or folder")
    parser.add_argument("--assistant", required=True, help="Hub name or folder; the base's tokenizer")
    parser.add_argument("--questions", required=True, type=Path, help="GSM8K questions to answer, apart from training")
    parser.add_argument("--targets", choices=("assistant", "reference"), default="assistant")
    parser.add_argument("--solutions", type=Path, default=HERE / "solutions.jsonl")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of problems that is only measured on")
    parser.add_argument("--rate", type=float, default=0.2, help="share of tokens to defer")
    parser.add_argument("--answers", type=int, default=6, help="how many questions to answer")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="scores, features, checkpoint")
    return parser.parse_args()


def training_rows(arguments: argparse.Namespace) -> str:
    """JSON lines of conversations: what the assistant solved rightly, or the same problems with reference solutions."""
    solved = [json.loads(line) for line in arguments.solutions.read_text(encoding="utf-8").splitlines()]
    rows = [{"messages": row["messages"]} for row in solved if row["correct"]]
    if arguments.targets == "reference":
        rows = []
        for row in solved:
            answer = reference({"question": "", "answer": row["answer"]})["completion"]
            rows.append({"messages": [row["messages"][0], {"role": "assistant", "content": answer}]})
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = arguments.work / f"{arguments.targets}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(arguments: argparse.Namespace, features: list[str], cost: float) -> CoLLMForCausalLM:
    deferral = DeferralConfig(assistants=[arguments.assistant], features=features, deferral_cost=cost)
    return CoLLMForCausalLM.from_pretrained(arguments.base, deferral=deferral, dtype=torch.bfloat16)


def generate(arguments: argparse.Namespace, model: CoLLMForCausalLM, tokenizer) -> list[dict]:
    assistant = AutoModelForCausalLM.from_pretrained(arguments.assistant, dtype=torch.bfloat16)
    rows = [json.loads(line) for line in arguments.questions.read_text(encoding="utf-8").splitlines()]
    answers = []
    for row in rows[: arguments.answers]:
        asked = [{"role": "user", "content": f"{row['question'].strip()}\n{INSTRUCTION}"}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(
            **inputs, assistant=assistant, do_sample=False, repetition_penalty=1.0, max_new_tokens=512,
            return_dict_in_generate=True,
        )  # fmt: skip
        ids = out.sequences[0, inputs["input_ids"].shape[1] :]
        view = TokenView.from_ids(
            tokenizer, ids.tolist(), out.source[0], out.deferral_probs[0], title=row["question"],
            names=[Path(arguments.base).name, Path(arguments.assistant).name],
        )  # fmt: skip
        score = gsm8k(row, tokenizer.decode(ids, skip_special_tokens=True), len(ids) == 512)
        correct = bool(next(iter(score.values.values())))
        view.note = f"answer {score.answer}, {'right' if correct else 'wrong'}"
        print(f"\n{color_tokens(view)}\n{view.note}", flush=True)
        answers.append({"view": view, "correct": correct, "deferred": view.deferred() / len(view.tokens)})
    return answers


def write(arguments, report, model, trained: HeadTraining, table: list[dict], answers: list[dict]) -> None:
    deferred = sum(a["view"].deferred() for a in answers) / sum(len(a["view"].tokens) for a in answers)
    result = {
        "command": f"python examples/gsm8k/run.py --targets {arguments.targets}",
        "base": Path(arguments.base).name,
        "assistant": Path(arguments.assistant).name,
        "targets": arguments.targets,
        "data": asdict(report),
        "held_out_rows": arguments.held_out,
        "l2": L2,
        "chosen": asdict(trained),
        "threshold": model.config.deferral.threshold,
        "asked_rate": arguments.rate,
        "answers": {"count": len(answers), "right": sum(a["correct"] for a in answers), "deferred": deferred},
        "ablations": table,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "transformers", "collm")},
    }
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    views = [answer["view"] for answer in answers]
    (folder / f"{arguments.targets}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plain = "\n\n".join(f"{view.title}\n\n{color_tokens(view, color=False)}\n{view.note}" for view in views)
    (folder / f"{arguments.targets}.txt").write_text(plain + "\n", encoding="utf-8")
    write_page(folder / f"{arguments.targets}.html", "GSM8K, written by two models", *map(token_view, views))
    print(json.dumps({key: result[key] for key in ("targets", "threshold", "answers")}))


if __name__ == "__main__":
    main()
