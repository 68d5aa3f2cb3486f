from __future__ import annotations

import numpy as np
import pytest

from collm.evaluation.intervals import bootstrap_interval, paired_bootstrap, wilson_interval


def test_wilson_against_published_values():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for n in range(1, 300):  # however it rounds, an error bar is never negative
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0


def test_wilson_covers_the_truth():
    generator = np.random.default_rng(0)
    truths = generator.uniform(0.05, 0.95, 4000)
    draws = generator.binomial(40, truths)
    intervals = [wilson_interval(int(d), 40) for d in draws]
    covered = np.mean([low <= truth <= high for (low, high), truth in zip(intervals, truths, strict=True)])
    assert 0.94 < covered < 0.965


def test_bootstrap_of_a_mean_is_close_to_the_normal_interval():
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    low, high = bootstrap_interval(values.tolist(), resamples=2000)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.02)
    assert high == pytest.approx(values.mean() + error, abs=0.02)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


def test_pairing_sees_a_difference_that_separate_intervals_do_not():
    base = [i % 2 for i in range(200)]
    better = [1 if i % 10 == 0 else value for i, value in enumerate(base)]  # 20 more right, none lost
    result = paired_bootstrap(better, base, resamples=2000)
    assert result["difference"] == pytest.approx(0.1)
    assert 0.05 < result["low"] < result["high"] < 0.15
    assert result["p"] < 0.01
    assert paired_bootstrap(base, base, resamples=100)["p"] == 1.0
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap([1], [1, 2])


def test_problems_that_one_system_has_no_score_for_are_no_pairs():
    with_others = paired_bootstrap([1.0, None, 0.0, 1.0], [0.0, None, 0.0, None])
    assert with_others == paired_bootstrap([1.0, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap([None], [None])
