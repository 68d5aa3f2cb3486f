"""collm: language models that learn, token by token, when to let another model write.

The names below are the public API. They are imported on first use, so that `import collm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# module -> the public names that it defines
_EXPORTS = {
    "calibration": ["calibrate_rates"],
    "configuration": ["DeferralConfig"],
    "data.collator": ["DataCollatorForCoLLM"],
    "data.formatting": ["format_rows"],
    "data.scoring": ["load_scored", "score_dataset"],
    "decoding.generation": ["CollaborativeGenerationMixin", "CollaborativeOutput", "SourceStreamer"],
    "decoding.processor": ["CollaborativeLogitsProcessor"],
    "errors": [
        "AssistantError",
        "CalibrationError",
        "CheckpointError",
        "CoLLMError",
        "ConfigurationError",
        "DataFormatError",
        "ScoreMismatchError",
        "TokenizerMismatchError",
        "TrainingError",
        "UnsupportedModelError",
    ],
    "losses": [
        "deferral_labels",
        "deferral_probabilities",
        "marginal_likelihood_loss",
        "uncertainty_features",
        "weak_supervision_loss",
    ],
    "modeling": ["CoLLMForCausalLM"],
    "training.head": ["train_head"],
    "training.zinit": ["ZInitializationCallback", "z_initialise"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'collm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"collm.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
