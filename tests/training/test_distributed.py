"""Two processes on a CPU train the model that one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
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
    torchrun("-m", "collm.cli", "train", config, timeout=timeout, PYTHONPATH=str(ROOT), **environment)


def torchrun(*program: str | Path, timeout: int = 600, **environment: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
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


@pytest.mark.slow
def test_head_mode_with_two_processes(run, tmp_path):
    launch(tmp_path, options(run, tmp_path / "two", batch=2, mode="head", deferral_cost=0.1, ddp_backend="gloo"))
    train(TrainArguments(**options(run, tmp_path / "one", batch=2, mode="head", deferral_cost=0.1)))
    two, one = (load_file(tmp_path / name / "deferral_head.safetensors")["weight"] for name in ("two", "one"))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)


def zero(stage: int) -> dict:
    """The ready configuration, with every parameter partitioned, however small."""
    settings = json.loads((ROOT / "examples" / "configs" / "deepspeed" / f"zero{stage}.json").read_text())
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(run, alone, tmp_path, stage):
    pytest.importorskip("deepspeed")
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", os.path.expanduser("~/.cache/collm/torch_extensions"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where ninja is
    arguments = options(run, tmp_path / "out", batch=2, deepspeed=zero(stage))
    launch(tmp_path, arguments, 900, DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=extensions, PATH=path)
    same_training(tmp_path / "out", alone)


FSDP = """
    import sys, torch
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from conftest import random_batch, tiny_collm
    from helpers import scored_rows
    from collm.data.collator import DataCollatorForCoLLM
    from collm.training.zinit import z_initialise

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows, collator = scored_rows(21), DataCollatorForCoLLM()
    batch = random_batch(2, seed=dist.get_rank())

    whole = tiny_collm()
    z_initialise(whole, rows, collator, progress=False)
    whole(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for gradient in expected.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()

    sharded = tiny_collm()
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert isinstance(sharded.deferral_head.weight, DTensor)
    z_initialise(sharded, rows, collator, progress=False)
    torch.testing.assert_close(sharded.deferral_head.weight.full_tensor(), whole.deferral_head.weight.detach())
    sharded(**batch).loss.backward()
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], atol=1e-5, rtol=1e-4)
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp2(tmp_path):
    """accelerate shards on accelerators only, so that here torch shards the model, without the Trainer."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(FSDP))
    tests = Path(__file__).parents[1]
    torchrun(program, PYTHONPATH=f"{ROOT}:{tests}:{tests / 'training'}")
