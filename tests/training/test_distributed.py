"""Two processes on a CPU train the model that one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_run
from safetensors.torch import load_file

from collm.training.arguments import TrainArguments
from collm.training.train import train

ROOT = Path(__file__).parents[2]


def options(run, folder, batch: int, **more):
    return {
        "model": run["model"], "data": run["data"], "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True,
        "max_steps": 4, "per_device_train_batch_size": batch, "learning_rate": 1e-3, "save_strategy": "no",
        "report_to": "none", "lr_scheduler_type": "constant", "warmup_steps": 0, **more,
    }  # fmt: skip


def launch(folder: Path, arguments: dict, timeout: int = 600, **environment: str) -> None:
    """`collm train` under torchrun."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(arguments))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "-m", "collm.cli", "train", str(config),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), count=33)  # odd: the last batches of the processes differ


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """One process with the two processes' batch."""
    folder = tmp_path_factory.mktemp("alone")
    train(TrainArguments(**options(run, folder, batch=4)))
    return folder


def steps(folder: Path) -> list[dict]:
    log = json.loads((folder / "collm_training.json").read_text())["results"]["log_history"]
    return [entry for entry in log if "loss" in entry]


def same_training(folder: Path, alone: Path, weights: float = 1e-4) -> None:
    for ours, theirs in zip(steps(folder), steps(alone), strict=True):
        for name in ("loss", "base_nll", "assistant_nll", "deferral_probability", "posterior", "head_grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name].float(), value, atol=weights, rtol=1e-3, msg=lambda t, n=name: f"{n}: {t}"
        )
    configs = [json.loads((path / "config.json").read_text())["deferral"] for path in (folder, alone)]
    for name in ("uncertainty_mean", "uncertainty_std"):
        assert configs[0][name] == pytest.approx(configs[1][name], rel=1e-3)


def test_ddp(run, alone, tmp_path):
    launch(tmp_path, options(run, tmp_path / "out", batch=2, ddp_backend="gloo"))
    same_training(tmp_path / "out", alone)


def test_head_mode_with_two_processes(run, tmp_path):
    launch(tmp_path, options(run, tmp_path / "two", batch=2, mode="head", deferral_cost=0.1, ddp_backend="gloo"))
    train(TrainArguments(**options(run, tmp_path / "one", batch=2, mode="head", deferral_cost=0.1)))
    two, one = (load_file(tmp_path / name / "deferral_head.safetensors")["weight"] for name in ("two", "one"))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)


def zero(stage: int) -> dict:
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(run, alone, tmp_path, stage):
    pytest.importorskip("deepspeed")
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", os.path.expanduser("~/.cache/collm/torch_extensions"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where ninja is
    arguments = options(run, tmp_path / "out", batch=2, deepspeed=zero(stage))
    launch(tmp_path, arguments, 900, DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=extensions, PATH=path)
    same_training(tmp_path / "out", alone)
