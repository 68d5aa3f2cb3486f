"""`TrainArguments`: the one place of every default of training, for Python, the command line and YAML."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from collm.errors import ConfigurationError, did_you_mean

from .solver import DEFAULT_L2
from .zinit import DEFAULT_MAX_TOKENS, check_held_out, check_own_loss, check_weight

DTYPES = ("auto", "float32", "bfloat16", "float16")
GIVEN = {"nargs": "?", "const": True}  # `--option` means true, as for options that are true or false by default


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' `TrainingArguments` and what deferral training adds.

    Defaults that differ from the parent's: `learning_rate` 2e-5, `warmup_steps` 0.04 (a share of all steps) and
    `num_train_epochs` 2 are the paper's recipe; `logging_steps` 1, because deferral is watched step by step;
    `save_total_limit` 2, so that the last good checkpoint survives a failing one; `prediction_loss_only` is true,
    because there are no logits to keep.
    """

    config: str | None = field(
        default=None, metadata={"positional": True, "config": True, "help": "YAML file with any of the options below"}
    )
    # What is trained on what.
    model: str | None = field(
        default=None, metadata={"help": "base to train: Hub name or folder (or a deferral checkpoint, to go on)"}
    )
    data: str | None = field(
        default=None, metadata={"help": "folder that `collm score` wrote; for objective sft also any file it reads"}
    )
    eval_data: str | None = field(default=None, metadata={"help": "a second one, for `eval_strategy`"})
    mode: Literal["full", "head", "lora", "qlora"] = field(
        default="full",
        metadata={"help": "what is trained: all weights, the head on cached features, or adapters and the head"},
    )
    objective: Literal["marginal_likelihood", "weak_supervision", "sft"] = field(
        default="marginal_likelihood",
        metadata={"help": "the paper's objective, its baseline, or plain supervised fine-tuning without a head"},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "of the loaded weights; auto: float32 where all are trained, else the checkpoint's"},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, flash_attention_2, kernels-community/flash-attn3, ..."}
    )
    # The head.
    features: list[str] | None = field(
        default=None, metadata={"help": "what a new head sees: hidden uncertainty unless given; the paper's: hidden"}
    )
    bias: bool | None = field(default=None, metadata={"help": "give a new head a bias", **GIVEN})
    deferral_cost: float = field(
        default=0.2, metadata={"help": "nats per deferred token added to the loss; 0 is the paper"}
    )
    # Z-initialisation.
    z_initialization: bool | None = field(
        default=None, metadata={"help": "start the head from pseudo-labels; unless given, a new one alone", **GIVEN}
    )
    z_method: Literal["a", "b"] = field(
        default="a",
        metadata={"help": 'label "assistant" where the base is wrong and (a) an assistant is right, (b) always'},
    )
    z_ignore_both_wrong: bool = field(default=False, metadata={"help": "leave out tokens that everybody gets wrong"})
    z_positive_weight: str = field(
        default="8", metadata={"help": 'weight of tokens labelled "assistant": a number, balanced or sqrt_balanced'}
    )
    z_max_tokens: int = field(default=DEFAULT_MAX_TOKENS, metadata={"help": "target tokens to solve it on"})
    z_l2: float = field(default=DEFAULT_L2, metadata={"help": "penalty of its logistic regression"})
    # Mode head.
    features_dir: str | None = field(
        default=None, metadata={"help": "where mode head caches features (default: OUTPUT_DIR/features)"}
    )
    head_l2: float = field(default=DEFAULT_L2, metadata={"help": "penalty of the head in mode head"})
    head_held_out: float = field(default=0.1, metadata={"help": "share of the rows that mode head only measures on"})
    # Modes lora and qlora.
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapters, times 1 / rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout in front of the adapters"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "modules that get adapters"}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "also write OUTPUT_DIR/merged, an ordinary checkpoint without adapters"}
    )
    # Objective sft on rows that are not formatted yet.
    task: str | None = field(default=None, metadata={"help": "sft: ready-made format, as in `collm score`"})
    split: str = field(default="train", metadata={"help": "sft: split to read"})
    max_length: int | None = field(default=None, metadata={"help": "sft: cut sequences at this many tokens"})
    chat_template: str | None = field(default=None, metadata={"help": "sft: instead of the tokenizer's"})

    # The parent's fields with defaults of our own.
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate"})
    warmup_steps: float = field(default=0.04, metadata={"help": "warm-up: steps, or a share of all steps below 1"})
    num_train_epochs: float = field(default=2.0, metadata={"help": "passes over the data"})
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps (a share of all below 1)"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    prediction_loss_only: bool = field(default=True, metadata={"help": "evaluate the loss alone"})

    def __post_init__(self) -> None:
        self._changed = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name not in ("config", "hub_token") and getattr(self, option.name) != _default(option)
        }
        # YAML's own spelling; the parent takes a bool or its older option strings.
        if self.fsdp in ("true", "false"):  # type: ignore[has-type]
            self.fsdp = self.fsdp == "true"  # type: ignore[has-type, assignment]
        super().__post_init__()
        for name in ("model", "data"):
            if getattr(self, name) is None:
                raise ConfigurationError(f"`{name}` is missing: give --{name}, or `{name}:` in the YAML file.")
        if self.fsdp and self.use_cpu:
            raise ConfigurationError("accelerate shards on accelerators only: with use_cpu, fsdp would train by DDP.")
        if self.mode == "head" and self.objective == "sft":
            raise ConfigurationError("objective sft trains a model without a head; it cannot go with mode head.")
        if self.mode == "head" and self.eval_data is not None:
            raise ConfigurationError("mode head measures on head_held_out, a share of its rows; leave eval_data away.")
        if self.objective != "sft":
            check_own_loss(self)
        check_weight(self.positive_weight)
        check_held_out(self.head_held_out)
        if self.dtype not in DTYPES:
            raise ConfigurationError(
                f'dtype is "{self.dtype}"; it can be {", ".join(DTYPES)}.{did_you_mean(self.dtype, DTYPES)}'
            )
        if self.merge_adapter and self.mode not in ("lora", "qlora"):
            raise ConfigurationError(f"merge_adapter is for the modes lora and qlora; this is mode {self.mode}.")
        if self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = "all-linear"  # type: ignore[assignment]
        if self.fp16 and self.dtype == "float16":
            raise ConfigurationError("fp16 keeps float32 weights: leave dtype at auto, or take bf16.")

    @property
    def positive_weight(self) -> float | str:
        """`z_positive_weight` as [`~collm.training.zinit.z_initialise`] takes it."""
        try:
            return float(self.z_positive_weight)
        except ValueError:
            return self.z_positive_weight

    def changed(self) -> dict[str, Any]:
        """The options that were given and differ from their defaults, as in a YAML file."""
        return dict(self._changed)


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
