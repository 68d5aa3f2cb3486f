"""
Thresholds that hold: from a budget ("a fifth of the tokens") or a goal to the threshold that `generate` uses.

Deferring changes the text, and with it every later decision, so that a rate measured on the base's own text or on
reference text does not hold. [`calibrate_rates`] measures on what the pair writes together:

1. Begin with the scores d_t along the base's own text: a first guess of the threshold.
2. Generate at the guess. The realised rate is exact for these prompts; the scores along this text say what other
   thresholds would do *near it*.
3. Estimate the rate at any threshold from the runs on both sides of it ([`estimated_rates`]) and solve for the asked
   rate. Repeat until a run's realised rate is within the tolerance.

Decisions are calibrated as they are taken: a token is deferred where its score is strictly above the threshold, and the
threshold lies between two scores that occurred, never on one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collm.configuration import DeferralConfig
from collm.errors import CalibrationError, CheckpointError, ConfigurationError
from collm.files import write_json

RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass
class Run:
    """
    What was measured along the texts of one threshold.

    Args:
        threshold (`float`): the threshold of the run.
        scores (`list[np.ndarray]`): for each text, the router's score of every token, float64; a token is asked
            about where its score exceeds the threshold. For the learned head the score is d_t.
        asked (`list[int]`, *optional*): for each text, how many tokens were deferred in fact; by default, how many
            scores exceed the threshold.
    """

    threshold: float
    scores: list[np.ndarray]
    asked: list[int] | None = None

    def __post_init__(self) -> None:
        self.sorted = np.sort(np.concatenate([np.asarray(s, dtype=np.float64) for s in self.scores] or [np.empty(0)]))
        if self.sorted.size == 0:
            raise CalibrationError("a run without a single token says nothing about a threshold")
        if self.asked is None:
            self.asked = [int((np.asarray(s) > self.threshold).sum()) for s in self.scores]

    def share_above(self, thresholds: Any) -> Any:
        """Share of this run's tokens whose score is above each threshold: what other thresholds would do on its
        texts."""
        above = self.sorted.size - np.searchsorted(self.sorted, thresholds, side="right")
        return above / self.sorted.size

    @property
    def rate(self) -> float:
        """`float`: the share of tokens deferred."""
        return sum(self.asked or []) / self.sorted.size

    def interval(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the rate, whole texts resampled: tokens of one text are not independent."""
        asked = np.array(self.asked, dtype=np.float64)
        tokens = np.array([len(s) for s in self.scores], dtype=np.float64)
        chosen = np.random.default_rng(seed).integers(0, len(tokens), (resamples, len(tokens)))
        rates = asked[chosen].sum(axis=1) / np.maximum(tokens[chosen].sum(axis=1), 1)
        low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def calibrate_rates(
    run_at: Callable[[float], Run],
    rates: Sequence[float] = RATES,
    tolerance: float = 0.01,
    runs_per_rate: int = 4,
    report: Callable[[str], None] = lambda line: None,
    known: Sequence[Run] = (),
) -> tuple[list[dict[str, Any]], list[Run]]:
    """
    The table from rates to thresholds, measured on the collaborative trajectory.

    Args:
        run_at (callable): generates at a threshold and returns the [`Run`]; first at infinity, which never defers.
        rates (sequence of `float`, *optional*): the rates to calibrate, each strictly between 0 and 1.
        tolerance (`float`, *optional*, defaults to 0.01): how near a realised rate has to come, as a share of tokens;
            half of the rate is the most.
        runs_per_rate (`int`, *optional*, defaults to 4): give up on a rate after that many runs for it.
        report (callable, *optional*): told about each run in one line.
        known (sequence of [`Run`], *optional*): runs on the same prompts that exist already, for whatever rates.

    Returns:
        `tuple[list[dict], list[Run]]`: the rows of `DeferralConfig.calibration`, ascending in rate, and every run. A
        row has "rate", "threshold", and what proves it: "realised" (rate of the nearest run), "low" and "high" (its 95%
        interval over prompts), "tokens", "texts". Where scores are tied so that a rate cannot be had, the row's "rate"
        is the realised one.

    Raises:
        [`ConfigurationError`]: a rate outside (0, 1).
        [`CalibrationError`]: the router's score is the same for all tokens.
    """
    for rate in rates:
        if not 0 < rate < 1:
            raise ConfigurationError(f"rates to calibrate are shares of tokens between 0 and 1; got {rate}")
    start = run_at(np.inf)
    report(f"base alone: {start.sorted.size} tokens")
    if start.sorted[0] == start.sorted[-1]:
        raise CalibrationError(
            f"every token has the score {start.sorted[0]:.6g}: the head is not trained (a new head says 0.5 everywhere)"
        )
    runs = [start, *known]
    for run in known:
        report(f"known already: threshold {run.threshold:.6g} realised {run.rate:.1%}")
    # From the middle outwards, so that extreme rates are estimated from runs near them.
    for rate in sorted(rates, key=lambda r: abs(r - float(np.median(rates)))):
        for _ in range(runs_per_rate):
            threshold = solve(runs, rate)
            if _nearest(runs, rate, tolerance) or any(run.threshold == threshold for run in runs):
                break
            runs.append(run_at(threshold))
            report(f"asked {rate:.1%}: threshold {threshold:.6g} realised {runs[-1].rate:.1%}")
    rows = [_row(runs, rate, tolerance) for rate in sorted(set(rates))]
    return _monotone(rows), runs


