"""Target data on disk: scored once by the frozen base, memory-mapped afterwards, resumable when killed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from collm.errors import DataFormatError, ScoreMismatchError
from collm.files import write_json

from .distributed import is_distributed, processes
from .targets import Collator, TargetData, deferral_model, frozen, row_order, score_batch

MANIFEST = "manifest.json"
WINDOW = 32  # batches whose rows are sorted by length together


def cache_targets(
    model: Any,
    dataset: Any,
    collator: Collator,
    folder: str | os.PathLike[str],
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> TargetData:
    """Score all target tokens of a data set into a folder; what is there already is not scored again.

    1. Plan: rows in a random order in the files, batches of similar length.
    2. Say in a manifest what the files belong to, and allocate them whole: a disk that is too small says so now.
    3. Each process scores every n-th batch that is not marked as done, writes its targets where their rows belong, then
       marks it.

    A process killed at any point, and any number of processes afterwards, go on from the marks.

    Args:
        model, dataset, collator, batch_size, seed: as in [`~collm.training.targets.collect_targets`].
        folder (`str`): `4 F + 13 + 5 K` bytes for each target token go there.

    Returns:
        [`TargetData`] whose tensors are memory-mapped files, in the order of `collect_targets`.

    Raises:
        ScoreMismatchError: the folder holds the targets of another model, data set or plan.
        DataFormatError: as in `collect_targets`.
        OSError: no space, or no permission to write.
    """
    rank, world = processes()
    folder, deferral = Path(folder), deferral_model(model).config.deferral

    # 1. The plan is the same for every process and every run.
    counts, lengths, fingerprint = _survey(dataset)
    total = int(counts.sum())
    if total == 0:
        raise DataFormatError("the data has no target tokens: every label is -100.")
    order = np.array(row_order(len(lengths), seed))
    batches = plan_batches(lengths, batch_size, order)
    starts = np.empty(len(order), np.int64)  # of each row's targets in the files
    starts[order] = np.cumsum(counts[order]) - counts[order]

    # 2. Manifest and files.
    F = deferral_model(model).deferral_head.in_features
    manifest = {
        "data": fingerprint,
        "base": base_fingerprint(model),
        "features": deferral.features,
        "num_assistants": deferral.num_assistants,
        "batch_size": batch_size,
        "seed": seed,
        "layout": 2,  # 1 had the rows in the order of the batches, and so the shortest last
    }
    if rank == 0:
        _claim(folder, manifest, _layout(total, len(batches), F, deferral.num_assistants))
    if is_distributed():
        dist.barrier()
    files = {
        name: np.memmap(folder / f"{name}.bin", dtype, "r+", shape=shape)
        for name, (dtype, shape) in _layout(total, len(batches), F, deferral.num_assistants).items()
    }
    done = files.pop("done")

    # 3. Score what is missing.
    mine = [b for b in range(rank, len(batches), world) if not done[b]]
    finished = sum(int(counts[rows].sum()) for b, rows in enumerate(batches) if done[b])
    bar = tqdm(total=total, initial=finished, unit="tok", desc="base scores targets", disable=not progress or rank > 0)
    with frozen(model), bar:
        for b in mine:
            part = score_batch(model, collator([dataset[int(i)] for i in batches[b]]), batches[b].tolist())
            where = np.concatenate([np.arange(starts[row], starts[row] + counts[row]) for row in batches[b]])
            for name, column in part.columns().items():
                files[name][where] = column.cpu().numpy()
                files[name].flush()
            done[b] = 1
            done.flush()
            bar.update(len(part) * world)
    if is_distributed():
        dist.barrier()
    return TargetData(**{name: _as_tensor(values) for name, values in files.items()})


def plan_batches(lengths: np.ndarray, batch_size: int, order: np.ndarray) -> list[np.ndarray]:
    """Rows of each batch: those of `order`, sorted by length inside of windows of a few batches, longest first."""
    batches = []
    for first in range(0, len(order), batch_size * WINDOW):
        window = order[first : first + batch_size * WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return batches


def _layout(tokens: int, batches: int, features: int, num_assistants: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Column -> numpy dtype and shape."""
    return {
        "features": (np.float32, (tokens, features)),
        "base_logprobs": (np.float32, (tokens,)),
        "base_correct": (np.bool_, (tokens,)),
        "assistant_logprobs": (np.float32, (tokens, num_assistants)),
        "assistant_correct": (np.bool_, (tokens, num_assistants)),
        "rows": (np.int64, (tokens,)),
        "done": (np.uint8, (batches,)),
    }


def _claim(folder: Path, manifest: dict[str, Any], layout: dict[str, tuple[Any, tuple[int, ...]]]) -> None:
    path = folder / MANIFEST
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in manifest if found.get(key) != manifest[key]]
        if different:
            raise ScoreMismatchError(
                f"{folder} holds features of something else; different: {', '.join(different)}. Choose another folder, "
                "or remove that one to score again."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, (dtype, shape) in layout.items():
        with open(folder / f"{name}.bin", "wb") as file:
            # A sparse file on a full disk kills the process (SIGBUS) at the first page that finds no room.
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    write_json(path, manifest)


def _as_tensor(values: np.memmap) -> Tensor:
    return torch.from_numpy(values)


def _survey(dataset: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """Targets of each row, length of each row, and a hash of what is scored."""
    digest = hashlib.sha256()
    counts, lengths = [], []
    for row in dataset:
        labels = np.asarray(row["labels"], dtype=np.int64)
        counts.append(int((labels[1:] != -100).sum()))
        lengths.append(len(labels))
        digest.update(np.asarray(row["input_ids"], dtype=np.int64).tobytes() + labels.tobytes())
        digest.update(np.asarray(row.get("assistant_logprobs", []), dtype=np.float32).tobytes())
    return np.asarray(counts), np.asarray(lengths), digest.hexdigest()


def base_fingerprint(model: Any) -> str:
    """Hash of names, shapes and 64 evenly spread values of every parameter but the head's."""
    digest = hashlib.sha256()
    for name, parameter in deferral_model(model).named_parameters():
        if "deferral_head" in name:
            continue
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 64)][:64]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()
