from __future__ import annotations

import pytest
import torch
from conftest import tiny_collm
from helpers import scored_rows
from transformers import Trainer, TrainingArguments

from collm.data.collator import DataCollatorForCoLLM


def weights_after(folder, per_step: tuple[int, int], objective: str, steps: int = 10) -> dict[str, torch.Tensor]:
    batch, accumulation = per_step
    model = tiny_collm(deferral={"objective": objective, "deferral_cost": 0.1, "num_assistants": 2})
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=steps, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = scored_rows(8 * steps, num_assistants=2)  # 1 to 14 targets each
    Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForCoLLM()).train()
    return model.state_dict()


@pytest.mark.parametrize("objective", ["marginal_likelihood", "weak_supervision"])
def test_batch_1_with_accumulation_8_equals_batch_8(tmp_path, objective):
    small = weights_after(tmp_path / "small", (1, 8), objective)
    large = weights_after(tmp_path / "large", (8, 1), objective)
    untrained = tiny_collm(num_assistants=2).state_dict()
    assert any((large[name] - untrained[name]).abs().max() > 1e-2 for name in large)
    for name, value in large.items():
        torch.testing.assert_close(
            small[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