def solve(runs: Sequence[Run], rate: float) -> float:
    """The threshold whose [`estimated_rates`] is nearest to `rate`."""
    candidates = _between_scores(np.unique(np.concatenate([run.sorted for run in runs])))
    return float(candidates[np.argmin(np.abs(estimated_rates(runs, candidates) - rate))])


def estimated_rates(runs: Sequence[Run], thresholds: np.ndarray) -> np.ndarray:
    """
    Estimated rate on the collaborative trajectory at each threshold.

    Between two runs, what both texts say is joined, weighted by nearness (by the share of tokens whose scores lie
    between the two thresholds), so that the estimate is exact at either. Below the lowest run, that run's text, its
    change scaled by how much of a predicted change came true between the two lowest runs: where a deferral makes the
    next one less likely, it is less than all of it.
    """
    ordered = sorted(runs, key=lambda run: run.threshold)
    ends = [run.threshold for run in ordered]
    lowest = ordered[0]
    response = 1.0
    if len(ordered) > 1:
        predicted = ordered[1].share_above(ends[0]) - ordered[1].share_above(ends[1])
        happened = lowest.share_above(ends[0]) - ordered[1].share_above(ends[1])
        response = float(np.clip(happened / predicted, 0.25, 2.0)) if predicted > 0 else 1.0
    reached = lowest.share_above(ends[0])
    estimates = reached + response * (lowest.share_above(thresholds) - reached)
    for low, high, start, end in zip(ordered, ordered[1:], ends, ends[1:], strict=False):
        mass_low = low.share_above(start) - low.share_above(thresholds)
        mass_high = high.share_above(thresholds) - high.share_above(end)
        between = mass_low + mass_high
        weight = np.divide(mass_low, between, out=np.full_like(between, 0.5), where=between > 0)  # of the higher run
        mixed = (1 - weight) * low.share_above(thresholds) + weight * high.share_above(thresholds)
        estimates = np.where((thresholds >= start) & (thresholds <= end), mixed, estimates)
    return np.clip(np.where(thresholds > ends[-1], ordered[-1].share_above(thresholds), estimates), 0, 1)


