from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_plain, tiny_collm
from helpers import make_run, scored_rows
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from collm import CoLLMForCausalLM
from collm.cli import main
from collm.commands import command_parser, execute
from collm.commands import train as command
from collm.data.collator import DataCollatorForCoLLM
from collm.data.scoring import load_scored
from collm.errors import CheckpointError, ConfigurationError, DataFormatError, ScoreMismatchError
from collm.training.arguments import TrainArguments
from collm.training.callbacks import DeferralLoggingCallback
from collm.training.train import load_model, merge_adapter, train
from collm.training.zinit import ZInitializationCallback


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def settings(run, folder, **options):
    return {
        "model": run["model"], "data": run["data"], "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True,
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": [], **options,
    }  # fmt: skip


def trained(run, folder, **options):
    return train(TrainArguments(**settings(run, folder, **options)))


def first_batch(run):
    dataset = load_scored(run["data"])[0]
    return DataCollatorForCoLLM()([dataset[i] for i in range(4)])


def test_full_training_writes_a_checkpoint_that_loads_both_ways(run, tmp_path):
    record = trained(run, tmp_path)
    model = CoLLMForCausalLM.from_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = first_batch(run)
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"]).logits, plain(batch["input_ids"]).logits)
    assert model.config.deferral.assistants == [run["assistant"]]
    assert model.config.deferral.uncertainty_std != [1.0] * 4
    assert model.deferral_head.weight.abs().max() > 0
    base = AutoModelForCausalLM.from_pretrained(run["model"])
    assert not torch.equal(plain.lm_head.weight, base.lm_head.weight)
    assert json.loads((tmp_path / "collm_training.json").read_text())["results"] == record["results"]


def test_each_step_logs_what_deferral_does(run, tmp_path):
    record = trained(run, tmp_path, save_strategy="no", max_grad_norm=1e-3)
    steps = [entry for entry in record["results"]["log_history"] if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert entry["base_nll"] > 0 < entry["assistant_nll"]
        assert 0 < entry["deferral_probability"] < 1
        assert 0 < entry["posterior"] < 1
        assert 1e-3 < entry["head_grad_norm"] <= entry["grad_norm"] * (1 + 1e-4)  # before clipping, as the Trainer's
    assert record["results"]["log_history"][0]["z_initialization"]["tokens"] > 0


def test_tensorboard_sees_the_numbers_of_deferral(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(run, tmp_path, report_to=["tensorboard"], save_strategy="no")
    folder = next(tmp_path.rglob("events.out*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/deferral_probability", "train/posterior", "train/base_nll"} <= set(events.Tags()["scalars"])


def test_head_mode_changes_the_head_alone_and_is_small(run, tmp_path):
    record = trained(run, tmp_path, mode="head", deferral_cost=0.1)
    model = CoLLMForCausalLM.from_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(run["model"])
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.deferral_head.weight.abs().max() > 0
    assert (tmp_path / "deferral_head.safetensors").stat().st_size < 4096
    assert not (tmp_path / "model.safetensors").exists()
    assert record["results"]["mixture_nll"] < record["results"]["base_nll"]


def test_weak_supervision(run, tmp_path):
    trained(run, tmp_path, objective="weak_supervision")
    assert CoLLMForCausalLM.from_pretrained(tmp_path).config.deferral.objective == "weak_supervision"


@pytest.mark.parametrize("merge", [False, True])
def test_lora_trains_saves_reloads_and_merges(run, tmp_path, merge):
    trained(run, tmp_path, mode="lora", lora_r=4, merge_adapter=merge, learning_rate=1e-2)
    reloaded = CoLLMForCausalLM.from_pretrained(tmp_path).eval()
    base = CoLLMForCausalLM.from_pretrained(run["model"]).eval()
    batch = first_batch(run)
    with torch.no_grad():
        ours, theirs = reloaded(batch["input_ids"]), base(batch["input_ids"])
    assert not torch.allclose(ours.logits, theirs.logits, atol=1e-3)
    assert ours.deferral_logits.abs().max() > 0
    assert reloaded.config.deferral.base_model == run["model"]
    assert reloaded.config.deferral.base_trained
    # The adapter, put on the base by PEFT itself, says the same.
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(CoLLMForCausalLM.from_pretrained(run["model"]), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(batch["input_ids"]).logits, ours.logits, atol=1e-4, rtol=1e-4)
    if merge:
        merged = CoLLMForCausalLM.from_pretrained(tmp_path / "merged").eval()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            assert torch.equal(merged(batch["input_ids"]).deferral_logits, ours.deferral_logits)
            assert torch.equal(plain(batch["input_ids"]).logits, ours.logits)


def test_lora_checkpoint_resumes_to_the_same_weights(run, tmp_path):
    options = {"mode": "lora", "save_steps": 2, "lora_dropout": 0.0}
    trained(run, tmp_path / "whole", **options)
    trained(run, tmp_path / "parts", **options)
    (tmp_path / "parts" / "collm_training.json").unlink()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    trained(run, tmp_path / "parts", **options)
    whole, parts = (CoLLMForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert parts.config.deferral.uncertainty_mean == whole.config.deferral.uncertainty_mean
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, msg=name)


def test_supervised_fine_tuning_of_a_plain_model(run, tmp_path):
    record = trained(run, tmp_path / "full", objective="sft", max_steps=24, learning_rate=1e-2)
    assert "deferral" not in json.loads((tmp_path / "full" / "config.json").read_text())
    losses = [entry["loss"] for entry in record["results"]["log_history"] if "loss" in entry]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    trained(run, tmp_path / "pair", max_steps=1)  # a deferral checkpoint: its head is not the plain model's
    trained({**run, "model": str(tmp_path / "pair")}, tmp_path / "again", objective="sft", max_steps=1)
    assert "deferral" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_supervised_fine_tuning_formats_rows_and_merges_adapters(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "w1 w2 ", "completion": f"w{i} w3"}) for i in range(8)))
    run = {**run, "data": str(rows)}
    trained(run, tmp_path / "out", objective="sft", mode="lora", merge_adapter=True)
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    merge_adapter(tmp_path / "out", tmp_path / "again")
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out/merged", "again"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_evaluation_reports_the_loss(run, tmp_path):
    record = trained(run, tmp_path, eval_data=run["data"], eval_strategy="steps", eval_steps=2, save_strategy="no")
    losses = [entry["eval_loss"] for entry in record["results"]["log_history"] if "eval_loss" in entry]
    assert len(losses) == 2


