"""The few collective operations that training needs; each is the identity where there is one process."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave() -> None:
    """End the process group together: a process that exits first can abort, and takes the one down that still saves."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        gc.collect()  # models that hold the group
        dist.destroy_process_group()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows `(n, ...)` of every process, in order of rank, on the CPU; n may differ, the rest of the shape may not."""
    if not is_distributed():
        return rows.cpu()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    longest = max(int(n) for n in counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)].cpu() for part, n in zip(gathered, counts, strict=True)])


def sum_over_processes(values: Tensor) -> Tensor:
    """Elementwise sum of every process's `values`, on every process."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values)
    return values


def from_main_process(value: Any) -> Any:
    """The main process's picklable `value`, on every process."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
