"""Tiny checkpoints that vLLM's CPU attention can run (heads of 32), and engines over them."""

from __future__ import annotations

import os
from pathlib import Path

from collm.checkpoints import save_head_only
from tests.conftest import save_plain, tiny_collm, tiny_model, tiny_tokenizer

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
ENGINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": 32, "max_num_seqs": 128,
    "enable_prefix_caching": False,
}  # fmt: skip


def shape(architecture: str) -> dict:
    return {**SHAPE, "sliding_window": 32} if architecture.startswith("gemma") else SHAPE


def save_base(folder: Path, architecture: str, num_assistants: int = 1, seed: int = 0, head_only: bool = False):
    """A deferral checkpoint as `save_pretrained` writes it, or the head alone beside its base, and the model."""
    statistics = {"uncertainty_mean": [1.0, 0.0, 0.5, -1.0], "uncertainty_std": [1.0, 1.0, 0.5, 1.0]}
    deferral = {"num_assistants": num_assistants, **statistics}
    model = tiny_collm(architecture, seed, deferral=deferral, **shape(architecture))
    if head_only:
        tiny_model(architecture, seed, **shape(architecture)).save_pretrained(folder / "plain")
        model.config.deferral.base_model = str(folder / "plain")
        save_head_only(model, folder)
        tiny_tokenizer().save_pretrained(folder)
        return str(folder), exact(model)
    return save_plain(model, folder), exact(model)


def save_assistant(folder: Path, architecture: str, seed: int):
    model = tiny_model(architecture, seed, **shape(architecture))
    return save_plain(model, folder), exact(model)


def exact(model):
    """transformers' default attention leaves Gemma2's soft-capping of attention logits out; its eager one does not."""
    model.set_attn_implementation("eager")
    return model
