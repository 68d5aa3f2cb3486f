from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_collm
from helpers import scored_rows, separable_rows

from collm.data.collator import DataCollatorForCoLLM
from collm.errors import ConfigurationError, ScoreMismatchError
from collm.losses import marginal_likelihood_loss
from collm.training.cache import cache_targets
from collm.training.head import train_head
from collm.training.solver import HIDDEN_PENALTY, feature_penalties
from collm.training.targets import collect_targets

COLLATOR = DataCollatorForCoLLM()


def test_head_reaches_the_likelihood_that_gradient_descent_on_the_model_reaches():
    """The cached problem is the model's own loss: its minimum has gradient zero through `forward`."""
    model = tiny_collm(deferral={"deferral_cost": 0.1})
    rows = scored_rows(30)
    l2 = 1e-2
    train_head(model, rows, COLLATOR, l2=l2, held_out=0.0, progress=False)
    data = collect_targets(model, rows, COLLATOR, progress=False)
    batch = COLLATOR(rows)
    model.zero_grad()
    model(**batch).loss.backward()
    scale = model.standardise(data.features).square().mean(0)
    penalties = feature_penalties(l2, model.config.deferral, data.features.shape[1])
    assert penalties.unique().tolist() == pytest.approx([l2, HIDDEN_PENALTY * l2])
    gradient = model.deferral_head.weight.grad + penalties * scale * model.deferral_head.weight
    assert (gradient / scale.sqrt()).abs().max() < 1e-5
    assert model.deferral_head.weight.abs().max() > 0.01


def test_head_learns_and_reports_what_it_reached():
    model = tiny_collm(deferral={"deferral_cost": 0.1, "features": ["hidden"]})
    rows = separable_rows(model, count=200)
    result = train_head(model, rows, COLLATOR, l2=1e-5, progress=False)
    assert result.auc > 0.97
    assert result.mixture_nll < min(result.base_nll, result.assistant_nll[0])
    assert result.mixture_nll < result.initial_mixture_nll + 0.05
    assert result.held_out_tokens == 20 * 15
    # The numbers are those of the model that was written.
    data = collect_targets(model, rows, COLLATOR, progress=False)
    held = data.split(0.1)[1]
    logits = held.features @ model.deferral_head.weight.T
    assert marginal_likelihood_loss(held.base_logprobs, held.assistant_logprobs, logits).item() == pytest.approx(
        result.mixture_nll, rel=1e-4
    )


def test_several_assistants_and_bias():
    model = tiny_collm(deferral={"num_assistants": 2, "bias": True})
    result = train_head(model, separable_rows(model, count=150), COLLATOR, l2=1e-4, progress=False)
    assert len(result.assistant_nll) == 2
    assert result.mixture_nll < min(result.base_nll, *result.assistant_nll)
    assert model.deferral_head.bias.abs().max() > 0


def test_weak_supervision_has_its_own_optimum():
    heads = []
    for objective in ("marginal_likelihood", "weak_supervision"):
        model = tiny_collm(deferral={"objective": objective})
        train_head(model, separable_rows(model), COLLATOR, progress=False)
        heads.append(model.deferral_head.weight.detach().clone())
    assert not torch.allclose(*heads, atol=1e-2)


def test_collapse_is_announced(caplog):
    rows = scored_rows(30)
    for row in rows:
        row["assistant_logprobs"] = [[-1e-3]] * len(row["input_ids"])  # text that the assistant wrote itself
    train_head(tiny_collm(deferral={"bias": True}), rows, COLLATOR, l2=1e-6, progress=False)
    assert "collapsing" in caplog.text


def test_cache_equals_memory_and_is_reused(tmp_path):
    model, rows = tiny_collm(num_assistants=2), scored_rows(40, num_assistants=2)
    cached = cache_targets(model, rows, COLLATOR, tmp_path, batch_size=4, progress=False)
    collected = collect_targets(model, rows, COLLATOR, batch_size=3, progress=False)
    for name, column in cached.columns().items():
        torch.testing.assert_close(column, getattr(collected, name), atol=1e-4, rtol=1e-4)
    forward_passes = []
    model.model.register_forward_hook(lambda *_: forward_passes.append(1))
    cache_targets(model, rows, COLLATOR, tmp_path, batch_size=4, progress=False)
    assert not forward_passes


