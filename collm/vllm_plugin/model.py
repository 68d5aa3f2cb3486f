"""vLLM's own model classes with a deferral head: `CoLLMLlamaForCausalLM`, `CoLLMQwen2ForCausalLM`, ...

A class of this module is made when its name is looked up (`__getattr__`), from vLLM's class of the same architecture:

    class CoLLMLlamaForCausalLM(DeferralMixin, LlamaForCausalLM)

so tensor and pipeline parallelism, quantisation, LoRA and compilation are the architecture's own. The mixin pads the
vocabulary's weights with rows for the reserved ids, and runs the head where both the hidden states and the logits are
at hand. A plain `vllm serve CHECKPOINT` is the fine-tuned base: no reserved id is ever sampled or reported as likely.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.registry import ModelRegistry

from collm.configuration import DeferralConfig
from collm.errors import CheckpointError
from collm.losses import uncertainty_features

from . import PREFIX
from .gates import num_reserved, write_gates

HEAD = "deferral_head."


class DeferralMixin(nn.Module):
    """Adds the deferral head to a causal language model of vLLM; see the module's docstring."""

    uncertainty_mean: Tensor
    uncertainty_std: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config = vllm_config.model_config
        self.deferral = DeferralConfig.from_any(model_config.hf_config.deferral)
        self.real_vocab_size = model_config.hf_text_config.real_vocab_size
        self.deferral_head = nn.Linear(
            self.deferral.head_size(model_config.get_hidden_size()),
            self.deferral.num_assistants,
            bias=self.deferral.bias,
            dtype=torch.float32,
        )
        mean, std = self.deferral.uncertainty_mean, self.deferral.uncertainty_std
        self.register_buffer("uncertainty_mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("uncertainty_std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def compute_logits(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | None:
        """Logits `(batch, V + R)`, float32, with the gates in the reserved columns; None where the base gives None."""
        logits = super().compute_logits(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if logits is None:  # another tensor-parallel rank gathers them
            return None
        logits = logits.float()
        uncertainty = uncertainty_features(logits[:, : self.real_vocab_size])
        return write_gates(logits, self.deferral_logits(hidden_states, uncertainty), uncertainty, self.real_vocab_size)

    def deferral_logits(self, hidden_states: Tensor, uncertainty: Tensor) -> Tensor:
        """z `(batch, K)`, float32, from what the LM head reads `(batch, hidden)` and `uncertainty` `(batch, 4)`."""
        features = []
        if "hidden" in self.deferral.features:
            features.append(hidden_states.float())
        if "uncertainty" in self.deferral.features:
            features.append((uncertainty - self.uncertainty_mean) / self.uncertainty_std)
        return self.deferral_head(torch.cat(features, dim=-1))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the head, pad the vocabulary's tensors, and hand the rest to the architecture's own loader."""
        expected = {HEAD + name: parameter for name, parameter in self.deferral_head.named_parameters()}
        loaded: set[str] = set()

        def base_weights() -> Iterator[tuple[str, Tensor]]:
            vocabulary = {n.split(".")[-1] for n, m in self.named_modules() if isinstance(m, VocabParallelEmbedding)}
            for name, tensor in weights:
                if name in expected:
                    if tensor.shape != expected[name].shape:
                        raise CheckpointError(
                            f"{name} has shape {tuple(tensor.shape)}, but config.json describes "
                            f"{tuple(expected[name].shape)}: the checkpoint is damaged."
                        )
                    expected[name].data.copy_(tensor)
                    loaded.add(name)
                elif "." in name and name.split(".")[-2] in vocabulary and len(tensor) == self.real_vocab_size:
                    yield name, self._padded(tensor)
                else:
                    yield name, tensor

        loaded |= super().load_weights(base_weights()) or set()  # type: ignore[misc]
        if missing := expected.keys() - loaded:
            raise CheckpointError(f"the checkpoint has no {', '.join(sorted(missing))}.")
        return loaded

    def _padded(self, tensor: Tensor) -> Tensor:
        """`tensor` (V, ...) with rows of zeros for the reserved ids; their columns are overwritten by the gates."""
        return torch.cat([tensor, tensor.new_zeros(num_reserved(self.deferral.num_assistants), *tensor.shape[1:])])


class CoLLMForCausalLM(nn.Module):
    """What the registry inspects before `DeferralModelConfig` has put the real class's name into its place."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        raise NotImplementedError("the configuration names the architecture's own class; collm's plugin is not loaded")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        raise NotImplementedError


def __getattr__(name: str) -> type[nn.Module]:
    base = name.removeprefix(PREFIX)
    if base == name or base not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model_class = type(name, (DeferralMixin, ModelRegistry.models[base].load_model_cls()), {"__module__": __name__})
    globals()[name] = model_class
    return model_class
