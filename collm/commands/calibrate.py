"""`collm calibrate`: from a budget or a goal to a threshold, measured on what the pair writes."""

from __future__ import annotations

import functools
import json
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collm.evaluation.options import DataOptions, ModelOptions

HELP = "measure thresholds for deferral rates on what the models write together"
EXAMPLE = """
collm calibrate my-checkpoint --assistant Qwen/Qwen2.5-Coder-1.5B-Instruct --data validation.jsonl --task gsm8k
collm calibrate my-checkpoint --data validation.jsonl --task gsm8k --target-rate 0.2      # default threshold: 20%
collm calibrate my-checkpoint --data validation.jsonl --task gsm8k --metric gsm8k --cost 0.1
collm calibrate my-checkpoint --data validation.jsonl --task gsm8k --roc --output calibration   # with plots
"""


@dataclass
class CalibrateOptions:
    """What is looked for. One of target_rate, metric and roc also becomes the checkpoint's default threshold."""

    rates: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        metadata={"help": "rates of the table, shares of tokens"},
    )
    target_rate: float | None = field(default=None, metadata={"help": "make this rate the default"})
    metric: str | None = field(
        default=None, metadata={"help": "make the best point by this metric the default; as in `collm eval`"}
    )
    cost: float = field(
        default=0.1, metadata={"help": "with --metric: quality that saving all assistant tokens would be worth"}
    )
    roc: bool = field(
        default=False,
        metadata={"help": 'ROC of the head against "the models differ"; its Youden point becomes the default'},
    )
    tolerance: float = field(default=0.01, metadata={"help": "how near a measured rate has to come"})
    output: str | None = field(
        default=None,
        metadata={"help": "folder for texts (a killed run goes on), calibration.json and calibration.html"},
    )
    dry_run: bool = field(default=False, metadata={"help": "leave the checkpoint as it is"})


Arguments = (ModelOptions, DataOptions, CalibrateOptions)


def run(models: ModelOptions, data: DataOptions, options: CalibrateOptions) -> int:
    """Calibrate, save, print the table; the last line on standard output is one JSON object."""
    from collm.errors import CheckpointError, ConfigurationError, require
    from collm.evaluation.metrics import get_metric

    goals = [name for name in ("target_rate", "metric", "roc") if getattr(options, name)]
    if len(goals) > 1:
        raise ConfigurationError(f"{' and '.join(goals)} each choose the default threshold; give one of them")
    if not options.dry_run and not (Path(models.checkpoint) / "config.json").is_file():
        raise CheckpointError(
            f'"{models.checkpoint}" is no local folder to save a calibration in. `hf download {models.checkpoint} '
            "--local-dir FOLDER` first and calibrate the folder, or pass --dry-run."
        )
    metric = get_metric(options.metric) if options.metric else None
    if options.output:
        require("matplotlib", "eval")
    with closing(models.team(data)) as team:
        return _calibrate(team, models, data, options, metric)