def test_held_out_rows_are_of_every_length_and_the_same_with_a_cache(tmp_path):
    rows, heads = scored_rows(200, length=40), []
    data = cache_targets(tiny_collm(), rows, COLLATOR, tmp_path, batch_size=4, progress=False)
    lengths = [torch.tensor([len(rows[row]["labels"]) for row in part.rows.unique()]) for part in data.split(0.25)]
    assert [len(part) for part in lengths] == [150, 50]
    assert lengths[1].max() > 35
    assert abs(lengths[0].float().mean() - lengths[1].float().mean()) < 5
    for cache in (tmp_path, None):
        model = tiny_collm()
        result = train_head(model, rows, COLLATOR, cache, held_out=0.25, batch_size=4, progress=False)
        heads.append((result.held_out_tokens, model.deferral_head.weight))
    assert heads[0][0] == heads[1][0] == len(data.split(0.25)[1])
    torch.testing.assert_close(heads[0][1], heads[1][1], atol=1e-3, rtol=1e-2)


def test_values_that_would_leave_nothing_to_fit_are_refused_before_any_work(tmp_path):
    for options, message in (
        ({"held_out": 1.0}, "held_out is 1.0; it is a share"),
        ({"held_out": -0.1}, "at least 0"),
        ({"positive_weight": "sqrt-balanced"}, 'Did you mean "sqrt_balanced"'),
    ):
        with pytest.raises(ConfigurationError, match=message):
            train_head(tiny_collm(), scored_rows(8), COLLATOR, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_cache_of_another_base_data_or_features_is_refused(tmp_path):
    rows = scored_rows(8)
    cache_targets(tiny_collm(), rows, COLLATOR, tmp_path, progress=False)
    for other, data, what in [
        (tiny_collm(seed=1), rows, "base"),
        (tiny_collm(), scored_rows(8, seed=1), "data"),
        (tiny_collm(deferral={"features": ["hidden"]}), rows, "features"),
    ]:
        with pytest.raises(ScoreMismatchError, match=what):
            cache_targets(other, data, COLLATOR, tmp_path, progress=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["layout"]  # a cache whose rows lie in another order
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ScoreMismatchError, match="layout"):
        cache_targets(tiny_collm(), rows, COLLATOR, tmp_path, progress=False)


def test_full_disk_is_an_error_before_any_work(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    model = tiny_collm()
    forward_passes = []
    model.model.register_forward_hook(lambda *_: forward_passes.append(1))
    with pytest.raises(OSError, match="No space left"):
        cache_targets(model, scored_rows(4), COLLATOR, tmp_path / "cache", progress=False)
    assert not forward_passes


KILLED = """
    import sys, time
    sys.path.insert(0, sys.argv[2])
    from conftest import tiny_collm
    from helpers import scored_rows
    from collm.data.collator import DataCollatorForCoLLM
    from collm.training.cache import cache_targets

    model = tiny_collm()
    model.model.register_forward_hook(lambda *_: time.sleep(0.15))
    print("ready", flush=True)
    cache_targets(model, scored_rows(60), DataCollatorForCoLLM(), sys.argv[1], batch_size=2, progress=False)
"""


def test_killed_process_goes_on_where_it_was(tmp_path):
    script = tmp_path / "score.py"
    script.write_text(textwrap.dedent(KILLED))
    here = Path(__file__).parent
    command = [sys.executable, str(script), str(tmp_path / "cache"), str(here.parent)]
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}:{here.parent.parent}", "OMP_NUM_THREADS": "1"}
    done = tmp_path / "cache" / "done.bin"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        while not done.exists() or sum(done.read_bytes()) < 5:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = sum(done.read_bytes())
    assert 5 <= before < 30

    model, passes = tiny_collm(), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    resumed = cache_targets(model, scored_rows(60), COLLATOR, tmp_path / "cache", batch_size=2, progress=False)
    assert len(passes) == 30 - before
    whole = cache_targets(tiny_collm(), scored_rows(60), COLLATOR, tmp_path / "other", batch_size=2, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(resumed.columns().values(), whole.columns().values(), strict=True))
