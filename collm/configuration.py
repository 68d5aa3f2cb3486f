"""What a deferral checkpoint knows about its head: `DeferralConfig`, kept in `model.config.deferral`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import CalibrationError, ConfigurationError, did_you_mean

FEATURES = ("hidden", "uncertainty")
OBJECTIVES = ("marginal_likelihood", "weak_supervision")
NUM_UNCERTAINTY_FEATURES = 4


@dataclass
class DeferralConfig(dict):
    """Everything about deferral that travels with a checkpoint, as the entry `deferral` of `config.json`.

    It is a dictionary (so that any `PreTrainedConfig` serialises it) whose keys are also attributes.

    Args:
        num_assistants (`int`, *optional*, defaults to 1): K, the number of assistants; rows of the deferral head.
        assistants (`list[str]`, *optional*): names of the K assistants it was trained with, in the order of the rows.
        features (`list[str]`, *optional*, defaults to `["hidden", "uncertainty"]`): what the head sees. `"hidden"`
            is the paper's f_t = h_t, the vector that the LM head reads; `"uncertainty"` adds four numbers of the
            base's next-token distribution (see [`~collm.losses.uncertainty_features`]).
        bias (`bool`, *optional*, defaults to `False`): whether the head has a bias. The paper's has none.
        uncertainty_mean, uncertainty_std (`list[float]`): standardisation of the four uncertainty features;
            Z-initialisation measures them.
        deferral_cost (`float`, *optional*, defaults to 0.0): c >= 0, nats per deferred token, added to the loss.
            0 is the paper. Where the assistant is better throughout (on text that it wrote itself, say), c = 0 has
            "always defer" as its optimum; take about 0.2 there.
        objective (`str`, *optional*, defaults to `"marginal_likelihood"`): what `forward` computes from labels and
            `assistant_logprobs`; or `"weak_supervision"`, the paper's baseline.
        threshold (`float`, *optional*, defaults to 0.5): eta; the assistant writes where d_t > eta.
        calibration (`list[dict]`): rows with at least `rate` and `threshold`, from `collm calibrate`.
        base_model (`str`, *optional*): name of the base that the checkpoint was made from.
        base_trained (`bool`, *optional*, defaults to `False`): whether the base was trained with the head, so that the
            head alone does not go with `base_model`; `collm train` says so.
    """

    num_assistants: int = 1
    assistants: list[str] = field(default_factory=list)
    features: list[str] = field(default_factory=lambda: list(FEATURES))
    bias: bool = False
    uncertainty_mean: list[float] = field(default_factory=lambda: [0.0] * NUM_UNCERTAINTY_FEATURES)
    uncertainty_std: list[float] = field(default_factory=lambda: [1.0] * NUM_UNCERTAINTY_FEATURES)
    deferral_cost: float = 0.0
    objective: str = "marginal_likelihood"
    threshold: float = 0.5
    calibration: list[dict[str, Any]] = field(default_factory=list)
    base_model: str | None = None
    base_trained: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> DeferralConfig:
        config = super().__new__(cls)
        config.__dict__ = config  # one store: attributes and items cannot come to differ
        return config

    def __post_init__(self) -> None:
        self.features = [self.features] if isinstance(self.features, str) else list(self.features)
        self.validate()

    @classmethod
    def from_any(cls, value: DeferralConfig | Mapping[str, Any] | None) -> DeferralConfig:
        """Return `value` as a `DeferralConfig`; a plain dictionary is what `config.json` holds after loading."""
        if isinstance(value, cls):
            return value
        known = [f.name for f in fields(cls)]
        for name in value or {}:
            if name not in known:
                raise ConfigurationError(
                    f'"{name}" is not a field of DeferralConfig.{did_you_mean(name, known)} Fields: {", ".join(known)}.'
                )
        return cls(**(value or {}))

    def validate(self) -> None:
        """Raise `ConfigurationError` where a field has a value that nothing can be done with."""
        if not isinstance(self.num_assistants, int) or self.num_assistants < 1:
            raise ConfigurationError(f"num_assistants must be an integer of at least 1, not {self.num_assistants!r}.")
        for name in self.features:
            if name not in FEATURES:
                raise ConfigurationError(
                    f'features has "{name}"; allowed are {", ".join(FEATURES)}.{did_you_mean(name, FEATURES)}'
                )
        if not self.features:
            raise ConfigurationError('features is empty: the head must see something, e.g. ["hidden"] as in the paper.')
        if self.objective not in OBJECTIVES:
            raise ConfigurationError(
                f'objective is "{self.objective}"; allowed are {", ".join(OBJECTIVES)}.'
                f"{did_you_mean(str(self.objective), OBJECTIVES)}"
            )
        if not self.deferral_cost >= 0:
            raise ConfigurationError(
                f"deferral_cost is in nats per deferred token, at least 0, not {self.deferral_cost}."
            )
        if self.assistants and len(self.assistants) != self.num_assistants:
            raise ConfigurationError(
                f"{len(self.assistants)} assistants are named ({', '.join(self.assistants)}) but num_assistants is "
                f"{self.num_assistants}; give one name for each row of the head, or none."
            )
        for name in ("uncertainty_mean", "uncertainty_std"):
            if len(self[name]) != NUM_UNCERTAINTY_FEATURES:
                raise ConfigurationError(f"{name} needs {NUM_UNCERTAINTY_FEATURES} numbers, got {len(self[name])}.")

    def head_size(self, hidden_size: int) -> int:
        """Number of features that the head reads, given the size of the vector that the LM head reads."""
        return hidden_size * ("hidden" in self.features) + NUM_UNCERTAINTY_FEATURES * ("uncertainty" in self.features)

    def threshold_for_rate(self, rate: float) -> float:
        """Threshold at which a share `rate` of the tokens is deferred, interpolated in the calibration table.

        Raises:
            CalibrationError: there is no table, or `rate` lies outside of what was measured.
        """
        if not 0 <= rate <= 1:
            raise CalibrationError(f"deferral_rate is a share of tokens between 0 and 1; got {rate}.")
        if rate == 0:
            return 1.0
        if rate == 1:
            return -1.0
        if not self.calibration:
            raise CalibrationError(
                f"deferral_rate={rate} needs a calibration table and this checkpoint has none. Run `collm calibrate "
                "CHECKPOINT --assistant NAME --data VALIDATION` first, or pass threshold= instead."
            )
        rows = sorted(self.calibration, key=lambda row: row["rate"])
        if not rows[0]["rate"] <= rate <= rows[-1]["rate"]:
            raise CalibrationError(
                f"deferral_rate={rate} is outside of the calibrated range {rows[0]['rate']} to {rows[-1]['rate']}; "
                "calibrate that rate (`collm calibrate --target-rate`), or pass threshold= instead."
            )
        for low, high in zip(rows, rows[1:] or rows, strict=False):
            if low["rate"] <= rate <= high["rate"]:
                span = high["rate"] - low["rate"]
                weight = (rate - low["rate"]) / span if span else 0.0
                return _between(low["threshold"], high["threshold"], weight)
        raise CalibrationError(f"the calibration table is damaged: {self.calibration}")


# `__new__` takes anything; what a `DeferralConfig` takes is said by its fields.
_PARAMETERS = list(inspect.signature(DeferralConfig.__init__).parameters.values())[1:]
DeferralConfig.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]


def _between(low: float, high: float, weight: float) -> float:
    """Interpolate two thresholds in logits, where deferral scores are spread evenly; linearly outside (0, 1)."""
    if weight in (0.0, 1.0):
        return high if weight else low
    if not (0 < low < 1 and 0 < high < 1):
        return low + weight * (high - low)
    logit = (1 - weight) * math.log(low / (1 - low)) + weight * math.log(high / (1 - high))
    return 1 / (1 + math.exp(-logit))
