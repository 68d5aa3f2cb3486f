"""Z-initialisation: the solved logistic regression against the paper's one epoch of AdamW.

    python benchmarks/zinit/run.py --base org/small --data scored --output benchmarks/zinit/results/NAME.json

Both start from zero and minimise the same weighted loss of the same rows (pseudo-labels "a", positive weight 8); both
are judged on rows held out. `features`: on features that are computed once, L-BFGS for several penalties, `paper` (one
epoch, learning rate 2e-5, linear decay, a step for each batch of rows), and AdamW with a larger learning rate and more
epochs. `whole`: seconds of both procedures with their forward passes. Ours is one pass over the base, which gives
labels and features, and the solution. The paper's is one pass for the labels, then an epoch whose every step runs the
frozen decoder; it is really run, without the LM head, which the paper's trainer computes as well. The last line of
standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from collm import CoLLMForCausalLM
from collm.data.collator import DataCollatorForCoLLM
from collm.data.scoring import load_scored
from collm.losses import deferral_labels, log_joint
from collm.training.cache import cache_targets
from collm.training.solver import DEFAULT_L2, Solution, head_logits, roc_auc, solve_head
from collm.training.targets import TargetData
from collm.training.zinit import set_standardisation

POSITIVE_WEIGHT = 8.0
ADAMW = {
    "paper": (2e-5, 1),
    "adamw, 10 epochs": (2e-5, 10),
    "adamw, lr 1e-3": (1e-3, 1),
    "adamw, lr 1e-3, 10 epochs": (1e-3, 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True, help="folder of `collm score`")
    parser.add_argument("--features-dir", help="keep the features here (default: a temporary folder)")
    parser.add_argument("--rows", type=int, help="use the first rows only")
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step of AdamW, and of a forward pass")
    parser.add_argument("--l2", type=float, nargs="+", default=[0.001, 0.01, 0.1, 1.0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    dataset, scores = load_scored(arguments.data)
    dataset = dataset.select(range(min(arguments.rows or len(dataset), len(dataset))))
    model = CoLLMForCausalLM.from_pretrained(
        arguments.base, num_assistants=len(scores["assistants"]), dtype=arguments.dtype
    ).eval()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.features_dir or temporary
        data = cache_targets(model, dataset, DataCollatorForCoLLM(), folder, arguments.batch_size)
        forward_seconds = time.perf_counter() - began
        epoch_seconds = paper_epoch(model, dataset, data, arguments)
        result = {
            "settings": {
                "base": Path(arguments.base).name,
                "assistants": [Path(assistant["name"]).name for assistant in scores["assistants"]],
                "dtype": arguments.dtype,
                "rows": len(dataset),
                "tokens": len(data),
                "held_out": arguments.held_out,
                "batch_size": arguments.batch_size,
                "positive_weight": POSITIVE_WEIGHT,
            },
            "features": {
                name: compare(model, data, name, arguments)
                for name in ("hidden", "hidden + uncertainty", "uncertainty")
            },
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        solved = {name: lines[f"solved, l2 {DEFAULT_L2:g}"]["seconds"] for name, lines in result["features"].items()}
        result["whole"] = {
            "label_and_feature_pass": round(forward_seconds, 1),
            "paper_epoch_with_forwards": round(epoch_seconds, 1),
            "paper": round(forward_seconds + epoch_seconds, 1),
            **{f"ours, {name}": round(forward_seconds + seconds, 1) for name, seconds in solved.items()},
        }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result))


def compare(model: Any, data: TargetData, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every way to solve it, for one choice of features; K = 1 or more."""
    hidden = data.features.shape[1] - 4
    columns = {"hidden": slice(0, hidden), "uncertainty": slice(hidden, None)}.get(name, slice(None))
    fitted, held = data.split(arguments.held_out)
    set_standardisation(model.config.deferral, fitted.features[:, -4:])
    fitted_features, held_features = (model.standardise(part.features)[:, columns] for part in (fitted, held))
    labels, held_labels = (
        deferral_labels(part.base_correct, part.assistant_correct, part.assistant_logprobs) for part in (fitted, held)
    )

    def judge(head: Solution, seconds: float) -> dict[str, Any]:
        logits = head_logits(held_features, head, torch.Tensor.float)
        joint = log_joint(held.base_logprobs, held.assistant_logprobs, logits)
        return {
            "held_out_weighted_loss": round(weighted_loss(logits, held_labels).item(), 5),
            "fitted_weighted_loss": round(
                weighted_loss(head_logits(fitted_features, head, torch.Tensor.float), labels).item(), 5
            ),
            "held_out_auc": round(roc_auc(torch.logsumexp(logits, -1), held_labels > 0), 4),
            "held_out_marginal_nll": round(-torch.logsumexp(joint, -1).mean().item(), 5),
            "seconds": round(seconds, 2),
        }

    K = data.assistant_logprobs.shape[1]
    lines = {"zero": judge(Solution(torch.zeros(K, fitted_features.shape[1], dtype=torch.float64), None, 0.0, 0), 0.0)}
    total = torch.where(labels > 0, POSITIVE_WEIGHT, 1.0).sum()

    def mean_loss(logits: Tensor, rows: slice) -> Tensor:
        return summed_loss(logits, labels[rows]) / total

    for l2 in arguments.l2:
        began = time.perf_counter()
        head = solve_head(fitted_features, mean_loss, K, l2)
        line = judge(head, time.perf_counter() - began)
        lines[f"solved, l2 {l2:g}"] = {**line, "evaluations": head.evaluations}
        print(name, f"l2 {l2:g}", line, file=sys.stderr)
    for title, (learning_rate, epochs) in ADAMW.items():
        began = time.perf_counter()
        head = train_with_adamw(fitted_features, labels, fitted.rows, K, learning_rate, epochs, arguments.batch_size)
        lines[title] = judge(head, time.perf_counter() - began)
        print(name, title, lines[title], file=sys.stderr)
    return {"label_rate": round((labels > 0).float().mean().item(), 4), "fitted": len(labels), **lines}


