"""Plots of sweeps and calibrations. matplotlib is imported when a figure is drawn, never with the package."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette; a method also has a marker and a line style of its own, so that colour is never the only cue.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C7A00", "#56B4E9", "#E69F00", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")  # one more than colours: pairs repeat after 72 methods
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (1, 1)), (0, (8, 2)))
INK = "#010203"  # stands for the page's text colour: `svg` replaces it by currentColor


def cost_quality_figure(
    points: Sequence[Mapping[str, Any]],
    x: str = "rate",
    x_label: str = "tokens written by the assistant",
    y_label: str = "accuracy",
    percent: bool = True,
) -> Figure:
    """
    Quality against cost, one curve per method.

    Args:
        points (sequence of mappings):
            Each with "method", the key `x`, "quality" and its interval "low", "high" (None where there is none). A
            method with one point ("base alone") is drawn as a single marker; those that end a curve share its axis.
        x (`str`, *optional*, defaults to `"rate"`):
            The cost's key: "rate" (0 to 1), "active_parameters" or "seconds_per_token".
        percent (`bool`, *optional*, defaults to `True`):
            Label both "rate" and quality in percent.
    """
    figure, axes = _axes(7.2, 4.6)
    methods = list(dict.fromkeys(point["method"] for point in points))
    for i, method in enumerate(methods):
        own = sorted((p for p in points if p["method"] == method and p.get(x) is not None), key=lambda p: p[x])
        if not own:
            continue
        xs, ys = [p[x] for p in own], [p["quality"] for p in own]
        lows = [y - p["low"] if p.get("low") is not None else 0.0 for p, y in zip(own, ys, strict=True)]
        highs = [p["high"] - y if p.get("high") is not None else 0.0 for p, y in zip(own, ys, strict=True)]
        axes.errorbar(
            xs,
            ys,
            yerr=[[max(0.0, v) for v in lows], [max(0.0, v) for v in highs]],
            label=method,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINES[i % len(LINES)] if len(own) > 1 else "none",
            capsize=2.5,
            elinewidth=0.8,
            markersize=6,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if percent:
        axes.yaxis.set_major_formatter(_percent)
    if x in _TICKS and (percent or x != "rate"):
        axes.xaxis.set_major_formatter(_TICKS[x])
    legend = axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for text in legend.get_texts():
        text.set_color(INK)
    return figure


def calibration_figure(probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = 10) -> Figure:
    """
    How often the assistant differs (or was needed) against the deferral probability.

    Args:
        probabilities (sequence of `float`): d_t per token.
        outcomes (sequence of `bool`): what d_t should predict, per token.
        bins (`int`, *optional*, defaults to 10): equally wide bins; each shows its 95% Wilson interval, and its
        marker's area the
            number of its tokens.
    """
    from collm.evaluation.intervals import wilson_interval

    figure, axes = _axes(4.8, 4.4)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="perfectly calibrated")
    total = len(probabilities)
    for i in range(bins):
        inside = [
            (p, o) for p, o in zip(probabilities, outcomes, strict=True) if i <= min(p * bins, bins - 1e-9) < i + 1
        ]
        if not inside:
            continue
        mean = sum(p for p, _ in inside) / len(inside)
        hits = sum(bool(o) for _, o in inside)
        share = hits / len(inside)
        low, high = wilson_interval(hits, len(inside))
        axes.errorbar(
            [mean], [share], yerr=[[share - low], [high - share]], color=COLORS[0], capsize=2.5, elinewidth=0.8
        )
        axes.scatter([mean], [share], s=15 + 300 * len(inside) / total, color=COLORS[0], alpha=0.8)
    axes.set_xlabel("deferral probability")
    axes.set_ylabel("share of tokens where the models differ")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(_percent)
    axes.yaxis.set_major_formatter(_percent)
    return figure


def roc_figure(roc: Mapping[str, Any]) -> Figure:
    """The ROC of [`collm.calibration.roc`] with Youden's point marked."""
    figure, axes = _axes(4.8, 4.4)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    axes.plot(roc["false_positive_rate"], roc["true_positive_rate"], color=COLORS[0], label=f"AUC {roc['auc']:.3f}")
    youden = roc["youden"]
    axes.scatter(
        [youden["false_positive_rate"]],
        [youden["true_positive_rate"]],
        color=COLORS[1],
        marker="D",
        zorder=3,
        label=f"Youden: threshold {youden['threshold']:.3f}",
    )
    axes.set_xlabel("deferred where the models agree")
    axes.set_ylabel("deferred where they differ")
    axes.xaxis.set_major_formatter(_percent)
    axes.yaxis.set_major_formatter(_percent)
    for text in axes.legend(frameon=False, fontsize=9, loc="lower right").get_texts():
        text.set_color(INK)
    return figure


def save_png(figure: Figure, path: str | Path) -> Path:
    """Writes the figure on white, at 160 dots per inch."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight", metadata={"Software": None})
    return path


def svg(figure: Figure) -> str:
    """The figure as SVG for [`collm.reporting.html.figure`]: transparent, its ink the colour of the page's text."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt and no date: the same data gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "collm", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue().replace(INK, "currentColor")


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.grid(True, color="#888888", alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _percent(value: float, _position: int) -> str:
    return f"{100 * value:.3g}%"


def _count(value: float, _position: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _milliseconds(value: float, _position: int) -> str:
    return f"{1000 * value:.3g} ms"


_TICKS = {"rate": _percent, "active_parameters": _count, "seconds_per_token": _milliseconds}
