"""`collm sweep`: the curve of quality against cost, with controls, as JSON, PNG and an HTML report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from collm.evaluation.options import DataOptions, ModelOptions

HELP = "quality against deferral rate and cost, with every control, as JSON, PNG and HTML"
EXAMPLE = """
collm sweep my-checkpoint --assistant Qwen/Qwen2.5-Coder-1.5B-Instruct --data gsm8k/dev.jsonl --task gsm8k \\
    --calibration-problems 64 --limit 264 --rates 0.1 0.2 0.3 0.5 --output results/sweep
collm sweep my-checkpoint --data test.jsonl --calibration-data dev.jsonl --task gsm8k --methods learned random \\
    entropy --output results/short
collm sweep my-checkpoint --data dev.jsonl --task gsm8k --fine-tuned my-sft --weak-supervision my-baseline --output all
"""


@dataclass
class SweepOptions:
    """Which points are measured."""

    output: str = field(metadata={"help": "folder for texts (a killed sweep goes on), sweep.json, PNGs and sweep.html"})
    methods: list[str] = field(
        default_factory=lambda: [
            "base", "assistant", "learned", "random", "entropy", "top_probability", "mixture", "contrastive", "oracle"
        ],
        metadata={"help": "also: margin, ema, scheduled, proxy_tuning (with --untuned)"},
    )  # fmt: skip
    rates: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.5], metadata={"help": "deferral rates, shares of tokens"}
    )
    metric: str | None = field(default=None, metadata={"help": "as in `collm eval`; default: the task's"})
    calibration_problems: int = field(
        default=64, metadata={"help": "the first problems set thresholds; the rest are reported"}
    )
    calibration_data: str | None = field(
        default=None, metadata={"help": "file whose first problems set thresholds; then all of data are reported"}
    )
    tolerance: float = field(
        default=0.01, metadata={"help": "how near the rate of a threshold has to come on the calibration problems"}
    )
    fine_tuned: str | None = field(default=None, metadata={"help": "a fine-tuned base, run alone"})
    weak_supervision: str | None = field(
        default=None, metadata={"help": "a deferral checkpoint trained with weak supervision, at the same rates"}
    )
    untuned: str | None = field(default=None, metadata={"help": "the base before tuning, for proxy_tuning"})
    examples: int = field(default=5, metadata={"help": "texts of each rate shown in the report"})


Arguments = (ModelOptions, DataOptions, SweepOptions)


def run(models: ModelOptions, data: DataOptions, options: SweepOptions) -> int:
    """Measure, write the files; the last line on standard output is one JSON object."""
    from collm.errors import ConfigurationError, require
    from collm.evaluation.sweep import add_comparisons

    require("matplotlib", "eval")  # now, not after hours of writing

    metric = options.metric or data.default_metric()
    if metric is None:
        raise ConfigurationError("no metric: pass --metric, or --task gsm8k, math or bioasq")
    options = dataclasses.replace(options, methods=_methods(models, options))
    points: list[dict[str, Any]] = []
    with closing(models.team(data)) as team:
        sweep = _sweep(team, models, data, options, metric)
        for method in options.methods:
            found = sweep.points(method, options.rates)
            for point in found:
                print(f"{point['method']}: {point['quality']:.1%} at {point['rate']:.1%} deferred", file=sys.stderr)
            points += found
            _save(options, models, data, metric, points)
    # Engines of further checkpoints start when these have given their memory back.
    if options.fine_tuned:
        points += _fine_tuned(sweep, models, options.fine_tuned)
        _save(options, models, data, metric, points)
    if options.weak_supervision:
        points += _weak_supervision(sweep, models, data, options.weak_supervision, options.rates)
    add_comparisons(points)
    results = _save(options, models, data, metric, points)
    _print(points)
    _write_report(Path(options.output), results, sweep, options)
    print(
        json.dumps({"points": [_short(point) for point in points], "report": str(Path(options.output) / "sweep.html")})
    )
    return 0


def _methods(models: ModelOptions, options: SweepOptions) -> list[str]:
    """The methods that can be measured here; one that was asked for and cannot be is refused."""
    from collm.errors import ConfigurationError
    from collm.evaluation.sweep import lacks

    has = (options.untuned is not None, options.calibration_problems > 0, models.engine)
    missing = {method: what for method in options.methods if (what := lacks(method, *has))}
    said = "; ".join(f"{method} needs {what}" for method, what in missing.items())
    if missing and options.methods != SweepOptions(options.output).methods:
        raise ConfigurationError(said)
    if missing:
        print(f"left out: {said}", file=sys.stderr)
    return [method for method in options.methods if method not in missing]


def _sweep(team: Any, models: ModelOptions, data: DataOptions, options: SweepOptions, metric: str) -> Any:
    from collm.checkpoints import read_deferral
    from collm.data.tokenizers import check_same_tokenizer
    from collm.errors import ConfigurationError
    from collm.evaluation.loading import load_plain
    from collm.evaluation.metrics import get_metric
    from collm.evaluation.runner import check_references
    from collm.evaluation.sweep import Sweep

    for name in filter(None, [options.fine_tuned, options.weak_supervision]):  # now, not after hours of writing
        check_same_tokenizer(team.tokenizer, name, base_name=models.checkpoint)
    problems = data.problems(team.tokenizer)
    check_references(problems, get_metric(metric))
    count = options.calibration_problems
    tables = [team.model.config.deferral] if "learned" in options.methods else []
    if options.weak_supervision:
        tables.append(read_deferral(options.weak_supervision))
    for table, rate in itertools.product([] if count else tables, options.rates):
        table.threshold_for_rate(rate)  # or say so now
    if options.calibration_data:
        apart = dataclasses.replace(data, data=options.calibration_data, first=0, limit=count)
        calibration, reported = apart.problems(team.tokenizer), problems
    elif len(problems) > count:
        calibration, reported = problems[:count], problems[count:]
    else:
        raise ConfigurationError(f"{len(problems)} problems, and {count} of them calibrate: none is left to report")
    return Sweep(
        team,
        reported,
        calibration,
        get_metric(metric),
        Path(options.output) / "texts",
        data.settings(problems),
        data.batch_size,
        load_plain(options.untuned, models.dtype, models.device) if options.untuned else None,
        options.tolerance,
    )


def _fine_tuned(sweep: Any, models: ModelOptions, name: str) -> list[dict[str, Any]]:
    from collm.evaluation.loading import load_single

    options = (models.dtype, models.device, models.engine, models.engine_args, sweep.batch_size)
    single = load_single(sweep.team, name, *options)
    with closing(single) as team:
        second = dataclasses.replace(sweep, team=team)
        points = [second.alone("fine-tuned base", team.writer, team.parameters[0])]
    sweep.texts.update(second.texts)
    return points


def _weak_supervision(
    sweep: Any, models: ModelOptions, data: DataOptions, checkpoint: str, rates: list[float]
) -> list[dict[str, Any]]:
    with closing(dataclasses.replace(models, checkpoint=checkpoint).team(data)) as team:
        second = dataclasses.replace(sweep, team=team, prefix="weak supervision ")
        points = second.points("learned", rates)
    sweep.texts.update(second.texts)
    return [{**point, "method": "weak supervision"} for point in points]


def _save(
    options: SweepOptions, models: ModelOptions, data: DataOptions, metric: str, points: list[dict[str, Any]]
) -> dict[str, Any]:
    import torch
    import transformers

    results = {
        "metric": metric,
        "points": points,
        "settings": {**asdict(models), **asdict(data), **asdict(options)},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _short(point: dict[str, Any]) -> dict[str, Any]:
    keys = ("method", "asked_rate", "rate", "quality", "low", "high", "seconds_per_token", "active_parameters")
    return {key: point[key] for key in keys}


def _rows(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "method": p["method"],
            "deferred": f"{p['rate']:.1%}",
            "quality [95%]": f"{p['quality']:.1%} [{100 * p['low']:.1f}, {100 * p['high']:.1f}]",
            "recovered": f"{p['recovered']:.0%}" if p.get("recovered") is not None else None,
            "over random": _difference(p.get("over_random")),
            "over entropy": _difference(p.get("over_entropy")),
            "cut / unparsable": f"{p['truncated']} / {p['unparsable']}",
            "parameters": f"{p['active_parameters'] / 1e9:.2f} B",
            "ms": f"{1000 * p['seconds_per_token']:.0f}" if p["seconds_per_token"] is not None else None,
        }
        for p in points
    ]


def _difference(comparison: dict[str, float] | None) -> str | None:
    if comparison is None:
        return None
    return f"{100 * comparison['difference']:+.1f} [{100 * comparison['low']:+.1f}, {100 * comparison['high']:+.1f}]"


def _print(points: list[dict[str, Any]]) -> None:
    rows = _rows(points)
    widths = {key: max(len(key), *(len(str(row[key] or "-")) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("  ".join(str(row[key] if row[key] is not None else "-").ljust(widths[key]) for key in rows[0]).rstrip())


def _write_report(folder: Path, results: dict[str, Any], sweep: Any, options: SweepOptions) -> None:
    from collm.evaluation.trajectory import views_of
    from collm.reporting import DeferralStatistics, plots, table, token_view, write_page
    from collm.reporting.html import figure, heading, paragraph

    points, settings = results["points"], results["settings"]
    parts = [
        paragraph(
            f"{points[0]['problems']} problems of {settings['data']}, at most {settings['max_new_tokens']} new tokens, "
            f"greedy, batches of {settings['batch_size']}. Thresholds come from the checkpoint's calibration where "
            f"it has the rate, else from {options.calibration_problems} other problems."
        ),
        table(
            _rows(points),
            "Rates are realised ones; differences in percentage points with paired 95% intervals; costs per token",
        ),
    ]
    axes = [
        ("rate", "tokens written by the assistant", "sweep-rate.png"),
        ("active_parameters", "parameters per token, on average", "sweep-parameters.png"),
        ("seconds_per_token", "time per token, measured", "sweep-seconds.png"),
    ]
    for x, label, file in axes:
        drawing = plots.cost_quality_figure(points, x, label, results["metric"])
        plots.save_png(drawing, folder / file)
        parts.append(figure(plots.svg(drawing)))
    for point in points:
        if point["method"] == "learned" and point["texts"] in sweep.texts:
            notes = ["" if score is None else f"{results['metric']}: {score:.3g}" for score in point["scores"]]
            views = views_of(sweep.team, sweep.problems, sweep.texts[point["texts"]], notes, options.examples)
            statistics = DeferralStatistics.of(views)
            parts += [
                heading(f"Learned, {point['rate']:.1%} deferred"),
                table(statistics.kind_rows(), "Which tokens are deferred"),
                *(token_view(view) for view in views[: options.examples]),
            ]
    write_page(folder / "sweep.html", f"{sweep.team.names[0]} with {', '.join(sweep.team.names[1:])}", *parts)
