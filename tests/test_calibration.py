from __future__ import annotations

import json
import os

import numpy as np
import pytest

from collm import DeferralConfig
from collm.calibration import (
    Run,
    calibrate_rates,
    choose_by_metric,
    estimated_rates,
    roc,
    save_calibration,
    solve,
)
from collm.errors import CalibrationError, CheckpointError, ConfigurationError


def pair(texts: range, effect: float = -2.5, tokens: int = 120):
    """A pair whose deferrals change what comes after: the score falls by `effect` logits after a deferred token."""

    def run_at(threshold: float) -> Run:
        scores = []
        for text in texts:
            generator = np.random.default_rng(text)
            noise = generator.normal(generator.normal(0, 0.2), 1.5, tokens)
            state, row = 0.0, []
            for value in noise:
                d = float(np.float32(1 / (1 + np.exp(-(value + state)))))
                row.append(d)
                state = 0.6 * state + (effect if d > threshold else 0.0)
            scores.append(np.array(row))
        return Run(threshold, scores)

    return run_at


@pytest.mark.parametrize("effect", [-2.5, 0.6])
def test_rates_hold_on_unseen_texts_although_deferring_changes_the_text(effect):
    rates = (0.1, 0.2, 0.3, 0.5)
    rows, runs = calibrate_rates(pair(range(120), effect), rates)
    config = DeferralConfig(calibration=rows)
    unseen = pair(range(1000, 1200), effect)
    off = []
    for rate in rates:
        assert unseen(config.threshold_for_rate(rate)).rate == pytest.approx(rate, abs=0.02)
        off.append(abs(unseen(solve(runs[:1], rate)).rate - rate))
    assert max(off) > 0.04  # what the base's own text alone would have given: the test can fail


def test_rows_carry_their_evidence_and_few_runs_are_needed():
    lines: list[str] = []
    rows, runs = calibrate_rates(pair(range(60)), report=lines.append)
    assert [row["rate"] for row in rows] == [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert len(runs) <= 1 + 2 * len(rows)
    assert len(lines) == len(runs)
    thresholds = [row["threshold"] for row in rows]
    assert thresholds == sorted(thresholds, reverse=True)
    for row in rows:
        assert abs(row["realised"] - row["rate"]) <= 0.01
        assert row["low"] < row["realised"] < row["high"]
        assert row["texts"] == 60
        assert row["tokens"] == 60 * 120
    json.dumps(rows)


def test_interpolated_rates_between_the_rows_hold_too():
    rows, _ = calibrate_rates(pair(range(150)), (0.1, 0.3, 0.5))
    config = DeferralConfig(calibration=rows)
    for rate in (0.15, 0.2, 0.4):
        assert pair(range(2000, 2200))(config.threshold_for_rate(rate)).rate == pytest.approx(rate, abs=0.025)


def test_the_estimate_is_exact_at_the_runs():
    runs = [pair(range(20))(threshold) for threshold in (0.2, 0.5, 0.8)]
    assert estimated_rates(runs, np.array([0.2, 0.5, 0.8])).tolist() == [run.rate for run in runs]


def test_ties_are_calibrated_as_used():
    # Scores 0.25 and 0.75 only: 30% lie strictly above 0.25, none above 0.75.
    scores = np.array([0.75] * 30 + [0.25] * 70)

    def run_at(threshold: float) -> Run:
        return Run(threshold, [scores])

    rows, _ = calibrate_rates(run_at, [0.3])
    assert rows[0]["rate"] == 0.3
    assert 0.25 <= rows[0]["threshold"] < 0.75
    # 20% cannot be had: the row says what was realised instead of what was asked.
    rows, _ = calibrate_rates(run_at, [0.2])
    assert rows[0]["rate"] == 0.3
    assert Run(rows[0]["threshold"], [scores]).rate == 0.3


def test_neighbours_in_float32_are_still_separated():
    low = float(np.float32(0.3))
    high = float(np.nextafter(np.float32(0.3), np.float32(1)))
    run = Run(0.0, [np.array([low] * 60 + [high] * 40)])
    threshold = np.float32(solve([run], 0.4))
    assert np.float32(high) > threshold
    assert not np.float32(low) > threshold


def test_interval_counts_texts_not_tokens():
    # Two kinds of texts, all or nothing: 40 texts carry 40 decisions however long they are.
    scores = [np.full(1000, 0.9 if text % 2 else 0.1) for text in range(40)]
    low, high = Run(0.5, scores).interval()
    assert high - low > 0.25


def test_an_untrained_head_is_refused():
    with pytest.raises(CalibrationError, match="not trained"):
        calibrate_rates(lambda threshold: Run(threshold, [np.full(10, 0.5)]), [0.2])
    with pytest.raises(CalibrationError, match="without a single token"):
        Run(0.5, [])


@pytest.mark.parametrize("rate", [0.0, 1.0, 20])
def test_rates_outside_are_refused(rate):
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        calibrate_rates(pair(range(2)), [rate])


def test_roc_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    differs = generator.random(500) < 0.3
    scores = np.round(generator.random(500) * 0.6 + 0.4 * differs * generator.random(500), 2)  # with ties
    result = roc(scores, differs)
    assert result["auc"] == pytest.approx(metrics.roc_auc_score(differs, scores))
    fpr, tpr, _ = metrics.roc_curve(differs, scores, drop_intermediate=False)
    assert result["false_positive_rate"] == pytest.approx(fpr.tolist())
    assert result["true_positive_rate"] == pytest.approx(tpr.tolist())
    youden = result["youden"]
    asked = scores > youden["threshold"]
    assert youden["rate"] == asked.mean()
    assert youden["true_positive_rate"] == pytest.approx(asked[differs].mean())
    assert youden["false_positive_rate"] == pytest.approx(asked[~differs].mean())
    assert youden["true_positive_rate"] - youden["false_positive_rate"] == pytest.approx((tpr - fpr).max())
    for threshold, false, true in zip(
        result["threshold"], result["false_positive_rate"], result["true_positive_rate"], strict=True
    ):
        assert ((scores > threshold)[differs].mean(), (scores > threshold)[~differs].mean()) == pytest.approx(
            (true, false)
        )


def test_roc_needs_both_kinds_of_tokens():
    with pytest.raises(CalibrationError, match="0 of 2"):
        roc([0.1, 0.2], [False, False])


def test_choice_by_metric_weighs_cost():
    points = [{"rate": 0.1, "quality": 0.40}, {"rate": 0.3, "quality": 0.55}, {"rate": 0.6, "quality": 0.56}]
    assert choose_by_metric(points, cost=0.0)["rate"] == 0.6
    assert choose_by_metric(points, cost=0.1)["rate"] == 0.3
    assert choose_by_metric(points, cost=2.0)["rate"] == 0.1


def test_saving_replaces_config_json_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "x": [1], "deferral": {"num_assistants": 1}}))
    deferral = DeferralConfig(threshold=0.25, calibration=[{"rate": 0.2, "threshold": 0.25}])
    save_calibration(tmp_path, deferral)
    saved = json.loads(path.read_text())
    assert saved["model_type"] == "llama"
    assert saved["x"] == [1]
    assert DeferralConfig.from_any(saved["deferral"]) == deferral
    assert os.listdir(tmp_path) == ["config.json"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_calibration(tmp_path, DeferralConfig())
    assert json.loads(path.read_text()) == saved
    assert os.listdir(tmp_path) == ["config.json"]


def test_saving_needs_a_local_folder(tmp_path):
    with pytest.raises(CheckpointError, match="hf download"):
        save_calibration(tmp_path / "org" / "name", DeferralConfig())
