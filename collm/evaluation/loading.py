"""A deferral checkpoint and its assistants, loaded and checked for one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from collm.data.tokenizers import check_same_tokenizer, load_tokenizer
from collm.errors import AssistantError, CheckpointError, ConfigurationError


class Models(NamedTuple):
    """`model` the base with its head, `assistants` a list, and the base's `tokenizer`; `names` of all for reports."""

    model: Any
    assistants: list[Any]
    tokenizer: Any
    names: list[str]


def load_models(
    checkpoint: str, assistants: Sequence[str] = (), dtype: str = "auto", device: str | None = None
) -> Models:
    """
    Loads a deferral checkpoint and its assistants, ready to generate.

    Args:
        checkpoint (`str`): folder or Hub name; a plain causal language model gets a new head.
        assistants (sequence of `str`): folders or Hub names; by default those that the checkpoint names.
        dtype (`str`, *optional*, defaults to `"auto"`): "auto" (as saved), "float32", "bfloat16" or "float16".
        device (`str`, *optional*): by default a GPU where there is one.

    Raises:
        [`CheckpointError`], [`AssistantError`], [`TokenizerMismatchError`]: a model cannot be loaded, or they do not
        share a vocabulary.
        [`ConfigurationError`]: the number of assistants is not the head's.
    """
    from collm import CoLLMForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = CoLLMForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    names = [name for name in assistants if name] or list(model.config.deferral.assistants)
    count = model.config.deferral.num_assistants
    if len(names) != count:
        known = "" if names else ", and it does not say which"
        raise ConfigurationError(
            f'"{checkpoint}" has a head for {count} assistant{"s" * (count > 1)}{known}; {len(names)} given. Name '
            "each with --assistant."
        )
    tokenizer = tokenizer_of(checkpoint, model)
    for name in names:
        check_same_tokenizer(tokenizer, name, base_name=checkpoint)
    loaded = [load_plain(name, dtype, device) for name in names]
    return Models(model, loaded, tokenizer, [short_name(name) for name in (checkpoint, *names)])


def tokenizer_of(checkpoint: str, model: Any) -> Any:
    """The checkpoint's tokenizer; that of its base for a head-only checkpoint without one."""
    files = ("tokenizer.json", "tokenizer_config.json")
    folder = Path(checkpoint)
    if folder.is_dir() and not any((folder / file).exists() for file in files):
        base = model.config.deferral.base_model
        if not base:
            raise CheckpointError(f"{checkpoint} has no tokenizer and names no base to take it from")
        return load_tokenizer(base)
    return load_tokenizer(checkpoint)


def load_plain(name: str, dtype: str = "auto", device: str | None = None) -> Any:
    """A causal language model of transformers, ready to generate.

    Raises:
        [`AssistantError`]: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise AssistantError(f'the model "{name}" cannot be loaded: {error}') from error


def short_name(name: str) -> str:
    """The last part of a path or Hub name, as reports show it."""
    return Path(name).name or name


def num_parameters(model: Any) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
