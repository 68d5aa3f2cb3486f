"""`DeferralConfig`: what it accepts, what it refuses, and thresholds from its calibration table."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from conftest import tiny_config
from transformers import AutoConfig

from collm import DeferralConfig
from collm.errors import CalibrationError, ConfigurationError

TABLE = [{"rate": 0.5, "threshold": 0.2}, {"rate": 0.1, "threshold": 0.9}, {"rate": 0.3, "threshold": 0.6}]


def test_defaults_are_one_assistant_and_both_features():
    config = DeferralConfig()
    assert (config.num_assistants, config.features, config.threshold) == (1, ["hidden", "uncertainty"], 0.5)
    assert config.head_size(896) == 900


def test_attribute_and_entry_are_one():
    config = DeferralConfig()
    config.threshold = 0.7
    assert config["threshold"] == 0.7
    config["threshold"] = 0.8
    assert config.threshold == 0.8
    config.update(threshold=0.9)
    config |= {"deferral_cost": 0.2}
    assert (config.threshold, config["threshold"], config.deferral_cost) == (0.9, 0.9, 0.2)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_independent(copied):
    config = DeferralConfig(num_assistants=2, calibration=list(TABLE))
    again = copied(config)
    assert again == config
    assert isinstance(again, DeferralConfig)
    again.threshold = 0.1
    assert (config.threshold, config["threshold"], again["threshold"]) == (0.5, 0.5, 0.1)


def test_it_travels_in_a_models_config(tmp_path):
    config = tiny_config()
    config.deferral = DeferralConfig(num_assistants=2, assistants=["a", "b"], calibration=TABLE)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["deferral"]
    assert saved["assistants"] == ["a", "b"]
    assert DeferralConfig.from_any(AutoConfig.from_pretrained(tmp_path).deferral) == config.deferral


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_assistants": 0}, "at least 1, not 0"),
        ({"num_assistants": "2"}, "must be an integer"),
        ({"features": ["entropy"]}, 'features has "entropy"; allowed are hidden, uncertainty'),
        ({"features": "hiden"}, 'Did you mean "hidden"'),
        ({"features": []}, "features is empty"),
        ({"objective": "weak_supervison"}, 'Did you mean "weak_supervision"'),
        ({"deferral_cost": -0.1}, "at least 0, not -0.1"),
        ({"deferral_cost": float("nan")}, "at least 0, not nan"),
        ({"assistants": ["a", "b"]}, r"2 assistants are named \(a, b\) but num_assistants is 1"),
        ({"uncertainty_mean": [0.0]}, "uncertainty_mean needs 4 numbers, got 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        DeferralConfig(**settings)


def test_unknown_fields_are_named_with_the_closest_known_one():
    with pytest.raises(ConfigurationError, match=r'"treshold" is not a field.*Did you mean "threshold"'):
        DeferralConfig.from_any({"treshold": 0.3})


def test_a_string_of_features_is_one_feature():
    assert DeferralConfig(features="hidden").head_size(32) == 32


def test_from_any_takes_nothing_a_dictionary_or_a_config():
    config = DeferralConfig(num_assistants=3)
    assert DeferralConfig.from_any(config) is config
    assert DeferralConfig.from_any(None) == DeferralConfig()
    assert DeferralConfig.from_any(dict(config)) == config


@pytest.mark.parametrize(("rate", "threshold"), [(0.1, 0.9), (0.3, 0.6), (0.5, 0.2), (0.0, 1.0), (1.0, -1.0)])
def test_thresholds_of_the_table_and_of_the_ends(rate, threshold):
    assert DeferralConfig(calibration=TABLE).threshold_for_rate(rate) == pytest.approx(threshold)


def test_thresholds_fall_as_rates_rise():
    config = DeferralConfig(calibration=TABLE)
    thresholds = [config.threshold_for_rate(0.1 + i * 0.4 / 50) for i in range(51)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert 0.6 < config.threshold_for_rate(0.2) < 0.9


def test_thresholds_outside_of_probabilities_are_interpolated_too():
    config = DeferralConfig(calibration=[{"rate": 0.2, "threshold": 0.5}, {"rate": 0.4, "threshold": 0.0}])
    assert config.threshold_for_rate(0.3) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("table", "rate", "message"),
    [
        ([], 0.2, "Run `collm calibrate"),
        (TABLE, 0.05, "outside of the calibrated range 0.1 to 0.5"),
        (TABLE, 0.7, "outside of the calibrated range"),
        (TABLE, 1.5, "between 0 and 1; got 1.5"),
        (TABLE, float("nan"), "between 0 and 1; got nan"),
    ],
)
def test_rates_without_a_threshold(table, rate, message):
    with pytest.raises(CalibrationError, match=message):
        DeferralConfig(calibration=table).threshold_for_rate(rate)


def test_a_table_of_one_row_knows_its_rate():
    assert DeferralConfig(calibration=[{"rate": 0.2, "threshold": 0.4}]).threshold_for_rate(0.2) == 0.4