def roc(scores: Sequence[float] | np.ndarray, differs: Sequence[bool] | np.ndarray) -> dict[str, Any]:
    """
    Receiver operating characteristic of "defer where score > threshold" against "the models differ".

    Returns:
        `dict`: "false_positive_rate", "true_positive_rate" and "threshold" (lists, thresholds descending), "auc" (ties
        count half), "tokens", "differ" (share of tokens), and "youden": the point with the largest J = TPR - FPR
        (Youden, 1950), as "threshold", "true_positive_rate", "false_positive_rate", "rate".

    Raises:
        [`CalibrationError`]: the models differ on no token, or on all.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(differs, dtype=bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        raise CalibrationError(f"a ROC needs both kinds of tokens; the models differ on {positives} of {labels.size}")
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), labels.size - 1)
    true = np.append(0, np.cumsum(labels[order])[last_of_tie]) / positives
    false = np.append(0, np.cumsum(~labels[order])[last_of_tie]) / negatives
    thresholds = _between_scores(np.unique(scores))[::-1]
    best = int(np.argmax(true - false))
    return {
        "false_positive_rate": false.tolist(),
        "true_positive_rate": true.tolist(),
        "threshold": thresholds.tolist(),
        "auc": float(np.trapezoid(true, false)),
        "tokens": int(labels.size),
        "differ": positives / labels.size,
        "youden": {
            "threshold": float(thresholds[best]),
            "true_positive_rate": float(true[best]),
            "false_positive_rate": float(false[best]),
            "rate": float((scores > thresholds[best]).mean()),
        },
    }


def choose_by_metric(points: Sequence[Mapping[str, Any]], cost: float) -> Mapping[str, Any]:
    """
    The point with the largest `quality - cost * rate`; of equals the cheapest.

    Args:
        points (sequence of mappings): with "rate" and "quality".
        cost (`float`): quality that one would give to save all of the assistant's tokens; 0 takes the best quality.
    """
    return max(points, key=lambda point: (point["quality"] - cost * point["rate"], -point["rate"]))


def save_calibration(checkpoint: str | Path, deferral: DeferralConfig) -> None:
    """
    Writes `deferral` into the config.json of a checkpoint folder, leaving everything else in it as it is. The file is
    replaced in one step: who reads it meanwhile sees the old or the new one.

    Raises:
        [`CheckpointError`]: no folder with a config.json (a name on the Hub has to be downloaded first).
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"there is no {path} to save the calibration in. For a checkpoint on the Hub, `hf download {checkpoint} "
            "--local-dir FOLDER` first and calibrate the folder."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    config["deferral"] = dict(deferral)
    write_json(path, config, sort_keys=True)


def _between_scores(distinct: np.ndarray) -> np.ndarray:
    """
    Thresholds that cut between neighbours of the ascending `distinct` scores, one below all and the highest score
    itself.

    Comparisons happen in float32: where the middle of two scores would round to one of them, the lower one is taken,
    which "strictly above" keeps out.
    """
    middle = ((distinct[:-1] + distinct[1:]) / 2).astype(np.float32).astype(np.float64)
    lower = distinct[:-1]
    middle = np.where((middle > lower) & (middle < distinct[1:]), middle, lower)
    below = distinct[0] - max(1e-3, 1e-3 * abs(distinct[0]))
    return np.concatenate([[below], middle, distinct[-1:]])


def _nearest(runs: Sequence[Run], rate: float, tolerance: float) -> Run | None:
    near = [run for run in runs if abs(run.rate - rate) <= min(tolerance, rate / 2)]  # never asking holds no rate
    return min(near, key=lambda run: abs(run.rate - rate), default=None)


def _row(runs: Sequence[Run], rate: float, tolerance: float) -> dict[str, Any]:
    held = _nearest(runs, rate, tolerance)
    run = held or min(runs, key=lambda run: abs(run.rate - rate))
    low, high = run.interval()
    return {
        # Not held: scores are tied, or the text changes in leaps. Then only what was realised is true.
        "rate": rate if held else run.rate,
        "threshold": solve(runs, rate) if held else run.threshold,
        "realised": round(run.rate, 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "tokens": int(run.sorted.size),
        "texts": len(run.scores),
    }


def _monotone(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ascending in rate, one row per rate, thresholds never rising with the rate."""
    table: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: row["rate"]):
        if table and row["rate"] <= table[-1]["rate"]:
            continue
        if table:
            row["threshold"] = min(row["threshold"], table[-1]["threshold"])
        table.append(row)
    return table
