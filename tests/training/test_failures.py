"""Whatever happens in mid-run: a clear error, the last good checkpoint, and the same weights after going on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_run
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from collm.data.collator import DataCollatorForCoLLM
from collm.errors import ConfigurationError, TrainingError
from collm.training import train as training
from collm.training.arguments import TrainArguments
from collm.training.callbacks import StopOnNaNCallback, last_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), count=48)


def options(run, folder, **more):
    return {
        "model": run["model"], "data": run["data"], "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True,
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 2, "report_to": "none",
        **more,
    }  # fmt: skip


def test_killed_run_goes_on_to_the_weights_of_an_uninterrupted_one(run, tmp_path):
    training.train(TrainArguments(**options(run, tmp_path / "whole")))

    import yaml

    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(options(run, tmp_path / "killed", max_steps=8)))
    # A process of its own, slowed down after each step so that the kill falls between two checkpoints.
    program = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from transformers import TrainerCallback\n"
        "from collm.training import callbacks\n"
        "def slow(*arguments, **keywords): print('step', flush=True); time.sleep(0.3)\n"
        "callbacks.StopOnNaNCallback.on_step_end = slow\n"
        "from collm.cli import main\n"
        "sys.exit(main(['train', sys.argv[1]]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(config)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        steps = 0
        for line in process.stdout:
            steps += line.strip() == "step"
            if steps == 5:
                process.send_signal(signal.SIGKILL)
                break
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    assert last_checkpoint(tmp_path / "killed").endswith("checkpoint-4")
    assert not (tmp_path / "killed" / "collm_training.json").exists()

    training.train(TrainArguments(**options(run, tmp_path / "killed")))
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(killed[name], value, atol=1e-6, rtol=1e-5)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "killed")]
    assert configs[0]["deferral"] == configs[1]["deferral"]


def test_a_run_goes_on_with_its_own_model_and_data_alone(run, tmp_path, caplog, monkeypatch):
    out, data = tmp_path / "out", shutil.copytree(run["data"], tmp_path / "data")
    own = options({**run, "data": str(data)}, out, max_steps=2, save_steps=1)
    training.train(TrainArguments(**own))
    (out / "collm_training.json").unlink()
    shutil.rmtree(out / "checkpoint-2")

    def refused(match, **more):
        with pytest.raises(ConfigurationError, match=f"checkpoint-1 is of another run: {match}.*another output_dir"):
            training.train(TrainArguments(**{**own, **more}))

    refused("model was .*model-0, is now .*model-1", model=run["assistant"])
    refused("mode was full, is now lora", mode="lora")
    refused("objective was marginal_likelihood, is now weak_supervision", objective="weak_supervision")
    refused("features was .*uncertainty.*bias was False, is now True", features=["hidden"], bias=True)
    scores = (data / "collm_scores.json").read_text()
    (data / "collm_scores.json").write_text(scores + "\n")  # scored again, with another result
    refused("data_fingerprint was")
    (data / "collm_scores.json").write_text(scores)
    (out / "collm_run.json").write_text(  # of a version that did not record it
        json.dumps({k: v for k, v in json.loads((out / "collm_run.json").read_text()).items() if "finger" not in k})
    )
    refused("data was .*data, is now .*scored", data=run["data"])
    monkeypatch.chdir(tmp_path)
    given = {**own, "data": "data", "features": ["hidden", "uncertainty"], "lr_scheduler_type": "constant"}
    training.train(TrainArguments(**given))
    assert "differ from those of the interrupted run: data, data_fingerprint, features, lr_sch" in caplog.text


def test_who_reads_the_record_of_a_run_while_it_is_replaced_sees_the_old_one(run, tmp_path):
    training._checkpoint_to_resume(TrainArguments(**options(run, tmp_path)), tmp_path)
    before = (tmp_path / "collm_run.json").read_text()
    with open(tmp_path / "collm_run.json", encoding="utf-8") as reader:
        training._checkpoint_to_resume(TrainArguments(**options(run, tmp_path, seed=3)), tmp_path)
        assert reader.read() == before
    assert json.loads((tmp_path / "collm_run.json").read_text())["seed"] == 3


def test_half_written_checkpoints_are_passed_over(tmp_path):
    for step, state in ((2, "{}"), (4, '{"global_st'), (6, None), (10, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "nothing") is None


class AtStep(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(kwargs["model"])


def train_with(monkeypatch, arguments, callback):
    """`train` with one more callback that breaks something."""

    class Broken(StopOnNaNCallback):
        def on_step_begin(self, *args, **kwargs):
            callback.on_step_begin(*args, **kwargs)

    monkeypatch.setattr(training, "StopOnNaNCallback", Broken)
    return training.train(TrainArguments(**arguments))


def checkpoint_is_good(run, folder) -> bool:
    from collm import CoLLMForCausalLM

    model = CoLLMForCausalLM.from_pretrained(folder)
    return all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_nan_stops_with_the_step_and_the_last_checkpoint(run, tmp_path, monkeypatch):
    def spoil(model):
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")

    with pytest.raises(TrainingError, match=r"loss is nan at step 4.*checkpoint-2"):
        train_with(monkeypatch, options(run, tmp_path), AtStep(3, spoil))
    assert checkpoint_is_good(run, tmp_path / "checkpoint-2")


def test_nan_stops_a_stock_trainer_before_the_weights_change(run, tmp_path):
    from conftest import tiny_collm
    from helpers import scored_rows

    rows = scored_rows(8)
    rows[5]["assistant_logprobs"] = [[float("nan")]] * len(rows[5]["input_ids"])
    model = tiny_collm()
    arguments = TrainArguments(**options(run, tmp_path, per_device_train_batch_size=1, logging_nan_inf_filter=True))
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForCoLLM(),
                      callbacks=[StopOnNaNCallback()])  # fmt: skip
    with pytest.raises(TrainingError, match="loss is nan"):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_full_disk_leaves_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    """No file may grow beyond a few kilobytes from step 3 on: the writes of checkpoint-4 really fail."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))

    try:
        with pytest.raises(TrainingError, match=r"cannot be written.*last good checkpoint is .*checkpoint-2"):
            train_with(monkeypatch, options(run, tmp_path), AtStep(3, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    assert checkpoint_is_good(run, tmp_path / "checkpoint-2")
    # With space again, the same command goes on from there, over what was half written.
    training.train(TrainArguments(**options(run, tmp_path)))
    assert (tmp_path / "collm_training.json").is_file()
