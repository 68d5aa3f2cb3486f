"""The ready configurations: each is read by the command, with options that exist and files that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collm.commands import command_parser
from collm.commands import train as command
from collm.training.arguments import TrainArguments

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def read(path: Path, *options: str, monkeypatch) -> command.Arguments:
    monkeypatch.chdir(CONFIGS.parents[1])
    # bf16 and DeepSpeed depend on the machine; the rest is tested here.
    given = ["--model", "m", "--data", "d", "--use-cpu", "--bf16", "false", *options]
    return command_parser("train", command).parse([str(path), *given])[0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_is_read(path, tmp_path, monkeypatch):
    import yaml

    settings = yaml.safe_load(path.read_text())
    if "deepspeed" in settings:
        assert (CONFIGS.parents[1] / settings.pop("deepspeed")).is_file()
        (tmp_path / path.name).write_text(yaml.safe_dump(settings))
        path = tmp_path / path.name
    arguments = read(path, monkeypatch=monkeypatch)
    assert arguments.mode == settings["mode"]
    assert arguments.deferral_cost == settings.get("deferral_cost", TrainArguments.deferral_cost)


def test_paper_recipe(monkeypatch, tmp_path):
    import yaml

    settings = yaml.safe_load((CONFIGS / "paper.yaml").read_text())
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * 8 == 128
    assert json.loads((CONFIGS.parents[1] / settings.pop("deepspeed")).read_text())["zero_optimization"]["stage"] == 2
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(settings))
    arguments = read(tmp_path / "paper.yaml", monkeypatch=monkeypatch)
    assert arguments.learning_rate == 2e-5
    assert arguments.get_warmup_steps(1000) == 40
    assert arguments.num_train_epochs == 2
    assert arguments.features == ["hidden"]
    assert settings["bf16"] is True


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("fsdp/*.json")), ids=lambda path: path.stem)
def test_fsdp_config_is_read(path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    arguments = TrainingArguments(output_dir="out", fsdp=True, fsdp_config=str(path), use_cpu=True)
    assert arguments.fsdp_plugin_args["fsdp_version"] == 2
    assert arguments.fsdp_plugin_args.get("cpu_offload", False) is (path.stem == "offload")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("deepspeed/*.json")), ids=lambda path: path.stem)
def test_deepspeed_config_has_the_stage_of_its_name(path):
    settings = json.loads(path.read_text())["zero_optimization"]
    assert str(settings["stage"]) in path.stem
    assert ("offload_optimizer" in settings) is ("offload" in path.stem)
