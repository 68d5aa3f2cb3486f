"""Who should be asked? Ways to decide, compared on text that is there, before anything is generated.

    python benchmarks/quality/routers.py --base org/small --data scored --features-dir features --output result.json

The text is the assistant's own (`collm score` of its solutions). Followed from the left, the pair writes this text as
long as it asks wherever the base's first choice is another token. So a way to decide is judged by what it finds at a
given share of tokens: `found`, the share of those places, and `whole`, the share of texts of which it finds all. Every
row is held out once (`--folds`); thresholds are those of the held-out rows, so that all rates are exact. `random` is
what asking at random finds: the rate itself.

Rows of the result: what a base offers untrained (entropy, largest probability); Z-initialisation alone for several
features, penalties and weights, and smoothed over tokens; marginal likelihood with several deferral costs; weak
supervision; a head with a hidden layer.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collm import CoLLMForCausalLM
from collm.data.collator import DataCollatorForCoLLM
from collm.data.scoring import load_scored
from collm.losses import deferral_labels, marginal_likelihood_loss, weak_supervision_loss
from collm.training.cache import cache_targets
from collm.training.solver import DEFAULT_L2, HIDDEN_PENALTY, Solution, head_logits, roc_auc, solve_head
from collm.training.targets import TargetData
from collm.training.zinit import set_standardisation

RATES = (0.1, 0.2, 0.3, 0.5)
Fit = Callable[[TargetData, TargetData], Tensor]  # fitted rows, held-out rows -> score of each held-out token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True, help="folder of `collm score`")
    parser.add_argument("--features-dir", required=True, help="features that `collm train` has cached")
    parser.add_argument("--batch-size", type=int, default=8, help="as that cache was made with")
    parser.add_argument("--seed", type=int, default=42, help="likewise; that of `collm train`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    dataset, scores = load_scored(arguments.data)
    model = CoLLMForCausalLM.from_pretrained(
        arguments.base, dtype=arguments.dtype, deferral={"features": ["hidden", "uncertainty"]}
    ).eval()
    data = cache_targets(
        model, dataset, DataCollatorForCoLLM(), arguments.features_dir, arguments.batch_size, arguments.seed
    )
    folds = np.random.default_rng(0).permutation(int(data.rows.max()) + 1) % arguments.folds
    result: dict[str, Any] = {
        "settings": {
            "base": Path(arguments.base).name,
            "assistants": [Path(assistant["name"]).name for assistant in scores["assistants"]],
            "rows": len(dataset),
            "tokens": len(data),
            "folds": arguments.folds,
        },
        "base_differs": (~data.base_correct).float().mean().item(),
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "routers": {},
    }
    if arguments.output and arguments.output.is_file():  # a run that was killed goes on
        found = json.loads(arguments.output.read_text(encoding="utf-8"))
        if found["settings"] == result["settings"]:
            result["routers"] = found["routers"]
    for name, fit in routers(model).items():
        if name in result["routers"]:
            continue
        began = time.perf_counter()
        result["routers"][name] = line = judge(fit, data, folds)
        print(
            f"{name:58} AUC {line['auc']:.3f}  found "
            + "  ".join(f"{rate:.0%}: {line['found'][str(rate)]:.3f}" for rate in RATES)
            + "  whole "
            + "  ".join(f"{line['whole'][str(rate)]:.3f}" for rate in RATES)
            + f"  {time.perf_counter() - began:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def judge(fit: Fit, data: TargetData, folds: np.ndarray) -> dict[str, Any]:
    """Cross-validated: what a way to decide finds of the places where the base's choice differs from the text."""
    fold_of = torch.from_numpy(folds)[data.rows]
    scores = torch.zeros(len(data), dtype=torch.float64)
    for fold in range(int(folds.max()) + 1):
        held = fold_of == fold
        raw = fit(data[~held], data[held]).double()
        # Folds have scores of their own: compared by rank within the fold.
        scores[held] = raw.argsort().argsort().double() / len(raw)
    differs = ~data.base_correct
    found, whole = {}, {}
    for rate in RATES:
        asked = scores >= torch.quantile(scores.float(), 1 - rate)
        found[str(rate)] = (asked & differs).sum().item() / differs.sum().item()
        missed = torch.zeros(len(folds)).index_add_(0, data.rows, (differs & ~asked).float())
        whole[str(rate)] = (missed[data.rows.unique()] == 0).float().mean().item()
    return {"auc": roc_auc(scores, differs), "found": found, "whole": whole}