def paper_epoch(model: Any, dataset: Any, data: TargetData, arguments: argparse.Namespace) -> float:
    """Seconds of one epoch over the fitted rows as the paper's code trains: the frozen decoder runs in every step."""
    fitted, _ = data.split(arguments.held_out)
    labels = deferral_labels(fitted.base_correct, fitted.assistant_correct, fitted.assistant_logprobs)
    rows, collator = fitted.rows.unique_consecutive().tolist(), DataCollatorForCoLLM()
    weight = torch.zeros(data.assistant_logprobs.shape[1], model.config.hidden_size, requires_grad=True)
    optimiser = torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0)
    began, done = time.perf_counter(), 0
    for start in range(0, len(rows), arguments.batch_size):
        batch = collator([dataset[row] for row in rows[start : start + arguments.batch_size]])
        with torch.no_grad():
            hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        predicting = hidden[:, :-1][batch["labels"][:, 1:] != -100].float()
        optimiser.zero_grad()
        weighted_loss(predicting @ weight.T, labels[done : done + len(predicting)]).backward()
        optimiser.step()
        done += len(predicting)
    assert done == len(labels)
    return time.perf_counter() - began


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    weights = torch.where(labels > 0, POSITIVE_WEIGHT, 1.0).to(logits.dtype)
    return (weights * F.cross_entropy(F.pad(logits, (1, 0)), labels, reduction="none")).sum()


def weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return summed_loss(logits, labels) / torch.where(labels > 0, POSITIVE_WEIGHT, 1.0).sum()


def train_with_adamw(
    features: Tensor, labels: Tensor, rows: Tensor, K: int, learning_rate: float, epochs: int, batch_size: int
) -> Solution:
    """Minibatches of whole rows in a random order, linear decay to zero, no weight decay, float32."""
    weight = torch.zeros(K, features.shape[1], requires_grad=True)
    optimiser = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.0)
    names, counts = rows.unique_consecutive(return_counts=True)
    tokens_of_row = torch.arange(len(rows)).split(counts.tolist())
    steps = epochs * -(-len(names) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(names), generator=generator).split(batch_size):
            tokens = torch.cat([tokens_of_row[i] for i in chosen.tolist()])
            optimiser.zero_grad()
            weighted_loss(features[tokens] @ weight.T, labels[tokens]).backward()
            optimiser.step()
            schedule.step()
    return Solution(weight.detach().double(), None, 0.0, steps)


if __name__ == "__main__":
    main()
