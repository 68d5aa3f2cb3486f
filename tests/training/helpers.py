"""Scored data that a tiny model can learn from."""

from __future__ import annotations

import torch
from conftest import VOCAB_SIZE, random_batch, save_plain, tiny_model, tiny_tokenizer
from datasets import Dataset

from collm.data.formatting import format_rows
from collm.data.scoring import score_dataset


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


def make_run(folder, architecture: str = "llama", count: int = 24, assistants: int = 1, **overrides) -> dict[str, str]:
    """Folders of a base, of its assistants, and of a data set that they wrote together and that is scored by them."""
    generator = torch.Generator().manual_seed(0)
    models = [
        tiny_model(architecture, 0, **overrides),
        *(tiny_model(architecture, k) for k in range(1, assistants + 1)),
    ]
    paths = [save_plain(model, folder / f"model-{k}") for k, model in enumerate(models)]
    rows = []
    for _ in range(count):
        prompt, length = torch.randint(2, 5, (), generator=generator), torch.randint(3, 14, (), generator=generator)
        ids = torch.randint(4, VOCAB_SIZE, (1, int(prompt)), generator=generator)
        for _ in range(int(length)):
            writer = models[int(torch.randint(0, len(models), (), generator=generator))]
            with torch.no_grad():
                ids = torch.cat([ids, writer(ids).logits[:, -1:].argmax(-1)], dim=1)
        labels = [-100] * int(prompt) + ids[0, int(prompt) :].tolist()
        rows.append({"input_ids": ids[0].tolist(), "labels": labels})
    dataset, _ = format_rows(Dataset.from_list(rows), tiny_tokenizer())
    score_dataset(dataset, tiny_tokenizer(), paths[1:], folder / "scored")
    return {"model": paths[0], "data": str(folder / "scored"), "assistant": paths[1]}
