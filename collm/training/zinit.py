"""Z-initialisation: the deferral head starts from pseudo-labels of who should write."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import TrainerCallback

from collm.configuration import DeferralConfig
from collm.errors import ConfigurationError, did_you_mean
from collm.losses import deferral_labels, log_deferral_probabilities

from .distributed import from_main_process
from .solver import DEFAULT_L2, Solution, feature_penalties, head_logits, roc_auc, solve_head, solving_device
from .targets import Collator, TargetData, collect_targets, deferral_model

logger = logging.getLogger(__name__)

BALANCES = ("balanced", "sqrt_balanced")
DEFAULT_MAX_TOKENS = 65536


@dataclass
class ZInitialization:
    """What Z-initialisation did; the numbers are from tokens that it did not fit on, where there are enough rows.

    Args:
        tokens (`int`): target tokens used, held-out ones included.
        label_rate (`float`): share of tokens with a label other than 0, among those with a label.
        positive_weight (`list[float]`): weight of the tokens of each assistant (the base's tokens weigh 1).
        auc (`float`): of d_t against the labels; nan where one kind is missing.
        held_out_tokens (`int`): tokens that `auc` was measured on; 0 where it is from the fitted ones.
        scoring_seconds (`float`), solving_seconds (`float`).
        evaluations (`int`): of the loss, by L-BFGS; 0 where the labels were all alike and the head stays as it was.
    """

    tokens: int
    label_rate: float
    positive_weight: list[float]
    auc: float
    held_out_tokens: int
    scoring_seconds: float
    solving_seconds: float
    evaluations: int

    def __str__(self) -> str:
        on = f"{self.held_out_tokens} held-out tokens" if self.held_out_tokens else "the tokens it was fitted on"
        return (
            f"Z-initialisation: {self.tokens} tokens, {self.label_rate:.1%} labelled 'assistant', AUC {self.auc:.3f} "
            f"on {on}, {self.scoring_seconds:.1f} s scoring + {self.solving_seconds:.1f} s solving"
        )


def z_initialise(
    model: Any,
    dataset: Any,
    collator: Collator,
    method: str = "a",
    ignore_both_wrong: bool = False,
    positive_weight: float | str = 8.0,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    l2: float = DEFAULT_L2,
    held_out: float = 0.1,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> ZInitialization:
    """Give the deferral head its starting weights, and the uncertainty features their standardisation.

    1. Score up to `max_tokens` target tokens with the base frozen.
    2. Measure mean and standard deviation of the uncertainty features; they go into `config.deferral`.
    3. Label each token with who should write it, from who is right (see [`~collm.losses.deferral_labels`]).
    4. Solve the weighted logistic regression (multinomial for K > 1) of the labels on the features.
    5. Write the head, the same on every process, whoever holds its parameters (DDP, ZeRO-1/2/3, FSDP2, PEFT).

    Args:
        model ([`CoLLMForCausalLM`], or PEFT, DDP, FSDP around one): its head is overwritten.
        dataset (map-style): scored rows: `input_ids`, `labels`, `assistant_logprobs`, `assistant_correct`.
        collator (callable): rows to a batch, e.g. [`~collm.data.collator.DataCollatorForCoLLM`].
        method (`str`, *optional*, defaults to `"a"`): `"a"` labels tokens where an assistant is right and the base
            wrong; `"b"` all where the base is wrong.
        ignore_both_wrong (`bool`, *optional*, defaults to `False`): leave out tokens that everybody gets wrong.
        positive_weight (`float` or `str`, *optional*, defaults to 8.0): weight of tokens labelled with an assistant, 8
            in the paper's code; `"balanced"` gives each assistant's tokens the base's total weight, `"sqrt_balanced"`
            the square root of that factor.
        max_tokens (`int`, *optional*, defaults to 65536): target tokens to use; `None` for all.
        l2 (`float`, *optional*, defaults to 0.01): penalty on the uncertainty features; ten times as much on the hidden
            state, see [`~collm.training.solver.feature_penalties`].
        held_out (`float`, *optional*, defaults to 0.1): share of the rows that only the AUC is measured on.
        batch_size (`int`, *optional*, defaults to 8): rows of a forward pass.
        seed (`int`, *optional*, defaults to 0): of the choice of rows.

    Returns:
        [`ZInitialization`], the same on every process.

    Raises:
        ConfigurationError: unknown `method` or `positive_weight`, a `held_out` that leaves nothing to fit.
        DataFormatError: the data set is not scored, for another K, or has no target tokens.

    Reference: Shen et al. (2024), section 3.2; the paper's code takes one epoch of AdamW at 2e-5 for step 4.
    """
    collm = deferral_model(model)
    check_weight(positive_weight)
    check_held_out(held_out)

    # 1. Score.
    began = time.perf_counter()
    data = collect_targets(model, dataset, collator, batch_size, max_tokens, seed, progress)
    scored = time.perf_counter()

    # 2. to 4. On the main process, where the data is.
    fitted = None
    if len(data):
        fitted = fit_pseudo_labels(collm, data, method, ignore_both_wrong, positive_weight, l2, held_out)
        fitted[1].scoring_seconds = scored - began

    # 5. Everybody writes the same.
    settings, (solution, report) = from_main_process((dict(collm.config.deferral), fitted))
    copy_standardisation(settings, collm.config.deferral)
    if solution is not None:
        write_head(collm, solution.weight, solution.bias)
    return report


def fit_pseudo_labels(
    collm: Any,
    data: TargetData,
    method: str = "a",
    ignore_both_wrong: bool = False,
    positive_weight: float | str = 8.0,
    l2: float = DEFAULT_L2,
    held_out: float = 0.1,
) -> tuple[Solution | None, ZInitialization]:
    """Steps 2 to 4 of [`z_initialise`] on scored targets: sets the standardisation, solves, writes no head yet."""
    began = time.perf_counter()
    deferral = collm.config.deferral
    fitted, held = data.split(held_out)

    # 2. Standardise.
    if "uncertainty" in deferral.features:
        set_standardisation(deferral, fitted.features[:, -4:])

    # 3. Label.
    labels, held_labels = (
        deferral_labels(part.base_correct, part.assistant_correct, part.assistant_logprobs, method, ignore_both_wrong)
        for part in (fitted, held)
    )
    weights = class_weights(labels, deferral.num_assistants, positive_weight)

    # 4. Solve, and judge on what was held out, where that has labels of both kinds.
    solution = _solve(collm, fitted, labels, weights, l2)
    judged, judged_labels = (held, held_labels) if (held_labels > 0).any() else (fitted, labels)
    auc = float("nan")
    if solution is not None:
        scores = torch.logsumexp(head_logits(judged.features, solution, collm.standardise), -1)
        auc = roc_auc(scores[judged_labels >= 0], judged_labels[judged_labels >= 0] > 0)
    return solution, ZInitialization(
        tokens=len(data),
        label_rate=(labels > 0).sum().item() / max(1, (labels >= 0).sum().item()),
        positive_weight=weights[1:].tolist(),
        auc=auc,
        held_out_tokens=len(judged) if judged is held else 0,
        scoring_seconds=0.0,
        solving_seconds=time.perf_counter() - began,
        evaluations=solution.evaluations if solution else 0,
    )


def _solve(collm: Any, data: TargetData, labels: Tensor, weights: Tensor, l2: float) -> Solution | None:
    present = labels[labels >= 0].unique()
    if len(present) < 2:
        logger.warning(
            "Z-initialisation: all %d labels are %s, so that there is nothing to separate; the head stays as it was.",
            len(labels), "the base" if not (present > 0).any() else "an assistant",
        )  # fmt: skip
        return None
    deferral, device = collm.config.deferral, solving_device(collm.device)
    labels, weights = labels.to(device), weights.to(device, torch.float64)
    total = weights[labels[labels >= 0]].sum()

    def cross_entropy(logits: Tensor, rows: slice) -> Tensor:
        log_pi = log_deferral_probabilities(logits)
        return F.nll_loss(log_pi, labels[rows], weights, ignore_index=-1, reduction="sum") / total

    return solve_head(
        data.features, cross_entropy, deferral.num_assistants,
        feature_penalties(l2, deferral, data.features.shape[1]), deferral.bias,
        prepare=collm.standardise, device=device,
    )  # fmt: skip


def class_weights(labels: Tensor, num_assistants: int, positive_weight: float | str) -> Tensor:
    """Weight of each class, `(K + 1,)` float32; the base's is 1. labels: `(N,)` in -1..K."""
    weights = torch.ones(num_assistants + 1)
    if isinstance(positive_weight, str):
        counts = torch.bincount(labels[labels >= 0], minlength=num_assistants + 1).float()
        weights[1:] = counts[0] / counts[1:].clamp_min(1)
        return weights.sqrt() if positive_weight == "sqrt_balanced" else weights
    weights[1:] = positive_weight
    return weights


def check_weight(positive_weight: float | str) -> None:
    """Raise `ConfigurationError` where `positive_weight` is no weight of [`z_initialise`]."""
    if isinstance(positive_weight, str) and positive_weight not in BALANCES:
        raise ConfigurationError(
            f'positive_weight is "{positive_weight}"; allowed are a number, {", ".join(BALANCES)}.'
            f"{did_you_mean(positive_weight, BALANCES)}"
        )
    if not isinstance(positive_weight, str) and not positive_weight > 0:
        raise ConfigurationError(f"positive_weight is {positive_weight}; it must be greater than 0.")


def check_held_out(held_out: float) -> None:
    """Raise `ConfigurationError` where no row would be left to fit on."""
    if not 0 <= held_out < 1:
        raise ConfigurationError(f"held_out is {held_out}; it is a share of the rows, at least 0 and below 1.")


def check_own_loss(arguments: Any) -> None:
    """Raise `ConfigurationError` where `TrainingArguments` put another loss in the place of the model's own."""
    if arguments.label_smoothing_factor:
        raise ConfigurationError(
            f"label_smoothing_factor is {arguments.label_smoothing_factor}: the Trainer would take a loss of its own, "
            "of which the deferral head learns nothing. Leave it at 0."
        )
    if arguments.use_liger_kernel and (arguments.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        raise ConfigurationError(
            "use_liger_kernel puts a fused cross entropy in the place of the deferral loss. Leave it out, or turn that "
            'off with liger_kernel_config {"fused_linear_cross_entropy": false}.'
        )


def set_standardisation(deferral: DeferralConfig, uncertainty: Tensor) -> None:
    """Measure mean and standard deviation of uncertainty features `(N, 4)` into a `DeferralConfig`."""
    std, mean = torch.std_mean(uncertainty.double(), dim=0, correction=0)
    deferral.uncertainty_mean = mean.tolist()
    deferral.uncertainty_std = torch.where(std > 1e-6, std, 1.0).tolist()


def copy_standardisation(settings: dict[str, Any], deferral: DeferralConfig) -> None:
    """Take over the standardisation that another process measured."""
    deferral.uncertainty_mean = settings["uncertainty_mean"]
    deferral.uncertainty_std = settings["uncertainty_std"]


@torch.no_grad()
def write_head(model: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write the deferral head on this process; every process has to call it with the same values.

    weight: `(K, F)`; bias: `(K,)` or `None`, any float dtype.
    """
    head = trained_head(model)
    for parameter, value in [(head.weight, weight), (head.bias, bias)]:
        if parameter is not None and value is not None:
            _write(parameter, value)


def trained_head(model: Any) -> nn.Linear:
    """The deferral head that is trained: PEFT keeps a copy of it among its `modules_to_save`."""
    head = deferral_model(model).deferral_head
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head


@torch.no_grad()
def has_trained_head(model: Any) -> bool:
    """Whether the deferral head says anything: a new one is exactly zero. Every process has to call it."""
    weight = trained_head(model).weight
    if hasattr(weight, "ds_id"):  # ZeRO-3
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):
            return bool(weight.any())
    return from_main_process(bool(weight.any()))  # FSDP may load the weights there alone


def _write(parameter: Tensor, value: Tensor) -> None:
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):  # FSDP2
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    elif hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.copy_(value)
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        # ZeRO steps a float32 copy that it made before; without this its first step would undo the initialisation.
        safe_set_full_fp32_param(parameter, value.float())


class ZInitializationCallback(TrainerCallback):
    """Runs [`z_initialise`] on the training data before the first step of a stock `Trainer`.

    It leaves the data loader and the random number generators alone, so that a run with it and a run resumed after it
    see the same batches. When the Trainer resumes from a checkpoint, it says so and does nothing: that has a head. With
    more processes each scores its share and all get the same head, under DDP, DeepSpeed ZeRO-1/2/3 and FSDP2.

    ```python
    trainer = Trainer(model, arguments, train_dataset=scored, data_collator=DataCollatorForCoLLM(),
                      callbacks=[ZInitializationCallback()])
    ```

    Args:
        settings: keyword arguments of [`z_initialise`] (`method`, `positive_weight`, `max_tokens`, `l2`, ...).

    Attributes:
        result ([`ZInitialization`] or `None`): what was measured; also in `trainer.state.log_history`.

    Raises:
        ConfigurationError: an unknown `positive_weight`; at the start of training, options of [`z_initialise`] that it
            refuses, and options of the Trainer that put another loss in the place of the model's.
    """

    def __init__(self, **settings: Any) -> None:
        check_weight(settings.get("positive_weight", 1.0))
        self.settings = settings
        self.result: ZInitialization | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_own_loss(args)
        deferral = deferral_model(kwargs["model"]).config.deferral
        if state.global_step > 0:
            logger.warning("Z-initialisation skipped: training resumes at step %d with a head.", state.global_step)
            # The Trainer restores weights and its own state, not config.json.
            for entry in state.log_history:
                if "z_initialization" in entry:
                    copy_standardisation(entry["z_initialization"], deferral)
            return
        loader = kwargs["train_dataloader"]
        settings = {"batch_size": args.per_device_train_batch_size, "progress": not args.disable_tqdm, **self.settings}
        self.result = z_initialise(kwargs["model"], loader.dataset, loader.collate_fn, **settings)
        if state.is_world_process_zero:
            tqdm.write(str(self.result))
        names = ("uncertainty_mean", "uncertainty_std")
        kept = {**asdict(self.result), **{name: deferral[name] for name in names}}
        state.log_history.append({"z_initialization": kept, "step": 0})
