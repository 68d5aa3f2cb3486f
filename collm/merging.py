"""The head as one more row of the vocabulary, `<|defer|>`: the paper's form, for engines without a plugin."""

from __future__ import annotations

from typing import Any

import torch

from .checkpoints import DEFER_TOKEN
from .errors import ConfigurationError, UnsupportedModelError

TOLERANCE = 0.05  # of a deferral logit, in the checkpoint's own floating type


@torch.no_grad()
def merge_into_vocabulary(model: Any, tokenizer: Any) -> int:
    """
    Turn a deferral model, in place, into the architecture's plain model whose logit of `<|defer|>` is the deferral
    logit.

    Whoever serves it must keep the token out of the text: it is a decision, not a word (`logit_bias={id: -100}` for the
    base alone; stop on it, and read its logit, to defer).

    Args:
        model ([`CoLLMForCausalLM`]): one assistant, features `["hidden"]`.
        tokenizer (`PreTrainedTokenizerBase`): gets the token.

    Returns:
        `int`: the token's id.

    Raises:
        ConfigurationError: a head that a row of the LM head cannot express.
        UnsupportedModelError: an architecture that changes logits behind its LM head (soft-capping, scaling).
    """
    deferral = model.config.deferral
    if deferral.num_assistants != 1 or deferral.features != ["hidden"] or deferral.bias:
        raise ConfigurationError(
            "a vocabulary row can express one assistant's linear head on the hidden state, without bias; this head has "
            f"num_assistants={deferral.num_assistants}, features={deferral.features}, bias={deferral.bias}. Use "
            "collm's vLLM plugin, which runs any head, or train one with --features hidden."
        )
    probe = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.get_output_embeddings().weight.shape[0]
    expected = model(probe).deferral_logits[0, :, 0]
    row = model.deferral_head.weight[0]

    # 1. The plain architecture.
    del model.deferral_head
    model.__class__ = model.base_class
    del model.config.deferral
    model.config.architectures = [type(model).__name__]

    # 2. One more row. It may fall into padding that the checkpoint has already.
    tokenizer.add_tokens([DEFER_TOKEN], special_tokens=True)
    token = tokenizer.convert_tokens_to_ids(DEFER_TOKEN)
    if token >= len(model.get_output_embeddings().weight):
        model.resize_token_embeddings(token + 1, mean_resizing=False)
    head = model.get_output_embeddings()
    head.weight[token] = row.to(head.weight)
    if getattr(head, "bias", None) is not None:
        head.bias[token] = 0

    # 3. Does the architecture hand the row's product out as it is?
    error = float((model(probe).logits[0, :, token].float() - expected).abs().max())
    if error > TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UnsupportedModelError(
            f"{type(model).__name__} changes logits behind its LM head (the deferral logit would be off by "
            f"{error:.3g}): its head cannot be a vocabulary row. Use collm's vLLM plugin."
        )
    return int(token)
