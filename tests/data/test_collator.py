from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_collm, tiny_tokenizer
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from collm.data.collator import DataCollatorForCoLLM
from collm.errors import ConfigurationError, DataFormatError


def row(length: int, assistants: int = 2) -> dict:
    return {
        "input_ids": list(range(3, 3 + length)),
        "labels": [-100, *range(4, 3 + length)],
        "assistant_logprobs": [[0.0] * assistants] + [[-1.0 - t] * assistants for t in range(length - 1)],
        "assistant_correct": [[False] * assistants] + [[True] * assistants] * (length - 1),
    }


def test_shapes_types_and_padding_values():
    batch = DataCollatorForCoLLM(pad_token_id=9)([row(3), row(5)])
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "input_ids": ((2, 5), torch.long),
        "attention_mask": ((2, 5), torch.long),
        "labels": ((2, 5), torch.long),
        "assistant_logprobs": ((2, 5, 2), torch.float32),
        "assistant_correct": ((2, 5, 2), torch.bool),
    }
    assert batch["input_ids"][0].tolist() == [3, 4, 5, 9, 9]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert batch["labels"][0].tolist() == [-100, 4, 5, -100, -100]
    assert batch["assistant_logprobs"][0, 3:].eq(0).all()
    assert not batch["assistant_correct"][0, 3:].any()


def test_left_padding_moves_every_column_alike():
    left = DataCollatorForCoLLM(padding_side="left")([row(3), row(5)])
    right = DataCollatorForCoLLM()([row(3), row(5)])
    for name in left:
        torch.testing.assert_close(left[name][0, 2:], right[name][0, :3])
        torch.testing.assert_close(left[name][1], right[name][1])
    assert left["attention_mask"][0].tolist() == [0, 0, 1, 1, 1]


def test_length_is_rounded_up():
    assert DataCollatorForCoLLM(pad_to_multiple_of=8)([row(3), row(9)])["assistant_logprobs"].shape == (2, 16, 2)


def test_arrays_and_tensors_are_rows_too():
    lists = DataCollatorForCoLLM()([row(4)])
    for kind in (np.array, torch.tensor):
        batch = DataCollatorForCoLLM()([{name: kind(values) for name, values in row(4).items()}])
        for name in lists:
            torch.testing.assert_close(batch[name], lists[name])


def test_unscored_rows_and_unknown_columns():
    batch = DataCollatorForCoLLM()([{"input_ids": [1, 2], "labels": [-100, 2], "text": "a b", "id": 7}])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_errors_say_what_is_wrong():
    with pytest.raises(ConfigurationError, match='"right" or "left"'):
        DataCollatorForCoLLM(padding_side="centre")
    with pytest.raises(DataFormatError, match="need the column input_ids"):
        DataCollatorForCoLLM()([{"text": "a"}])
    with pytest.raises(DataFormatError, match="Some rows of the batch have assistant_logprobs and some do not"):
        DataCollatorForCoLLM()([row(3), {"input_ids": [1, 2], "labels": [-100, 2]}])
    with pytest.raises(DataFormatError, match=r"Row 1 of the batch has 3 input_ids but labels of shape \(2,\)"):
        DataCollatorForCoLLM()([row(3), {**row(3), "labels": [-100, 4]}])
    with pytest.raises(DataFormatError, match=r"Row 1 .* assistant_logprobs of shape \(3, 1\)"):
        DataCollatorForCoLLM()([row(3, 2), {**row(3, 1)}])


def train(trainer_class, model, tmp_path, **options):
    settings = options.pop("settings", TrainingArguments)
    arguments = settings(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    data = Dataset.from_list([row(n) for n in (4, 7, 5, 6)])
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=data, data_collator=DataCollatorForCoLLM(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    return trainer.train().training_loss


def test_the_stock_trainer_trains_on_scored_rows(tmp_path):
    model = tiny_collm(num_assistants=2)
    before = model.deferral_head.weight.detach().clone()
    assert np.isfinite(train(Trainer, model, tmp_path))
    assert not torch.equal(model.deferral_head.weight, before)


def test_trls_sft_trainer_trains_on_scored_rows(tmp_path):
    trl = pytest.importorskip("trl")

    class DeferralSFTTrainer(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss  # the model's own loss: TRL 1.x computes cross-entropy beside the model

    model = tiny_collm(num_assistants=2)
    before = model.deferral_head.weight.detach().clone()
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "bf16": False}
    assert np.isfinite(train(DeferralSFTTrainer, model, tmp_path, settings=trl.SFTConfig, **options))
    assert not torch.equal(model.deferral_head.weight, before)
