"""Do calibrated rates hold on unseen prompts? Calibrates on some problems, then generates others at each rate.

    python benchmarks/quality/rates.py CHECKPOINT --assistant BIG --data gsm8k/dev.jsonl --task gsm8k \\
        --calibration 64 --limit 164 --rates 0.1 0.2 0.3 0.5 --output rates

A run that was killed goes on. The last line on standard output is one JSON object; results.json has it too, with the
rate that a threshold read off the reference answers realises, for comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers

from collm.calibration import Run, calibrate_rates, solve
from collm.configuration import DeferralConfig
from collm.data.formatting import format_rows
from collm.evaluation.options import DataOptions, ModelOptions
from collm.evaluation.trajectory import Trajectory, reference_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--assistant", action="append", default=[])
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--calibration", type=int, default=64, help="problems that set the thresholds")
    parser.add_argument("--limit", type=int, default=164, help="problems in all")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    data = DataOptions(
        options.data,
        options.task,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    models = ModelOptions(options.checkpoint, options.assistant, engine=options.engine)
    team = models.team(data)
    problems = data.problems(team.tokenizer)
    folder, settings = options.output / "texts", data.settings(problems)
    known, unseen = problems[: options.calibration], problems[options.calibration :]

    start = references(team, data, options.calibration)
    first = Trajectory(team, known, batch_size=options.batch_size, folder=folder / "calibration", settings=settings)
    rows, runs = calibrate_rates(first, options.rates, start, report=lambda line: print(line, flush=True))
    table = DeferralConfig(calibration=rows)
    second = Trajectory(team, unseen, batch_size=options.batch_size, folder=folder / "unseen", settings=settings)
    results = []
    for rate in options.rates:
        threshold = table.threshold_for_rate(rate)
        run = second(threshold)
        low, high = run.interval()
        results.append(
            {
                "asked": rate,
                "threshold": threshold,
                "realised_on_unseen": run.rate,
                "low": low,
                "high": high,
                "error": run.rate - rate,
                "off_trajectory": off_trajectory(second, start, rate),
            }
        )
        print(results[-1], flush=True)
    team.close()
    report = {
        "rates": results,
        "largest_error": max(abs(row["error"]) for row in results),
        "calibration_runs": len([run for run in runs if run.realised]),
        "calibration_problems": len(known),
        "unseen_problems": len(unseen),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (options.output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def references(team, data: DataOptions, count: int) -> Run:
    """d_t along the reference answers of the calibration problems."""
    from datasets import Dataset

    rows, _ = format_rows(Dataset.from_list(data.rows()[:count]), team.tokenizer, data.task)
    return reference_run(team.model, [(row["input_ids"], row["labels"]) for row in rows])


def off_trajectory(trajectory: Trajectory, start: Run, rate: float) -> dict[str, float]:
    """The rate that a threshold read off the reference answers realises, for comparison."""
    threshold = solve([start], rate)
    return {"threshold": threshold, "realised_on_unseen": trajectory(threshold).rate}


if __name__ == "__main__":
    main()
