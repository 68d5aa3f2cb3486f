from __future__ import annotations

import pytest
import torch

from collm.errors import ConfigurationError
from tests.conftest import tiny_collm, tiny_model

PROMPTS = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])


def generate(model, rows, **options):
    return model.generate(
        PROMPTS[rows], assistant=tiny_model(seed=5), max_new_tokens=20, do_sample=False, return_dict_in_generate=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("speculate", [False, None])
def test_each_prompt_can_have_its_own_threshold(speculate):
    model = tiny_collm()
    thresholds = [1.0, 0.5, -1.0]
    together = generate(model, [0, 1, 2], threshold=thresholds, speculate=speculate)
    for row, threshold in enumerate(thresholds):
        single = generate(model, [row], threshold=threshold, speculate=speculate)
        length = single.source.shape[1]
        assert together.sequences[row, : 3 + length].tolist() == single.sequences[0].tolist()
        assert together.source[row, :length].tolist() == single.source[0].tolist()
    assert set(together.source[0].tolist()) <= {0, -1}
    assert set(together.source[2].tolist()) <= {1, -1}


def test_rates_by_prompt_and_schedules_over_them():
    model = tiny_collm()
    model.config.deferral.calibration = [{"rate": 0.1, "threshold": 0.9}, {"rate": 0.5, "threshold": 0.3}]
    by_rate = generate(model, [0, 1], deferral_rate=torch.tensor([0.1, 0.5]))
    by_threshold = generate(model, [0, 1], threshold=[0.9, 0.3])
    assert torch.equal(by_rate.sequences, by_threshold.sequences)
    late = generate(model, [0, 1], threshold=[0.9, -1.0], router="scheduled:shape=constant,steps=5")
    assert late.source[1, :5].tolist() == [0] * 5
    assert 0 not in late.source[1, 5:].tolist()


def test_samples_of_a_prompt_share_its_threshold():
    model = tiny_collm()
    out = model.generate(
        PROMPTS[:2], assistant=tiny_model(seed=5), max_new_tokens=6, do_sample=True, num_return_sequences=2,
        threshold=[1.0, -1.0], return_dict_in_generate=True,
    )  # fmt: skip
    assert not (out.source[:2] == 1).any()
    assert not (out.source[2:] == 0).any()


def test_the_number_of_thresholds_is_checked():
    with pytest.raises(ConfigurationError, match=r"2 thresholds .* for 3 prompts"):
        generate(tiny_collm(), [0, 1, 2], threshold=[0.1, 0.2])
