"""The vLLM plugin: deferral checkpoints load in any vLLM engine, and their head decides inside of it.

`register` is the `vllm.general_plugins` entry point. vLLM calls it in every process that it starts, possibly more than
once; it imports no model and initialises no device. See [`~collm.vllm_plugin.model`] for what happens to a checkpoint.
"""

from __future__ import annotations

PLACEHOLDER = "CoLLMForCausalLM"  # what `save_pretrained` writes into `architectures`
PREFIX = "CoLLM"  # "CoLLMQwen2ForCausalLM" is vLLM's Qwen2ForCausalLM with a deferral head


def register() -> None:
    """Teach vLLM's registry the architecture of deferral checkpoints; as strings, resolved when one is loaded."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from .config import DeferralModelConfig

    if PLACEHOLDER in MODELS_CONFIG_MAP:
        return
    for architecture in list(ModelRegistry.get_supported_archs()):
        name = PREFIX + architecture
        ModelRegistry.register_model(name, f"collm.vllm_plugin.model:{name}")
    ModelRegistry.register_model(PLACEHOLDER, f"collm.vllm_plugin.model:{PLACEHOLDER}")
    MODELS_CONFIG_MAP[PLACEHOLDER] = DeferralModelConfig
