"""The errors that collm raises on purpose. All of them are `ValueError`s, so existing handlers keep working.

CoLLMError(ValueError)
├── ConfigurationError        an option, or a combination of options, that cannot be meant
├── UnsupportedModelError     an architecture or a mode that deferral cannot work with
├── CheckpointError           a checkpoint that is missing, damaged or of another shape
├── HubError                  the Hugging Face Hub refuses, or cannot be reached
├── TokenizerMismatchError    base and assistant do not share a vocabulary
├── DataFormatError           rows, columns or files that cannot be read as training data
├── ScoreMismatchError        scores of another model, tokenizer or data set
├── CalibrationError          a deferral rate was asked for and no table answers it
├── AssistantError            an assistant failed while it was asked
│   └── AssistantRefusal      it is there, and does not do what this request asks of it
└── TrainingError             training cannot go on: a loss that is no number, a checkpoint that cannot be written
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class CoLLMError(ValueError):
    """Base of all errors that collm raises on purpose; the command line prints its message without a traceback."""


class ConfigurationError(CoLLMError):
    """An option, or a combination of options, that cannot be meant."""


class UnsupportedModelError(CoLLMError):
    """An architecture or a mode that deferral cannot work with."""


class CheckpointError(CoLLMError):
    """A checkpoint that is missing, damaged or of another shape."""


class HubError(CoLLMError):
    """The Hugging Face Hub refuses, or cannot be reached."""


class TokenizerMismatchError(CoLLMError):
    """Base and assistant do not share a vocabulary."""


class DataFormatError(CoLLMError):
    """Rows, columns or files that cannot be read as training data."""


class ScoreMismatchError(CoLLMError):
    """Scores that belong to another model, tokenizer or data set."""


class CalibrationError(CoLLMError):
    """A deferral rate was asked for and no calibration table answers it."""


class AssistantError(CoLLMError):
    """An assistant failed while it was asked for a token."""


class AssistantRefusal(AssistantError):
    """An assistant answered that it does not do what a request asks of it, or in a way that deferral cannot use."""


class TrainingError(CoLLMError):
    """Training cannot go on: a loss that is no number, or a checkpoint that cannot be written."""


def require(package: str, extra: str) -> None:
    """
    Before work whose end needs a package that not every installation has.

    Raises:
        [`ConfigurationError`]: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(f"{package.replace('_', '-')} is not installed: pip install 'collm[{extra}]'")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean "x"?` for the allowed name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""
