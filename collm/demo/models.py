"""The demonstration's two models, a fifth and almost half a million parameters, trained from random weights."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .problems import LARGEST_RESULT, make_problem, make_worksheet

BASE_STEPS, ASSISTANT_STEPS = 700, 2400  # the assistant's at most: it is done when its sums are right
WARM_UP, ANNEALING = 70, 400  # steps in which the learning rate rises, and falls
LEARNING_RATE = 4e-3
# Copying numbers is learned best from large batches, sums from many steps and with more dimensions.
BASE: dict[str, Any] = {"batch_size": 64}
ASSISTANT: dict[str, Any] = {"batch_size": 16, "enough": 0.3}
ASSISTANT_CONFIG = {"hidden_size": 128, "intermediate_size": 384}


def make_base(tokenizer: PreTrainedTokenizerFast, seed: int, progress: bool = True) -> LlamaForCausalLM:
    """
    A model that reads and writes word problems but cannot calculate: in all the text that it learns from, results are
    random numbers.
    """
    rng = random.Random(f"base {seed}")

    def text() -> str:
        problem = make_problem(rng, knows_arithmetic=False)
        return problem.prompt + problem.solution + tokenizer.eos_token

    model = make_model(tokenizer, seed)
    return train_language_model(model, tokenizer, text, BASE_STEPS, "base", **BASE, progress=progress)


def make_assistant(tokenizer: PreTrainedTokenizerFast, seed: int, progress: bool = True) -> LlamaForCausalLM:
    """
    A model that calculates but cannot read or write: it learns from worksheets, equations among words in no order, and
    only the results count. Its number embeddings start as waves of the number's value, which makes sums quick to learn
    (Zhou et al., *FoNE: Precise Single-Token Number Embeddings via Fourier Features*, 2025).
    """
    rng = random.Random(f"assistant {seed}")
    model = make_model(tokenizer, seed + 1, **ASSISTANT_CONFIG)
    numbers = tokenizer.convert_tokens_to_ids([f" {number}" for number in range(LARGEST_RESULT + 1)])
    model.get_input_embeddings().weight.data[numbers, : 2 * len(PERIODS)] = waves(torch.arange(len(numbers)))
    equals = tokenizer.convert_tokens_to_ids(" =")
    return train_language_model(
        model,
        tokenizer,
        lambda: make_worksheet(rng),
        ASSISTANT_STEPS,
        "assistant",
        **ASSISTANT,
        after=equals,
        progress=progress,
    )


PERIODS = (2, 5, 10, 20, 50, 100, 200)


def waves(numbers: Tensor) -> Tensor:
    """Cosine and sine of each number at each period: `(numbers,)` to `(numbers, 2 * periods)` float32."""
    angles = 2 * math.pi * numbers[:, None] / torch.tensor(PERIODS)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, **options: float) -> LlamaForCausalLM:
    """A Llama with 2 layers, 96 dimensions unless `options` say otherwise, and random weights."""
    torch.manual_seed(seed)
    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**small, **options}))


def train_language_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Callable[[], str],
    steps: int,
    name: str,
    batch_size: int,
    enough: float = 0.0,
    after: int | None = None,
    progress: bool = True,
) -> LlamaForCausalLM:
    """
    Next-token training on texts that are made as it goes, none seen twice.

    Args:
        text (`Callable[[], str]`): Makes one training text.
        after (`int`, *optional*): If given, only tokens that follow this one are targets.
        name (`str`): Shown beside the progress bar.
        batch_size (`int`): Texts of a step.
        enough (`float`, *optional*, defaults to 0.0): A mean loss at which the learning rate begins to fall, ahead of
            time.
    """
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(total=steps, desc=f"pretraining the {name}", unit="step", disable=None if progress else True)
    model.train()
    step, end, recent = 0, steps, math.inf
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, (end - step) / ANNEALING, 1)
        texts = [text() for _ in range(batch_size)]
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer.pad_token_id, -100)
        if after is not None:
            targets = targets.masked_fill(ids[:, :-1] != after, -100)
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent = loss.item() if math.isinf(recent) else 0.98 * recent + 0.02 * loss.item()
        if recent < enough:
            end = min(end, step + ANNEALING)
            bar.total = end
        bar.set_postfix_str(f"loss {recent:.3f}", refresh=False)
        bar.update()
    bar.close()
    return model.eval()
