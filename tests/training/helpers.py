"""Scored data that a tiny model can learn from."""

from __future__ import annotations

import torch
from conftest import VOCAB_SIZE, random_batch


def scored_rows(count: int = 40, num_assistants: int = 1, seed: int = 0, length: int = 16) -> list[dict]:
    """Rows of ragged length with made-up scores, prompts masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        n = int(torch.randint(6, length + 1, (), generator=generator))
        batch = random_batch(1, n, num_assistants, seed=seed * 1000 + i)
        rows.append({name: value[0].tolist() for name, value in batch.items()})
    return rows


def separable_rows(model, count: int = 120, seed: int = 0, length: int = 16) -> list[dict]:
    """Rows whose best writer can be read off the model's features: assistant k is right where direction k says so.

    The base's own argmax is the target elsewhere, so that labels "a" and "b" are one linear rule (up to K).
    """
    generator = torch.Generator().manual_seed(seed)
    K = model.config.deferral.num_assistants
    input_ids = torch.randint(3, VOCAB_SIZE, (count, length), generator=generator)
    with torch.no_grad():
        logits = model(input_ids).logits
        features = model.score_targets(input_ids).features[:, : model.config.hidden_size]
    directions = torch.randn(K, features.shape[1], generator=generator)
    values = (features @ directions.T).view(count, length - 1, K)
    best, winner = values.max(-1)
    defer = best > 0
    argmax = logits[:, :-1].argmax(-1)
    labels = torch.full_like(input_ids, -100)
    labels[:, 1:] = torch.where(defer, (argmax + 1) % VOCAB_SIZE, argmax)
    chosen = torch.nn.functional.one_hot(winner, K).bool() & defer.unsqueeze(-1)
    logprobs = torch.full((count, length, K), -6.0)
    logprobs[:, 1:][chosen] = -0.05
    correct = torch.zeros(count, length, K, dtype=torch.bool)
    correct[:, 1:] = chosen
    columns = {"input_ids": input_ids, "labels": labels, "assistant_logprobs": logprobs, "assistant_correct": correct}
    return [{name: value[i].tolist() for name, value in columns.items()} for i in range(count)]
