"""What the frozen base says about target tokens, collected once: all that initialising or training the head needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm import tqdm

from collm.errors import DataFormatError, UnsupportedModelError
from collm.modeling import CoLLMForCausalLM

from .distributed import gather_rows, processes

Collator = Callable[[list[Any]], dict[str, Tensor]]


@dataclass
class TargetData:
    """N target tokens as the deferral head sees them; F features, K assistants; on the CPU.

    Args:
        features (`torch.Tensor` of shape `(N, F)`, float32): what the head reads, uncertainty not yet standardised.
        base_logprobs (`torch.Tensor` of shape `(N,)`, float32): log P_0(x_t | x_<t), nats.
        base_correct (`torch.Tensor` of shape `(N,)`, bool): whether the base's argmax is the target.
        assistant_logprobs (`torch.Tensor` of shape `(N, K)`, float32): log P_k(x_t | x_<t), nats.
        assistant_correct (`torch.Tensor` of shape `(N, K)`, bool): whether assistant k's argmax is the target.
        rows (`torch.Tensor` of shape `(N,)`, long): the row of the data set that the token is from.
    """

    features: Tensor
    base_logprobs: Tensor
    base_correct: Tensor
    assistant_logprobs: Tensor
    assistant_correct: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Tensor | slice) -> TargetData:
        return TargetData(**{name: column[chosen] for name, column in self.columns().items()})

    def columns(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def concatenate(cls, parts: Sequence[TargetData]) -> TargetData:
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)})

    def split(self, held_out: float) -> tuple[TargetData, TargetData]:
        """All but the last `held_out` share of the rows, in their random order, and that share.

        Both are views: memory-mapped features stay on disk.
        """
        counts = self.rows.unique_consecutive(return_counts=True)[1]
        tokens = int(counts[: len(counts) - int(len(counts) * held_out)].sum())
        return self[:tokens], self[tokens:]


def collect_targets(
    model: Any,
    dataset: Any,
    collator: Collator,
    batch_size: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TargetData:
    """Score up to `max_tokens` target tokens of a scored data set with the base frozen.

    1. Take the rows in a random order that depends on `seed` alone: neither a data loader nor the random number
       generators of the training move.
    2. Each process scores its own batch; all make the same number of forward passes (ZeRO-3 and FSDP need that).
    3. The results come together on the main process.

    Args:
        model ([`CoLLMForCausalLM`], or PEFT, DDP, FSDP around one): neither its weights nor its training mode change.
        dataset (map-style): rows with `input_ids`, `labels`, `assistant_logprobs` and `assistant_correct`.
        collator (callable): rows to a batch, e.g. [`~collm.data.collator.DataCollatorForCoLLM`].
        batch_size (`int`, *optional*, defaults to 8): rows of one forward pass of one process.
        max_tokens (`int`, *optional*): stop after the batch that reaches this many tokens, all processes together.

    Returns:
        [`TargetData`]; an empty one on processes other than the main one.

    Raises:
        DataFormatError: the rows are not scored, for another number of assistants, or have no target tokens.
    """
    rank, world = processes()
    # 1. One order for all processes, cut into rounds of one batch for each.
    order = row_order(len(dataset), seed)
    rounds = [order[i : i + batch_size * world] for i in range(0, len(order), batch_size * world)]
    bar = tqdm(total=max_tokens, unit="tok", desc="base scores targets", disable=not progress or rank > 0)
    parts: list[TargetData] = []
    tokens = 0
    with frozen(model), bar:
        for rows in rounds:
            # 2. A process that the last round has no rows for passes its first row, without targets.
            mine = rows[rank * batch_size : (rank + 1) * batch_size]
            batch = collator([dataset[i] for i in mine or rows[:1]])
            if not mine:
                batch["labels"] = torch.full_like(batch["labels"], -100)
            # 3. Every process sees the numbers, and so stops after the same round; the main one keeps them.
            part = _gather(score_batch(model, batch, mine or rows[:1]))
            parts.append(part if rank == 0 else part[:0])
            tokens += len(part)
            bar.update(len(part))
            if max_tokens is not None and tokens >= max_tokens:
                break
    if tokens == 0:
        raise DataFormatError("the data has no target tokens: every label is -100.")
    return TargetData.concatenate(parts)


def row_order(count: int, seed: int) -> list[int]:
    """The order of the rows in a [`TargetData`], of which [`TargetData.split`] holds the last ones out: random."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def score_batch(model: Any, batch: dict[str, Tensor], rows: Sequence[int]) -> TargetData:
    """Score the targets of one collated batch; `rows` are the data set's numbers of its rows. On the model's device."""
    missing = [name for name in ("assistant_logprobs", "assistant_correct") if name not in batch]
    if missing:
        raise DataFormatError(f"the data has no {' and no '.join(missing)}: score it first, with `collm score`.")
    K, scored = deferral_model(model).config.deferral.num_assistants, batch["assistant_logprobs"].shape[-1]
    if scored != K:
        raise DataFormatError(
            f"the data was scored by {scored} assistants, the head has {K}: num_assistants must agree."
        )
    device = deferral_model(model).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(cast(nn.Module, model), "score_targets")
    scores = model.score_targets(**inputs)
    where = scores.index.cpu().unbind(-1)
    return TargetData(
        features=scores.features,
        base_logprobs=scores.base_logprobs,
        base_correct=scores.base_correct,
        assistant_logprobs=batch["assistant_logprobs"][where].float().to(device),
        assistant_correct=batch["assistant_correct"][where].bool().to(device),
        rows=torch.as_tensor(rows)[where[0]].to(device),
    )


def _gather(part: TargetData) -> TargetData:
    return TargetData(**{name: gather_rows(column) for name, column in part.columns().items()})


def deferral_model(model: Any) -> Any:
    """The `CoLLM<Base>` inside of DDP, a DeepSpeed engine or a PEFT model.

    Raises:
        UnsupportedModelError: there is none.
    """
    for _ in range(4):
        if isinstance(model, CoLLMForCausalLM):
            return model
        model = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
    raise UnsupportedModelError(
        "this needs a model with a deferral head: load it with CoLLMForCausalLM.from_pretrained."
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, the earlier mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
