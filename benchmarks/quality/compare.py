"""One table and one curve from several sweeps over the same problems.

    python -m benchmarks.quality.compare results/gsm8k "results/gsm8k-joint=trained together" --figure curve.png

Each argument is a folder of `collm sweep`, with words for the system behind `=` where it is another base or head: its
learned rows are called by them, its others "base, trained together". Rows that two folders share appear once.
"Recovered" is the share of the distance from the first `base` to the first `assistant`. Differences are paired
bootstraps over problems against the control nearest in realised rate, where one is within --near points of it.

`--further` names folders of the same systems on other problems: rows that both have (method and asked rate) are joined,
and only those are shown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from collm.evaluation.intervals import paired_bootstrap, wilson_interval
from collm.reporting import plots

CONTROLS = ("random", "entropy", "assistant")
HEADINGS = (
    "who writes", "asked", "deferred", "right [95%]", "recovered", *(f"over {name}" for name in CONTROLS), "cut",
    "tokens per text",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", metavar="FOLDER[=WORDS]")
    parser.add_argument("--further", nargs="+", default=[], metavar="FOLDER[=WORDS]", help="on other problems")
    parser.add_argument("--problems", type=int, help="the first so many of each; rates and cut answers stay all's")
    parser.add_argument("--near", type=float, default=4.0, help="points of rate between a row and its control")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()

    points = read(arguments.sweeps, arguments.problems)
    if arguments.further:
        points = joined(points, read(arguments.further, arguments.problems))
    ends = [point["quality"] for name in ("base", "assistant") for point in points if point["method"] == name]
    print(f"| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|")
    for point in sorted(points, key=lambda point: (point["rate"], point["quality"])):
        together = point["rate"] > 0 and point["method"] != "assistant"
        cells = [
            point["method"],
            percent(point["asked_rate"]) if point["asked_rate"] else "",
            percent(point["rate"]) if together else "",
            f"{percent(point['quality'])} [{100 * point['low']:.1f}, {100 * point['high']:.1f}]",
            f"{(point['quality'] - ends[0]) / (ends[1] - ends[0]):.0%}" if len(ends) == 2 else "",
            *(difference(point, control(points, point, name, arguments.near / 100)) for name in CONTROLS),
            f"{point['truncated']}",
            f"{point['tokens'] / point['problems']:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")
    if arguments.figure:
        figure = plots.cost_quality_figure(points, "rate", "tokens written by the assistant", "right")
        plots.save_png(figure, arguments.figure)


def read(sweeps: list[str], problems: int | None = None) -> list[dict[str, Any]]:
    """The points of all sweeps, each with its words in "method", shared ones once; scores of the first `problems`.

    Raises:
        SystemExit: the sweeps are of different problems or metrics.
    """
    points: list[dict[str, Any]] = []
    kinds = set()
    for sweep in sweeps:
        folder, _, words = sweep.partition("=")
        results = json.loads(Path(folder, "sweep.json").read_text(encoding="utf-8"))
        settings = results["settings"]
        first = settings["first"] + (0 if settings.get("calibration_data") else settings["calibration_problems"])
        for point in results["points"]:
            point["first"] = first
            if problems is not None:
                point["tokens"] *= problems / point["problems"]
                point["scores"] = point["scores"][:problems]
                point["problems"] = len(point["scores"])
                point["quality"] = sum(point["scores"]) / point["problems"]
                point["low"], point["high"] = wilson_interval(sum(point["scores"]), point["problems"])
            if words and point["method"] != "assistant":
                point["method"] = words if point["method"] == "learned" else f"{point['method']}, {words}"
            if all(point["method"] != other["method"] or point["rate"] != other["rate"] for other in points):
                points.append(point)
            kinds.add((results["metric"], settings["data"], first, point["problems"]))
    if len(kinds) > 1:
        raise SystemExit(f"different problems or metrics: {kinds}")
    return points


def joined(points: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Rows of one method and asked rate on two sets of problems, as rows on both.

    Raises:
        SystemExit: some problems are in both sets.
    """
    ranges = [range(row["first"], row["first"] + row["problems"]) for row in (points[0], others[0])]
    if set(ranges[0]) & set(ranges[1]):
        raise SystemExit(f"--further: the same problems twice, from {ranges[0].start} and from {ranges[1].start}")
    rows = []
    for one in points:
        for other in others:
            if (one["method"], one["asked_rate"]) == (other["method"], other["asked_rate"]):
                row = {**one, **{key: one[key] + other[key] for key in ("problems", "tokens", "truncated", "scores")}}
                row["quality"] = sum(row["scores"]) / row["problems"]
                row["low"], row["high"] = wilson_interval(sum(row["scores"]), row["problems"])
                row["rate"] = (one["rate"] * one["tokens"] + other["rate"] * other["tokens"]) / row["tokens"]
                rows.append(row)
    return rows


def control(points: list[dict[str, Any]], point: dict[str, Any], name: str, near: float) -> dict[str, Any] | None:
    """The row to compare with: the assistant, or the one of `name` nearest in rate, if near enough."""
    rows = [other for other in points if other["method"] == name and other is not point]
    if name == "assistant":
        return rows[0] if rows else None
    rows = [other for other in rows if abs(other["rate"] - point["rate"]) <= near]
    return min(rows, key=lambda other: abs(other["rate"] - point["rate"])) if rows else None


def difference(point: dict[str, Any], other: dict[str, Any] | None) -> str:
    """In percentage points, with its interval; empty where there is nothing to compare with."""
    if other is None or other is point or not point["rate"]:
        return ""
    found = paired_bootstrap(point["scores"], other["scores"])
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def percent(share: float) -> str:
    """As tables show it."""
    return f"{share:.1%}"


if __name__ == "__main__":
    main()
