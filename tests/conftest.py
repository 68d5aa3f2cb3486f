"""Tiny models and a tiny tokenizer, built in memory; no network, one thread."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import collm

VOCAB_SIZE = 64

_SMALL = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_EXPERTS = dict(num_experts_per_tok=2, output_router_logits=False)

# Every architecture that the library promises, with what is special about it switched on.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True},
    "gpt_neox": {"tie_word_embeddings": False},
    "olmo2": {},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 3.0},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, **_EXPERTS},
}


def tiny_config(architecture: str = "llama", **overrides):
    """Config of a random model small enough that a test on it takes milliseconds."""
    small = {k: v for k, v in _SMALL.items() if architecture != "gpt2" or k.endswith(("vocab_size", "token_id"))}
    return AutoConfig.for_model(architecture, **{**small, **ARCHITECTURES[architecture], **overrides})


def tiny_model(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A plain causal language model of transformers with random weights that disagree with one another by seed.

    Weights are drawn wide (0.3 instead of 0.02) so that distributions are peaked and differ from position to position.
    """
    torch.manual_seed(seed)
    overrides.setdefault("initializer_range", 0.3)
    return AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides), dtype=dtype).eval()


def randomise_head(model, seed: int = 7, scale: float = 0.5):
    """Give the deferral head random weights, so that it defers here and there."""
    weight = model.deferral_head.weight
    generator = torch.Generator().manual_seed(seed)
    weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def tiny_collm(architecture: str = "llama", seed: int = 0, num_assistants: int = 1, dtype=torch.float32, **overrides):
    """A deferral model over `tiny_model(architecture, seed)` with a random head."""
    deferral = overrides.pop("deferral", None) or {"num_assistants": num_assistants}
    base = tiny_model(architecture, seed, dtype, **overrides)
    return randomise_head(collm.CoLLMForCausalLM.from_base(base, deferral=deferral))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of `VOCAB_SIZE` entries (`<pad> <s> </s> <unk>`, digits, words) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *"0123456789", *"+-*/=.,?!:;#", "\n", "user", "assistant", "system"]
    words += [f"w{i}" for i in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ ' </s>' }}{% endif %}{{ ' \n ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    return fast


def random_batch(batch: int = 3, length: int = 12, num_assistants: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    """A right-padded batch with prompts masked, and made-up scores of assistants."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for row in range(batch):
        labels[row, : 2 + row] = -100
        if row:
            input_ids[row, -row:], attention_mask[row, -row:], labels[row, -row:] = 0, 0, -100
    logprobs = -torch.rand(batch, length, num_assistants, generator=generator) * 4
    correct = torch.rand(batch, length, num_assistants, generator=generator) > 0.4
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels,
        "assistant_logprobs": logprobs, "assistant_correct": correct,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def save_plain(model: PreTrainedModel, folder, with_tokenizer: bool = True) -> str:
    """Save a model (and the tiny tokenizer) as a user's checkpoint folder and return its path."""
    model.save_pretrained(folder)
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server():
    """A server of tiny models on loopback, for a whole file."""
    from tests.serving.running import running

    with running() as one:
        yield one
