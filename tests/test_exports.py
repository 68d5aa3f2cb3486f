"""`import collm` is cheap, and exports exactly the public names."""

from __future__ import annotations

import subprocess
import sys

import pytest

import collm

PUBLIC = {
    "__version__",
    # model, decoding
    "CoLLMForCausalLM",
    "CollaborativeGenerationMixin",
    "CollaborativeLogitsProcessor",
    "CollaborativeOutput",
    "DeferralConfig",
    "SourceStreamer",
    # data, training, calibration
    "DataCollatorForCoLLM",
    "ZInitializationCallback",
    "calibrate_rates",
    "format_rows",
    "load_scored",
    "score_dataset",
    "train_head",
    "z_initialise",
    # tensors
    "deferral_labels",
    "deferral_probabilities",
    "marginal_likelihood_loss",
    "uncertainty_features",
    "weak_supervision_loss",
    # errors
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
}


def imported_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after the statement."""
    script = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_exports_are_exactly_the_public_names():
    assert set(collm.__all__) == PUBLIC
    assert PUBLIC <= set(dir(collm))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_export_resolves(name):
    assert getattr(collm, name) is not None


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        collm.Nothing  # noqa: B018


def test_import_costs_nothing():
    assert not {"torch", "transformers", "numpy"} & imported_after("import collm")


def test_model_imports_neither_engines_nor_training_libraries():
    heavy = {"vllm", "datasets", "matplotlib", "peft", "deepspeed", "lm_eval", "fastapi"}
    assert not heavy & imported_after("from collm import CoLLMForCausalLM, DeferralConfig, marginal_likelihood_loss")


def test_import_initialises_no_gpu():
    script = "import collm, torch; collm.CoLLMForCausalLM; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", script], check=True)