def _calibrate(team: Any, models: ModelOptions, data: DataOptions, options: CalibrateOptions, metric: Any) -> int:
    from collm.calibration import calibrate_rates, save_calibration
    from collm.evaluation.runner import check_references
    from collm.evaluation.trajectory import Trajectory

    problems = data.problems(team.tokenizer)
    if metric is not None:
        check_references(problems, metric)
    folder = Path(options.output) / "texts" if options.output else None
    trajectory = Trajectory(team, problems, batch_size=data.batch_size, folder=folder, settings=data.settings(problems))
    rates = sorted({*options.rates, *([] if options.target_rate is None else [options.target_rate])})
    report = functools.partial(print, flush=True)
    rows, runs = calibrate_rates(trajectory, rates, options.tolerance, report=report, known=trajectory.finished())
    # A run that never defers has an infinite threshold; 1 means the same and is JSON.
    rows = [{**row, "threshold": min(row["threshold"], 1.0)} for row in rows]
    print(_table(rows))
    results: dict[str, Any] = {
        "calibration": rows,
        "runs": [{"threshold": min(r.threshold, 1.0), "rate": r.rate} for r in runs],
    }

    deferral = team.model.config.deferral
    kept = {row["rate"] for row in rows}  # where scores are tied, not the rate that was asked
    dropped = [row["rate"] for row in deferral.calibration if row["rate"] not in kept]
    if dropped and not options.dry_run:
        print(f"the table's rows for {', '.join(f'{rate:.1%}' for rate in dropped)} are gone: `--rates` names all rows")
    deferral.calibration = rows
    deferral.assistants = deferral.assistants or list(models.assistant)
    if not options.dry_run:  # before the goal is worked out, which can fail
        save_calibration(models.checkpoint, deferral)
    if options.target_rate is not None:
        deferral.threshold = _of_rate(rows, options.target_rate)
    if metric is not None:
        results["by_metric"] = _by_metric(trajectory, metric, options, problems)
        deferral.threshold = results["by_metric"]["chosen"]["threshold"]
    if options.roc:
        results["roc"], probabilities, differs = _roc(models, trajectory)
        deferral.threshold = results["roc"]["youden"]["threshold"]
    results["threshold"] = deferral.threshold
    if not options.dry_run:
        save_calibration(models.checkpoint, deferral)
        print(f"saved in {Path(models.checkpoint) / 'config.json'}")
    if options.output:
        folder = Path(options.output)
        (folder / "calibration.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        _write_page(folder / "calibration.html", results, (probabilities, differs) if options.roc else None)
    print(json.dumps({"threshold": deferral.threshold, "rates": {row["rate"]: row["threshold"] for row in rows}}))
    return 0


def _of_rate(rows: list[dict[str, Any]], rate: float) -> float:
    row = min(rows, key=lambda row: abs(row["rate"] - rate))
    if row["rate"] != rate:
        print(f"no run came within the tolerance of {rate:.1%}: the default becomes the threshold of {row['rate']:.1%}")
    return row["threshold"]


def _by_metric(trajectory: Any, metric: Any, options: CalibrateOptions, problems: list) -> dict[str, Any]:
    from collm.calibration import choose_by_metric
    from collm.evaluation.runner import summarise

    name, cost = options.metric, options.cost
    points = []
    for threshold, generations in sorted(trajectory.generations.items(), reverse=True):
        summary = summarise(problems, generations, metric)
        value = summary["metrics"][summary["headline"]]
        points.append(
            {
                "threshold": min(threshold, 1.0),  # infinite stands for never, and so does 1
                "rate": summary["deferral_rate"],
                "quality": value["mean"],
                "low": value["low"],
                "high": value["high"],
                "truncated": summary["truncated"],
                "unparsable": summary["unparsable"],
            }
        )
        print(f"threshold {threshold:.6g}: {name} {value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}] "
              f"at {summary['deferral_rate']:.1%} deferred")  # fmt: skip
    chosen = dict(choose_by_metric(points, cost))
    print(f"best {name} - {cost} x rate: threshold {chosen['threshold']:.6g}, chosen on these problems: report others")
    return {"metric": name, "cost": cost, "points": points, "chosen": chosen}


def _roc(models: ModelOptions, trajectory: Any) -> tuple[dict[str, Any], list[float], list[bool]]:
    """ROC along the text of the run whose rate is nearest to 20%."""
    import torch

    from collm.calibration import roc
    from collm.evaluation.likelihood import score_texts
    from collm.evaluation.loading import load_plain
    from collm.evaluation.trajectory import texts_of

    def distance(generations: list) -> float:
        tokens = sum(len(g.token_ids) for g in generations)
        return abs(sum(g.deferred for g in generations) / tokens - 0.2)

    generations = min(trajectory.generations.values(), key=distance)
    team = trajectory.team
    names = models.assistant or team.model.config.deferral.assistants
    assistants = (
        team.writer.assistants
        if models.engine == "transformers"
        else [load_plain(name, models.dtype, models.device) for name in names]
    )
    scores = score_texts(team.model, assistants, texts_of(trajectory.problems, generations))
    known = torch.cat([s.differs[1] for s in scores])
    probabilities = torch.cat([s.deferral_probs for s in scores])[known].tolist()
    differs = torch.cat([s.differs[0] for s in scores])[known].tolist()
    result = roc(probabilities, differs)
    youden = result["youden"]
    print(
        f"ROC: AUC {result['auc']:.4f}, the models differ on {result['differ']:.1%} of {result['tokens']} tokens\n"
        f"Youden's point: threshold {youden['threshold']:.6g} defers {youden['rate']:.1%} of all tokens, "
        f"{youden['true_positive_rate']:.1%} of those where they differ"
    )
    return result, probabilities, differs


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'rate':>7} {'threshold':>12} {'measured':>9}  95% interval over prompts"]
    lines += [
        f"{row['rate']:>7.1%} {row['threshold']:>12.6g} {row['realised']:>9.1%}  {row['low']:.1%} - {row['high']:.1%}"
        for row in rows
    ]
    widest = max(row["high"] - row["low"] for row in rows) / 2
    if widest > 0.02:
        lines.append(f"Rates are known to about {widest:.1%}: more prompts would make them surer.")
    return "\n".join(lines)


def _write_page(path: Path, results: dict[str, Any], tokens: tuple[list[float], list[bool]] | None) -> None:
    from collm.reporting import plots, table, write_page
    from collm.reporting.html import figure, heading

    rows = [
        {
            "rate": f"{row['rate']:.1%}",
            "threshold": f"{row['threshold']:.6g}",
            "measured": f"{row['realised']:.1%}",
            "95% interval": f"{row['low']:.1%} – {row['high']:.1%}",
            "texts": row["texts"],
            "tokens": row["tokens"],
        }
        for row in results["calibration"]
    ]
    parts = [table(rows, "Thresholds for deferral rates, measured on what the models wrote together")]
    if "by_metric" in results:
        points = [{"method": "learned", **point} for point in results["by_metric"]["points"]]
        parts += [heading("Quality"), figure(plots.svg(plots.cost_quality_figure(points)))]
    if tokens is not None:
        parts += [heading("Where the models differ"), figure(plots.svg(plots.roc_figure(results["roc"])))]
        parts.append(figure(plots.svg(plots.calibration_figure(*tokens)), "Marker area: number of tokens"))
    write_page(path, "Calibration", *parts)