def routers(model: Any) -> dict[str, Fit]:
    """Everything that is compared."""

    def plain(column: int, sign: int) -> Fit:
        return lambda fitted, held: sign * held.features[:, column - 4]

    named: dict[str, Fit] = {
        "untrained: entropy": plain(0, 1),
        "untrained: largest probability": plain(2, -1),
    }
    both = "hidden + uncertainty"
    for penalty in (1.0, 10.0, 100.0):
        named[f"Z-initialisation, {both}, hidden penalty x{penalty:g}"] = trained(model, both, penalty)
    named["Z-initialisation, uncertainty"] = trained(model, "uncertainty")
    named["Z-initialisation, hidden"] = trained(model, "hidden")
    named[f"Z-initialisation, {both}, l2 0.1"] = trained(model, both, l2=0.1)
    named[f"Z-initialisation, {both}, weight 1"] = trained(model, both, weight=1.0)
    named[f"Z-initialisation, {both}, both wrong ignored"] = trained(model, both, ignore_both_wrong=True)
    for share in (0.25, 0.5):
        named[f"Z-initialisation, {both}, {share:.0%} of the texts"] = trained(model, both, share=share)
    for decay in (0.25, 0.5):
        named[f"moving average {decay:g} of Z-initialisation, {both}"] = smoothed(trained(model, both), decay)
    for features, cost in (
        ("uncertainty", 0.2),
        ("hidden", 0.2),
        ("hidden", 0.0),
        (both, 0.0),
        (both, 0.2),
        (both, 0.5),
    ):
        named[f"marginal likelihood, {features}, c {cost:g}"] = trained(model, features, cost=cost)
    named["weak supervision, hidden"] = trained(model, "hidden", weak_supervision=True)
    named[f"weak supervision, {both}"] = trained(model, both, weak_supervision=True)
    named[f"hidden layer of 32, {both}, c 0.2"] = hidden_layer(model, 32, 0.2)
    return named


def standardised(model: Any, fitted: TargetData, held: TargetData, features: str) -> tuple[Tensor, Tensor]:
    """Both parts' features as the head reads them, standardised by the fitted part."""
    hidden = fitted.features.shape[1] - 4
    columns = {"hidden": slice(0, hidden), "uncertainty": slice(hidden, None)}.get(features, slice(None))
    set_standardisation(model.config.deferral, fitted.features[:, -4:])
    return model.standardise(fitted.features)[:, columns], model.standardise(held.features)[:, columns]


def trained(
    model: Any,
    features: str,
    hidden_penalty: float = HIDDEN_PENALTY,
    l2: float = DEFAULT_L2,
    weight: float = 8.0,
    ignore_both_wrong: bool = False,
    cost: float | None = None,
    weak_supervision: bool = False,
    share: float = 1.0,
) -> Fit:
    """The linear head: Z-initialised, and from there trained on the marginal likelihood with a `cost`, or on the labels
    with weak supervision; on all texts or on the first `share` of them."""

    def fit(fitted: TargetData, held: TargetData) -> Tensor:
        texts = fitted.rows.unique()
        fitted = fitted[torch.isin(fitted.rows, texts[: round(share * len(texts))])]
        own, others = standardised(model, fitted, held, features)
        labels = deferral_labels(
            fitted.base_correct, fitted.assistant_correct, fitted.assistant_logprobs, "a", ignore_both_wrong
        )
        weights = torch.where(labels > 0, weight, 1.0) * (labels >= 0)
        total = weights.sum()

        def cross_entropy(logits: Tensor, rows: slice) -> Tensor:
            log_odds, target = logits[:, 0], (labels[rows] > 0).double()
            loss = F.binary_cross_entropy_with_logits(log_odds, target, reduction="none")
            return (loss * weights[rows]).sum() / total

        def marginal(logits: Tensor, rows: slice) -> Tensor:
            return marginal_likelihood_loss(
                fitted.base_logprobs[rows], fitted.assistant_logprobs[rows], logits, cost, len(fitted)
            )

        def weak(logits: Tensor, rows: slice) -> Tensor:
            base, count = fitted.base_logprobs[rows], len(fitted)
            return weak_supervision_loss(base, logits, labels[rows], num_items_in_batch=count)

        penalties = torch.full((own.shape[1],), l2, dtype=torch.float64)
        if "hidden" in features:
            penalties[: fitted.features.shape[1] - 4] *= hidden_penalty
        head: Solution = solve_head(own, cross_entropy, 1, penalties)
        if weak_supervision:
            head = solve_head(own, weak, 1, penalties, start=head)
        if cost is not None:
            head = solve_head(own, marginal, 1, penalties, start=head)
        return head_logits(others, head, torch.Tensor.float)[:, 0]

    return fit


def smoothed(fit: Fit, decay: float) -> Fit:
    """The router `ema` over a fitted head."""

    def both(fitted: TargetData, held: TargetData) -> Tensor:
        d = torch.sigmoid(fit(fitted, held))
        for t in range(1, len(d)):
            if held.rows[t] == held.rows[t - 1]:
                d[t] = decay * d[t - 1] + (1 - decay) * d[t]
        return d

    return both


def hidden_layer(model: Any, width: int, cost: float, epochs: int = 5) -> Fit:
    """A head with one hidden layer, by AdamW on the marginal likelihood: an experiment, no option of the library."""

    def fit(fitted: TargetData, held: TargetData) -> Tensor:
        own, others = standardised(model, fitted, held, "hidden + uncertainty")
        scale = own.pow(2).mean(0).sqrt().clamp_min(1e-6)
        own, others = own / scale, others / scale
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(own.shape[1], width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, 1))
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.1)
        for _ in range(epochs):
            for rows in torch.randperm(len(own)).split(256):
                loss = marginal_likelihood_loss(
                    fitted.base_logprobs[rows], fitted.assistant_logprobs[rows], net(own[rows]), cost, len(rows)
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        net.eval()
        with torch.inference_mode():
            return net(others)[:, 0]

    return fit


if __name__ == "__main__":
    main()
