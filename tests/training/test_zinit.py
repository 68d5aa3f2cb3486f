from __future__ import annotations

import pytest
import torch
from conftest import tiny_collm
from helpers import scored_rows, separable_rows
from transformers import Trainer, TrainingArguments

from collm import ZInitializationCallback
from collm.data.collator import DataCollatorForCoLLM
from collm.errors import ConfigurationError, DataFormatError, UnsupportedModelError
from collm.training.targets import collect_targets
from collm.training.zinit import class_weights, z_initialise

COLLATOR = DataCollatorForCoLLM()


def initialise(model, rows, **settings):
    return z_initialise(model, rows, COLLATOR, progress=False, **settings)


@pytest.mark.parametrize("features", [["hidden"], ["hidden", "uncertainty"]])
def test_head_learns_who_should_write(features):
    model = tiny_collm(deferral={"features": features})
    rows = separable_rows(model)
    result = initialise(model, rows, l2=1e-4)
    assert result.auc > 0.97
    assert result.held_out_tokens == 12 * 15
    assert result.tokens == 120 * 15
    # The head that was written says the same through the model's own forward.
    batch = COLLATOR(rows[-20:])
    with torch.no_grad():
        logits = model(batch["input_ids"]).deferral_logits[:, :-1, 0]
    right = (logits > 0) == batch["assistant_correct"][:, 1:, 0]
    assert right.float().mean() > 0.85


def test_several_assistants_are_told_apart():
    model = tiny_collm(num_assistants=3)
    rows = separable_rows(model, count=200)
    result = initialise(model, rows, l2=1e-4, positive_weight=1.0)
    batch = COLLATOR(rows)
    with torch.no_grad():
        logits = model(batch["input_ids"]).deferral_logits[:, :-1]
    correct = batch["assistant_correct"][:, 1:]
    chosen = torch.nn.functional.pad(logits, (1, 0)).argmax(-1)
    wanted = torch.where(correct.any(-1), correct.float().argmax(-1) + 1, 0)
    assert (chosen == wanted).float().mean() > 0.9
    assert len(result.positive_weight) == 3


def test_uncertainty_is_standardised_and_saved(tmp_path):
    model = tiny_collm()
    rows = scored_rows()
    initialise(model, rows, held_out=0.0)
    features = model.standardise(collect_targets(model, rows, COLLATOR, progress=False).features)[:, -4:]
    torch.testing.assert_close(features.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.deferral.uncertainty_std == model.config.deferral.uncertainty_std != [1.0] * 4


def test_base_and_random_numbers_do_not_move():
    model = tiny_collm().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    initialise(model, scored_rows())
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["deferral_head.weight"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training


def test_same_seed_gives_the_same_head_and_tokens_are_limited():
    heads = []
    for seed in (0, 0, 1):
        model = tiny_collm()
        result = initialise(model, scored_rows(), seed=seed, max_tokens=100, batch_size=2)
        heads.append(model.deferral_head.weight.detach())
        assert 100 <= result.tokens < 100 + 2 * 16
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_positive_weights():
    labels = torch.tensor([0] * 8 + [1] * 2 + [2] + [-1] * 5)
    assert class_weights(labels, 2, 8.0).tolist() == [1, 8, 8]
    assert class_weights(labels, 2, "balanced").tolist() == [1, 4, 8]
    assert class_weights(labels, 2, "sqrt_balanced").tolist() == pytest.approx([1, 2, 8**0.5])


def test_positive_weight_raises_the_deferral_probability():
    means = []
    for weight in (1.0, 8.0):
        model = tiny_collm()
        rows = separable_rows(model, count=40)
        initialise(model, rows, positive_weight=weight, l2=0.1)
        with torch.no_grad():
            means.append(model(COLLATOR(rows)["input_ids"]).deferral_logits.sigmoid().mean().item())
    assert means[1] > means[0] + 0.05


def test_label_rates_of_both_methods_and_of_ignoring_what_both_get_wrong():
    rows = scored_rows()
    data = collect_targets(tiny_collm(), rows, COLLATOR, progress=False)
    base, assistant = data.base_correct, data.assistant_correct[:, 0]
    a, b = (~base & assistant).float(), (~base).float()
    rates = [
        initialise(tiny_collm(), rows, held_out=0.0, method=method, ignore_both_wrong=ignore).label_rate
        for method, ignore in [("a", False), ("b", False), ("b", True)]
    ]
    assert rates == pytest.approx([a.mean().item(), b.mean().item(), b[base | assistant].mean().item()])
    assert rates[0] < rates[1]


def test_labels_that_are_all_alike_leave_the_head(caplog):
    model = tiny_collm()
    before = model.deferral_head.weight.clone()
    rows = scored_rows()
    for row in rows:
        row["assistant_correct"] = [[False]] * len(row["input_ids"])
    result = initialise(model, rows)
    assert result.evaluations == 0
    assert torch.equal(model.deferral_head.weight, before)
    assert "nothing to separate" in caplog.text


def test_errors_say_what_is_wrong():
    model = tiny_collm()
    with pytest.raises(ConfigurationError, match='Did you mean "balanced"'):
        initialise(model, scored_rows(), positive_weight="balance")
    with pytest.raises(ConfigurationError, match="greater than 0"):
        ZInitializationCallback(positive_weight=0)
    with pytest.raises(DataFormatError, match="collm score"):
        initialise(model, [{"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(DataFormatError, match="2 assistants, the head has 1"):
        initialise(model, scored_rows(num_assistants=2))
    with pytest.raises(DataFormatError, match="no target tokens"):
        initialise(model, [{**row, "labels": [-100] * len(row["labels"])} for row in scored_rows(3)])
    with pytest.raises(UnsupportedModelError, match="deferral head"):
        initialise(torch.nn.Linear(2, 2), scored_rows())


def trainer(model, folder, callbacks, **arguments):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_steps": 1,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(**{**settings, **arguments}), train_dataset=scored_rows(), data_collator=COLLATOR,
        callbacks=callbacks,
    )  # fmt: skip


def test_callback_runs_before_the_first_step_and_is_reported(tmp_path):
    alone = tiny_collm()
    initialise(alone, scored_rows(), batch_size=4)
    callback = ZInitializationCallback()
    model = tiny_collm()
    run = trainer(model, tmp_path, [callback], learning_rate=0.0)
    run.train()
    assert torch.equal(model.deferral_head.weight, alone.deferral_head.weight)
    assert callback.result.tokens == run.state.log_history[0]["z_initialization"]["tokens"]


def test_callback_does_not_change_the_batches(tmp_path):
    def batches(name, callbacks):
        model, seen = tiny_collm(), []
        model.register_forward_pre_hook(
            lambda module, _, inputs: seen.append(inputs["input_ids"]) if module.training else None, with_kwargs=True
        )
        trainer(model, tmp_path / name, callbacks).train()
        return seen

    without, with_callback = batches("without", []), batches("with", [ZInitializationCallback()])
    assert len(without) == 2
    assert all(torch.equal(a, b) for a, b in zip(without, with_callback, strict=True))


def test_callback_is_skipped_on_resume(tmp_path, caplog):
    trainer(tiny_collm(), tmp_path, [ZInitializationCallback()]).train()
    callback = ZInitializationCallback()
    trainer(tiny_collm(), tmp_path, [callback]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert callback.result is None
    assert "resumes at step 1" in caplog.text
