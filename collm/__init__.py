"""collm: language models that learn, token by token, when to let another model write.

The names below are the public API. They are imported on first use, so that `import collm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "CoLLMForCausalLM": "modeling",
    "DeferralConfig": "configuration",
    "ZInitializationCallback": "training.zinit",
    "deferral_labels": "losses",
    "marginal_likelihood_loss": "losses",
    "weak_supervision_loss": "losses",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .configuration import DeferralConfig
    from .losses import deferral_labels, marginal_likelihood_loss, weak_supervision_loss
    from .modeling import CoLLMForCausalLM
    from .training.zinit import ZInitializationCallback


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'collm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"collm.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
