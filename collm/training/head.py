"""Head-only training: the base is frozen, so its features are computed once and the head is a small problem on them."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collm.losses import (
    collapse_warning,
    deferral_labels,
    deferral_probabilities,
    log_joint,
    marginal_likelihood_loss,
    weak_supervision_loss,
)

from .cache import cache_targets
from .distributed import from_main_process, processes
from .solver import DEFAULT_L2, Solution, feature_penalties, head_logits, roc_auc, solve_head, solving_device
from .targets import Collator, TargetData, collect_targets, deferral_model
from .zinit import ZInitialization, check_held_out, check_weight, copy_standardisation, fit_pseudo_labels, write_head

logger = logging.getLogger(__name__)


@dataclass
class HeadTraining:
    """What head-only training reached, on held-out rows (nats per target token).

    Args:
        tokens, held_out_tokens (`int`): target tokens fitted on, and measured on.
        base_nll (`float`), assistant_nll (`list[float]`): negative log-likelihood of each model alone.
        mixture_nll (`float`): of base and assistants together, -log sum_k pi_k P_k; the cost is not in it.
        initial_mixture_nll (`float`): the same with the head that Z-initialisation gave.
        mean_deferral (`float`): mean of d_t.
        auc (`float`): of d_t against labels "a" (an assistant is right and the base is wrong).
        deferral_cost (`float`): c of the objective.
        z_initialization ([`ZInitialization`]): of the start.
        scoring_seconds, solving_seconds (`float`), evaluations (`int`).
    """

    tokens: int
    held_out_tokens: int
    base_nll: float
    assistant_nll: list[float]
    mixture_nll: float
    initial_mixture_nll: float
    mean_deferral: float
    auc: float
    deferral_cost: float
    z_initialization: ZInitialization
    scoring_seconds: float
    solving_seconds: float
    evaluations: int

    def __str__(self) -> str:
        assistants = ", ".join(f"{nll:.4f}" for nll in self.assistant_nll)
        return (
            f"head: held-out nats per token: base {self.base_nll:.4f}, assistant {assistants}, together "
            f"{self.mixture_nll:.4f} (after Z-initialisation {self.initial_mixture_nll:.4f}); mean deferral "
            f"{self.mean_deferral:.3f}, AUC {self.auc:.3f}; {self.tokens} + {self.held_out_tokens} tokens, "
            f"{self.scoring_seconds:.1f} s scoring + {self.solving_seconds:.1f} s solving"
        )


def train_head(
    model: Any,
    dataset: Any,
    collator: Collator,
    cache_dir: str | os.PathLike[str] | None = None,
    method: str = "a",
    ignore_both_wrong: bool = False,
    positive_weight: float | str = 8.0,
    l2: float = DEFAULT_L2,
    held_out: float = 0.1,
    max_iterations: int = 300,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> HeadTraining:
    """Train the deferral head of a frozen base on `config.deferral.objective`, with `config.deferral.deferral_cost`.

    1. Score all target tokens with the base, once; with `cache_dir`, into files that outlive the process.
    2. Z-initialise: the marginal likelihood is not convex in the head, and starts well from the labels' solution.
    3. Minimise the objective over the cached features by L-BFGS.
    4. Measure on the rows that were held out; write the head, the same on every process.

    Args:
        model ([`CoLLMForCausalLM`]): its head is overwritten, nothing else.
        dataset, collator, batch_size, seed: as in [`~collm.training.zinit.z_initialise`].
        cache_dir (`str`, *optional*): folder for the features; default: in memory.
        method, ignore_both_wrong, positive_weight: of the Z-initialisation.
        l2 (`float`, *optional*, defaults to 0.01): penalty of both steps on the uncertainty features; ten times as
            much on the hidden state, see [`~collm.training.solver.feature_penalties`].
        held_out (`float`, *optional*, defaults to 0.1): share of the rows that is only measured on.
        max_iterations (`int`, *optional*, defaults to 300): of L-BFGS.

    Returns:
        [`HeadTraining`], the same on every process.

    Raises:
        ConfigurationError: `held_out` that leaves nothing to fit, unknown `positive_weight` or `method`.
        DataFormatError, ScoreMismatchError: as in [`~collm.training.cache.cache_targets`].
    """
    collm = deferral_model(model)
    check_held_out(held_out)
    check_weight(positive_weight)

    # 1. Features.
    began = time.perf_counter()
    if cache_dir is None:
        data = collect_targets(model, dataset, collator, batch_size, None, seed, progress)
    else:
        data = cache_targets(model, dataset, collator, cache_dir, batch_size, seed, progress)
    seconds = time.perf_counter() - began

    result = None
    if processes()[0] == 0:
        # 2. Start.
        start, z_initialization = fit_pseudo_labels(
            collm, data, method, ignore_both_wrong, positive_weight, l2, held_out
        )
        # 3. Solve.
        began = time.perf_counter()
        fitted, held = data.split(held_out)
        solution = _solve(collm, fitted, start, method, ignore_both_wrong, l2, max_iterations, progress)
        # 4. Measure.
        judged = held if len(held) else fitted
        report = HeadTraining(
            tokens=len(fitted),
            held_out_tokens=len(held),
            base_nll=-judged.base_logprobs.mean().item(),
            assistant_nll=(-judged.assistant_logprobs.clamp_min(-1e4).mean(0)).tolist(),
            **_measure(collm, judged, solution),
            initial_mixture_nll=_measure(collm, judged, start)["mixture_nll"] if start else float("nan"),
            deferral_cost=collm.config.deferral.deferral_cost,
            z_initialization=z_initialization,
            scoring_seconds=seconds,
            solving_seconds=time.perf_counter() - began + z_initialization.solving_seconds,
            evaluations=solution.evaluations,
        )
        message = collapse_warning(report.mean_deferral, report.deferral_cost)
        if message and collm.config.deferral.objective == "marginal_likelihood":
            logger.warning(message)
        result = solution, report, dict(collm.config.deferral)

    solution, report, settings = from_main_process(result)
    copy_standardisation(settings, collm.config.deferral)
    write_head(collm, solution.weight, solution.bias)
    return report


def _solve(
    collm: Any,
    data: TargetData,
    start: Solution | None,
    method: str,
    ignore_both_wrong: bool,
    l2: float,
    max_iterations: int,
    progress: bool,
) -> Solution:
    deferral, device, N = collm.config.deferral, solving_device(collm.device), len(data)
    base, assistants = data.base_logprobs.to(device), data.assistant_logprobs.to(device)
    labels = deferral_labels(
        data.base_correct, data.assistant_correct, data.assistant_logprobs, method, ignore_both_wrong
    ).to(device)

    def objective(logits: Tensor, rows: slice) -> Tensor:
        if deferral.objective == "weak_supervision":
            return weak_supervision_loss(base[rows], logits, labels[rows], num_items_in_batch=N)
        return marginal_likelihood_loss(base[rows], assistants[rows], logits, deferral.deferral_cost, N)

    return solve_head(
        data.features, objective, deferral.num_assistants,
        feature_penalties(l2, deferral, data.features.shape[1]), deferral.bias,
        start=start,
        prepare=collm.standardise, device=device, max_iterations=max_iterations,
        progress="head" if progress else None,
    )  # fmt: skip


def _measure(collm: Any, data: TargetData, head: Solution) -> dict[str, float]:
    logits = head_logits(data.features, head, collm.standardise)
    joint = log_joint(data.base_logprobs, data.assistant_logprobs, logits)
    deferred = 1 - deferral_probabilities(logits)[:, 0]
    labels = deferral_labels(data.base_correct, data.assistant_correct, data.assistant_logprobs, "a")
    return {
        "mixture_nll": -torch.logsumexp(joint, -1).mean().item(),
        "mean_deferral": deferred.mean().item(),
        "auc": roc_auc(torch.logsumexp(logits, -1), labels > 0),
    }
