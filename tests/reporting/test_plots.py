from __future__ import annotations

import pytest

from collm.reporting import plots

PathCollection = pytest.importorskip("matplotlib.collections").PathCollection

POINTS = [
    {"method": "learned", "rate": 0.1, "quality": 0.4, "low": 0.3, "high": 0.5},
    {"method": "learned", "rate": 0.3, "quality": 0.6, "low": 0.5, "high": 0.7},
    {"method": "base alone", "rate": 0.0, "quality": 0.3, "low": None, "high": None},
    {"method": "no cost", "rate": None, "quality": 0.3},
]


def test_cost_quality_draws_each_method_with_its_own_marker():
    axes = plots.cost_quality_figure(POINTS).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["learned", "base alone"]
    lines = [container[0] for container in axes.containers]
    assert list(lines[0].get_xdata()) == [0.1, 0.3]
    assert list(lines[0].get_ydata()) == [0.4, 0.6]
    assert lines[0].get_marker() != lines[1].get_marker()


@pytest.mark.parametrize(
    ("x", "value", "shown"),
    [("rate", 0.2, "20%"), ("active_parameters", 1.54e9, "1.54 B"), ("seconds_per_token", 0.0125, "12.5 ms")],
)
def test_the_axis_of_cost_has_the_unit_of_its_cost(x, value, shown):
    figure = plots.cost_quality_figure([{"method": "learned", x: value, "quality": 0.4}], x)
    assert figure.axes[0].xaxis.get_major_formatter()(value, 0) == shown


def test_svg_follows_the_page_and_is_reproducible():
    first, second = (plots.svg(plots.cost_quality_figure(POINTS)) for _ in range(2))
    assert first == second
    assert "currentColor" in first
    assert plots.INK not in first


def test_calibration_bins_hold_every_token():
    figure = plots.calibration_figure([0.0, 0.05, 0.95, 1.0], [False, True, True, True])
    markers = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    assert [tuple(c.get_offsets()[0]) for c in markers] == [pytest.approx((0.025, 0.5)), pytest.approx((0.975, 1.0))]


def test_png_is_written(tmp_path):
    path = plots.save_png(plots.cost_quality_figure(POINTS), tmp_path / "new" / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")
