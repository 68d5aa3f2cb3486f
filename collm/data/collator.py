"""Batches for training: scored rows of different lengths become tensors of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from collm.errors import ConfigurationError, DataFormatError


@dataclass
class DataCollatorForCoLLM:
    """Pads scored (or plain tokenised) rows to the longest of the batch, for the stock `Trainer` and TRL's.

    Columns that it does not know (an `id`, the original text) are left out. TRL's `SFTTrainer` (seen in 1.16) computes
    a loss of its own beside the model, and drops columns; give it the model's loss back:

    ```python
    class DeferralSFTTrainer(SFTTrainer):
        compute_loss = transformers.Trainer.compute_loss

    SFTConfig(remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    ```

    Args:
        pad_token_id (`int`, defaults to 0):
            Id written where `attention_mask` is 0. No model reads it there, so any id of the vocabulary is right.
        padding_side (`str`, defaults to `"right"`): `"right"` or `"left"`.
        pad_to_multiple_of (`int`, *optional*): round the length of every batch up to a multiple of this.

    Returns (from `__call__`):
        `dict` with `input_ids` int64, `attention_mask` int64 (1 = a token, 0 = padding) and `labels` int64 (-100 = not
        a target), all `(batch, seq)`; where the rows have them, `assistant_logprobs` float32 `(batch, seq, K)` in nats
        (0.0 where nothing was scored) and `assistant_correct` bool `(batch, seq, K)`. Entry `[b, t]` belongs to
        `labels[b, t]`.

    Raises:
        [`ConfigurationError`]: unknown `padding_side`.
        [`DataFormatError`]: rows without `input_ids`, columns of different lengths, some rows scored and some not.
    """

    pad_token_id: int = 0
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("right", "left"):
            raise ConfigurationError(f'padding_side is {self.padding_side!r}; it can be "right" or "left".')

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if any("input_ids" not in row for row in rows):
            raise DataFormatError(f"Rows need the column input_ids; these have {sorted(rows[0])}.")
        lengths = [len(row["input_ids"]) for row in rows]
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(lengths) // multiple) * multiple
        pieces = {
            "input_ids": (self.pad_token_id, torch.long),
            "attention_mask": (0, torch.long),
            "labels": (-100, torch.long),
            "assistant_logprobs": (0.0, torch.float32),
            "assistant_correct": (False, torch.bool),
        }
        rows = [{"attention_mask": [1] * n, **row} for n, row in zip(lengths, rows, strict=True)]
        return {
            name: self._pad(name, [row.get(name) for row in rows], lengths, length, value, dtype)
            for name, (value, dtype) in pieces.items()
            if any(row.get(name) is not None for row in rows)
        }

    def _pad(
        self, name: str, columns: list[Any], lengths: list[int], length: int, value: float, dtype: torch.dtype
    ) -> torch.Tensor:
        if any(column is None for column in columns):
            raise DataFormatError(f"Some rows of the batch have {name} and some do not; score all of them.")
        tensors = [torch.as_tensor(column, dtype=dtype) for column in columns]
        for row, (tensor, expected) in enumerate(zip(tensors, lengths, strict=True)):
            if len(tensor) != expected or tensor.shape[1:] != tensors[0].shape[1:]:
                raise DataFormatError(
                    f"Row {row} of the batch has {expected} input_ids but {name} of shape {tuple(tensor.shape)}."
                )
        padded = torch.full((len(tensors), length, *tensors[0].shape[1:]), value, dtype=dtype)
        for row, tensor in enumerate(tensors):
            start = 0 if self.padding_side == "right" else length - len(tensor)
            padded[row, start : start + len(tensor)] = tensor
        return padded
