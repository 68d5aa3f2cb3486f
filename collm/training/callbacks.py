"""Callbacks for the stock `Trainer`: what deferral training logs, and when it has to stop."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from collm.errors import TrainingError
from collm.losses import collapse_warning

from .distributed import processes, sum_over_processes
from .targets import deferral_model
from .zinit import check_own_loss, trained_head

logger = logging.getLogger(__name__)


class DeferralLoggingCallback(TrainerCallback):
    """Adds to each training log, means over the target tokens of all processes since the last one:

    - `base_nll`, `assistant_nll` (nats per token): each model's own negative log-likelihood;
    - `deferral_probability`: d_t;
    - `posterior`: the share of the assistant in the posterior of who wrote the tokens;
    - `head_grad_norm`: of the head's gradient in the last step, before clipping.

    With K > 1 assistants, `assistant_nll_1`, `posterior_1`, ... A collapsing head is announced once.

    The Trainer puts users' callbacks behind those of TensorBoard, W&B and the like, which would not see these numbers.
    Put this one in front: `DeferralLoggingCallback.attach(trainer)`.

    Raises:
        ConfigurationError: at the start, where the Trainer's options put another loss in the place of the model's.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._in_forward = False
        self._warned = False

    @classmethod
    def attach(cls, trainer: Trainer) -> DeferralLoggingCallback:
        """Add a new callback of this class in front of all others and return it."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_own_loss(args)
        collm = deferral_model(kwargs["model"])
        collm.take_training_statistics()  # of whatever ran before
        # The loss takes gradients of its chunks in the forward pass, unscaled; those of the backward pass count.
        self._handles.append(collm.register_forward_pre_hook(lambda *_: setattr(self, "_in_forward", True)))
        self._handles.append(collm.register_forward_hook(lambda *_: setattr(self, "_in_forward", False)))
        for name, parameter in trained_head(kwargs["model"]).named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                self._handles.append(parameter.register_hook(lambda gradient, name=name: self._add(name, gradient)))

    def _add(self, name: str, gradient: Tensor) -> None:
        if self._in_forward:
            return
        gradient = gradient.detach().to(torch.float32, copy=True)  # clipping works in place
        self._gradients[name] = self._gradients[name] + gradient if name in self._gradients else gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gradients.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in trained_head(kwargs["model"]).named_parameters():
            if isinstance(parameter.grad, DTensor):  # FSDP2: hooks of sharded parameters do not run
                self._gradients[name] = parameter.grad.full_tensor().float() / processes()[1]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return  # of an evaluation, or the summary at the end
        collm = deferral_model(kwargs["model"])
        statistics = collm.take_training_statistics()
        if not statistics:
            return
        means = self._means(statistics)
        if self._gradients:
            gradient = torch.cat([g.flatten() for g in self._gradients.values()])
            means["head_grad_norm"] = (sum_over_processes(gradient) / processes()[1]).norm().item()
        logs.update(means)
        state.log_history[-1].update(means)
        message = collapse_warning(means["deferral_probability"], collm.config.deferral.deferral_cost)
        if message and not self._warned and collm.config.deferral.objective == "marginal_likelihood":
            self._warned = True
            if state.is_world_process_zero:
                logger.warning(message)

    @staticmethod
    def _means(statistics: dict[str, Tensor]) -> dict[str, float]:
        sums = torch.cat([value.double().reshape(-1) for value in statistics.values()])
        sums = sum_over_processes(sums)
        parts = sums.split([value.numel() for value in statistics.values()])
        values = dict(zip(statistics, parts, strict=True))
        tokens = values.pop("tokens").clamp_min(1)
        means = {}
        for name, value in values.items():
            numbered = len(value) > 1
            for k, mean in enumerate((value / tokens).tolist(), start=1):
                means[f"{name}_{k}" if numbered else name] = mean
        return means

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class StopOnNaNCallback(TrainerCallback):
    """Stops with an error at the first loss that is not a finite number, before its gradient reaches the weights.

    The stock Trainer filters such losses from its logs (`logging_nan_inf_filter`) and trains on.

    Raises:
        TrainingError: in the forward pass; names the step and the last complete checkpoint.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            loss = output.get("loss") if isinstance(output, dict) else None
            if module.training and loss is not None and not torch.isfinite(loss):
                last = last_checkpoint(args.output_dir)
                raise TrainingError(
                    f"the loss is {loss.item()} at step {state.global_step + 1}: training stops before it spoils the "
                    f"weights. {f'The last good checkpoint is {last}.' if last else 'There is no checkpoint yet.'} "
                    "Usual causes: a learning rate that is too high, float16 overflow (take bf16), or scores that are "
                    "not finite; look at `grad_norm` before this step."
                )

        self._handle = kwargs["model"].register_forward_hook(check)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()


class AdapterConfigCallback(TrainerCallback):
    """Writes our config.json into each checkpoint of a PEFT run: it names the base and holds `config.deferral`."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from collm.checkpoints import save_deferral_config

        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            save_deferral_config(deferral_model(kwargs["model"]), folder)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end: the Trainer's state, its last file, can be read."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [(int(folder.name.rpartition("-")[2]), folder) for folder in folders if folder.name[-1].isdigit()]
    for _, folder in sorted(numbered, reverse=True):
        if is_complete(folder):
            return str(folder)
    return None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