def test_two_assistants(tmp_path):
    run = make_run(tmp_path, assistants=2)
    record = trained(run, tmp_path / "out")
    steps = [entry for entry in record["results"]["log_history"] if "loss" in entry]
    assert {"assistant_nll_1", "assistant_nll_2", "posterior_1", "posterior_2"} <= set(steps[0])
    assert CoLLMForCausalLM.from_pretrained(tmp_path / "out").config.deferral.num_assistants == 2


# ---- Going on from a deferral checkpoint -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(run, tmp_path_factory) -> str:
    """A fully trained checkpoint with a head on hidden alone, and calibrated."""
    folder = tmp_path_factory.mktemp("full")
    trained(run, folder, features=["hidden"], learning_rate=1e-2, save_strategy="no")
    edit(folder / "config.json", threshold=0.7, calibration=[{"rate": 0.2, "threshold": 0.7}])
    return str(folder)


def edit(path: Path, **deferral) -> None:
    config = json.loads(path.read_text())
    config["deferral"].update(deferral)
    path.write_text(json.dumps(config))


def outputs(run, folder):
    batch = first_batch(run)
    with torch.no_grad():
        return CoLLMForCausalLM.from_pretrained(folder).eval()(batch["input_ids"])


def test_head_and_adapter_of_a_deferral_checkpoint_load_on_its_weights(run, full, tmp_path):
    """A learning rate of 0 leaves adapters at zero: every checkpoint here says what the full one says."""
    options = {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no", "merge_adapter": False}
    expected = outputs(run, full)
    assert not torch.equal(expected.logits, outputs(run, run["model"]).logits)
    for name, model, mode, base in (
        ("head", full, "head", full),
        ("lora", full, "lora", full),
        ("lora-of-head", tmp_path / "head", "lora", full),
        ("head-of-head", tmp_path / "head", "head", full),
        ("lora-of-lora", tmp_path / "lora", "lora", tmp_path / "lora"),
        ("head-of-lora", tmp_path / "lora", "head", tmp_path / "lora"),
    ):
        trained({**run, "model": str(model)}, tmp_path / name, mode=mode, **options)
        found = outputs(run, tmp_path / name)
        torch.testing.assert_close(found.logits, expected.logits, msg=name)
        if name == "lora":
            torch.testing.assert_close(found.deferral_logits, expected.deferral_logits)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["deferral"]["base_model"] == str(base), name
        assert config["deferral"]["base_trained"] is (mode != "head"), name


def test_going_on_keeps_the_head_and_drops_its_calibration(run, full, tmp_path, caplog):
    options = {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no"}
    expected = outputs(run, full).deferral_logits
    trained({**run, "model": full}, tmp_path / "on", **options)
    assert "Z-initialisation skipped" in caplog.text
    assert "calibrate again" in caplog.text
    assert torch.equal(outputs(run, tmp_path / "on").deferral_logits, expected)
    deferral = CoLLMForCausalLM.from_pretrained(tmp_path / "on").config.deferral
    assert (deferral.features, deferral.threshold, deferral.calibration) == (["hidden"], 0.5, [])

    trained({**run, "model": full}, tmp_path / "anew", z_initialization=True, **options)
    assert not torch.allclose(outputs(run, tmp_path / "anew").deferral_logits, expected)
    with pytest.raises(CheckpointError, match=r"was trained with features=\['hidden'\]"):
        trained({**run, "model": full}, tmp_path / "other", features=["hidden", "uncertainty"])


def test_assistants_in_another_order_are_refused(tmp_path):
    run = make_run(tmp_path, assistants=2)
    model = CoLLMForCausalLM.from_pretrained(run["model"], num_assistants=2)
    names = [f"{tmp_path}/model-{k}" for k in (2, 1)]
    model.config.deferral.assistants = names
    save_plain(model, tmp_path / "checkpoint")
    with pytest.raises(ScoreMismatchError, match=r"model-2, .*model-1, in the order of its rows"):
        trained({**run, "model": str(tmp_path / "checkpoint")}, tmp_path / "out")
    edit(tmp_path / "checkpoint" / "config.json", assistants=["org/a", "org/b"])
    arguments = TrainArguments(**settings({**run, "model": str(tmp_path / "checkpoint")}, tmp_path / "out"))
    assert load_model(arguments, names[::-1]).config.deferral.assistants == names[::-1]


# ---- The command ---------------------------------------------------------------------------------------------------


def write_yaml(path: Path, options: dict) -> str:
    import yaml

    path.write_text(yaml.safe_dump(options))
    return str(path)


def test_yaml_and_command_line(run, tmp_path, capsys):
    path = write_yaml(tmp_path / "run.yaml", settings(run, tmp_path / "out", features=["hidden"], report_to="none"))
    assert execute("train", command, [path, "--max-steps", "1", "--z-positive-weight", "balanced"]) == 0
    record = json.loads((tmp_path / "out" / "collm_training.json").read_text())
    assert record["arguments"]["max_steps"] == 1
    assert record["arguments"]["z_positive_weight"] == "balanced"
    assert CoLLMForCausalLM.from_pretrained(tmp_path / "out").config.deferral.features == ["hidden"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["output_dir"] == str(tmp_path / "out")


def test_unknown_key_gets_a_suggestion(run, tmp_path):
    path = write_yaml(tmp_path / "run.yaml", {**settings(run, tmp_path), "learning_rat": 1})
    with pytest.raises(ConfigurationError, match='Did you mean "learning_rate"'):
        execute("train", command, [path])


def test_wrong_options_are_refused_before_any_work(run, tmp_path):
    with pytest.raises(ConfigurationError, match="`data` is missing"):
        TrainArguments(model="x", output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigurationError, match="cannot go with mode head"):
        trained(run, tmp_path, mode="head", objective="sft")
    with pytest.raises(ConfigurationError, match="merge_adapter is for"):
        trained(run, tmp_path, merge_adapter=True)
    with pytest.raises(DataFormatError, match="not a scored data set"):
        trained({**run, "data": run["model"]}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        trained(run, tmp_path / "file" / "out")
    trained(run, tmp_path / "done", max_steps=1, save_strategy="no")
    with pytest.raises(ConfigurationError, match="finished run"):
        trained(run, tmp_path / "done", max_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "head", "head_held_out": 1.0}, "held_out is 1.0"),
        ({"mode": "head", "z_positive_weight": "sqrt-balanced"}, 'Did you mean "sqrt_balanced"'),
        ({"mode": "head", "eval_data": "scored"}, "leave eval_data away"),
        ({"dtype": "float31"}, 'Did you mean "float32"'),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1: .* Leave it at 0"),
        ({"use_liger_kernel": True}, "in the place of the deferral loss. Leave it out, or turn that off"),
        ({"attn_implementation": "flash_atention_2"}, "cannot be loaded like this.*flash_atention_2"),
        ({"mode": "lora", "lora_target_modules": ["foo"]}, r"cannot get adapters on \['foo'\]"),
        ({"resume_from_checkpoint": "/nope"}, "which is no complete checkpoint"),
    ],
)
def test_wrong_values_are_said_without_a_traceback(run, tmp_path, capsys, options, message):
    path = write_yaml(tmp_path / "run.yaml", settings(run, tmp_path / "out", **options, report_to="none"))
    assert main(["train", path]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_other_losses_go_with_plain_fine_tuning_and_other_kernels_with_deferral(run, tmp_path):
    TrainArguments(**settings(run, tmp_path, objective="sft", label_smoothing_factor=0.1, use_liger_kernel=True))
    kernels = {"fused_linear_cross_entropy": False}
    TrainArguments(**settings(run, tmp_path, use_liger_kernel=True, liger_kernel_config=kernels))


@pytest.mark.parametrize("callback", [DeferralLoggingCallback, ZInitializationCallback])
def test_another_loss_than_the_models_stops_a_stock_trainer(tmp_path, callback):
    smooth = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    model = tiny_collm()
    trainer = Trainer(model, smooth, train_dataset=scored_rows(8), data_collator=DataCollatorForCoLLM(),
                      callbacks=[callback()])  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"label_smoothing_factor is 0\.1"):
        trainer.train()
    fused = TrainingArguments(str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to=[])
    with pytest.raises(ConfigurationError, match="use_liger_kernel puts"):
        callback().on_train_begin(fused, trainer.state, trainer.control, model=model)


def test_a_head_is_not_trained_into_a_folder_with_other_weights(run, tmp_path):
    folder = shutil.copytree(run["model"], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds other weights \(model\.safetensors\)"):
        trained(run, folder, mode="head")
    assert "deferral" not in json.loads((folder / "config.json").read_text())


def test_attention_that_is_not_installed_is_said_without_a_traceback(run, tmp_path):
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    with pytest.raises(ConfigurationError, match="cannot be loaded like this"):
        trained(run, tmp_path, attn_implementation="flash_attention_2")


def test_options_that_are_unset_unless_given(run):
    def read(*options):
        given = ["--model", "m", "--data", "d", "--use-cpu", *options]
        arguments = command_parser("train", command).parse(given)[0]
        return arguments.features, arguments.bias, arguments.z_initialization

    assert read() == (None, None, None)
    assert read("--bias", "--z-initialization", "--features", "hidden") == (["hidden"], True, True)
    assert read("--bias", "false", "--z-initialization", "false") == (None, False, False)


def test_evaluation_data_of_other_assistants_is_refused(run, tmp_path):
    other = shutil.copytree(run["data"], tmp_path / "other")
    scores = json.loads((other / "collm_scores.json").read_text())
    scores["assistants"][0]["name"] = "org/big"
    (other / "collm_scores.json").write_text(json.dumps(scores))
    with pytest.raises(ScoreMismatchError, match=r"was scored by org/big, .*model-1: score both"):
        trained(run, tmp_path / "out", eval_data=str(other))


def test_qlora_says_what_it_needs(run, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"needs a GPU.*Take mode lora"):
        trained(run, tmp_path, mode="qlora")
    arguments = TrainArguments(**settings(run, tmp_path, mode="qlora"))
    if importlib.util.find_spec("bitsandbytes") is None:
        monkeypatch.setattr(TrainArguments, "device", torch.device("cuda"))
        with pytest.raises(ConfigurationError, match=r"pip install 'collm\[qlora\]'"):
            load_model(arguments, ["assistant"])
