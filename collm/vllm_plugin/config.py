"""What the plugin does to vLLM's configuration of a deferral checkpoint, before any engine process starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from collm.configuration import DeferralConfig
from collm.errors import UnsupportedModelError

from . import PREFIX
from .gates import num_reserved

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class DeferralModelConfig(VerifyAndUpdateConfig):
    """Resolves the architecture of a deferral checkpoint and grows its vocabulary by the reserved ids.

    Both must happen in the configuration, not in the model class: vLLM sizes its sampler, and checks the token ids of
    `logit_bias` and `stop_token_ids`, from here.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config, text_config = model_config.hf_config, model_config.hf_text_config
        deferral = DeferralConfig.from_any(getattr(config, "deferral", None))

        # 1. CoLLMForCausalLM -> the class of the checkpoint's own architecture, with a deferral head.
        base = base_architecture(config.model_type)
        architecture = PREFIX + base
        config.architectures = [architecture]
        if base in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[architecture] = MODELS_CONFIG_MAP[base]

        # 2. Room for the reserved ids. `real_vocab_size` says where they begin.
        text_config.real_vocab_size = text_config.vocab_size
        text_config.vocab_size += num_reserved(deferral.num_assistants)

        # 3. vLLM read these before this hook; the base's own hook sees a configuration that is complete.
        model_config.model_arch_config = model_config.get_model_arch_config()
        model_config._model_info, model_config._architecture = model_config.registry.inspect_model_cls(
            [architecture], model_config
        )
        if base in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[base].verify_and_update_model_config(model_config)


def base_architecture(model_type: str) -> str:
    """vLLM's name of the architecture that `AutoModelForCausalLM` takes for `model_type`.

    Raises:
        UnsupportedModelError: transformers has no causal language model of that type, or vLLM does not have it.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name is None:
        raise UnsupportedModelError(f'"{model_type}" is not a causal language model of transformers.')
    if name not in ModelRegistry.get_supported_archs():
        raise UnsupportedModelError(
            f"vLLM has no {name} (model_type {model_type!r}); serve this checkpoint with `--engine transformers`."
        )
    return name
