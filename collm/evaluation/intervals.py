"""Confidence intervals for what an evaluation reports."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """
    Wilson's score interval for a share of `n` independent trials (Wilson, 1927), 95% by default.

    Unlike the normal interval it holds for small `n` and near 0 and 1. `successes` may be fractional: graded scores in
    [0, 1] vary less than 0/1 outcomes with the same mean, so that the interval is then conservative.

    Returns:
        `tuple[float, float]`: lower and upper end, within [0, 1]; (0, 1) for `n` = 0.
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    # Exact where nothing or everything succeeded: rounding must not put the share outside.
    return (0.0 if successes <= 0 else center - half), (1.0 if successes >= n else center + half)


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap interval for the mean of `values` (Efron, 1979).

    Raises:
        `ValueError`: if `values` is empty.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("an interval needs at least one value")
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        # In blocks, so that memory stays at a few megabytes whatever the number of problems.
        [data[generator.integers(0, data.size, (block, data.size))].mean(axis=1) for block in _blocks(resamples)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    first: Sequence[float | None],
    second: Sequence[float | None],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """
    Difference of two systems on the same problems, resampled by problem (Koehn, 2004).

    Args:
        first (sequence of `float`): score of the first system per problem; None for one that the metric is not for.
        second (sequence of `float`): score of the second system on the same problems in the same order.

    Returns:
        `dict`: "difference" (mean of first - second), "low" and "high" (its interval), "p" (two-sided: twice the share
        of resamples on the other side of zero).

    Raises:
        `ValueError`: if the lengths differ, or no problem has a score of both.
    """
    import numpy as np

    if len(first) != len(second):
        raise ValueError(f"a paired comparison needs the same problems: got {len(first)} and {len(second)} scores")
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    differences = np.array([a - b for a, b in pairs], dtype=np.float64)
    if differences.size == 0:
        raise ValueError("an interval needs at least one value")
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            differences[generator.integers(0, differences.size, (block, differences.size))].mean(axis=1)
            for block in _blocks(resamples)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return {
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * tail)),
    }


def _blocks(total: int, size: int = 500) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
