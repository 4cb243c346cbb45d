"""The picture of own against novel accuracy."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from fedfmsl.common.scatter import Method, draw_own_against_novel

METHODS = [
    Method("local only", 0.68, 0.0),
    Method("global", 0.62, 0.67, 0.01, 0.02, "#0072b2"),
    Method("MoFM", 0.75, 0.5, 0.02, 0.03),
]


@pytest.mark.parametrize("count", [1, 3])
def test_every_method_is_a_visible_point_with_its_name(count: int) -> None:
    axes = Figure().subplots()
    draw_own_against_novel(axes, METHODS[:count], "photos")
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [method.name for method in METHODS[:count]]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for method in METHODS[:count]:
        assert left < method.own - method.own_spread <= method.own + method.own_spread < right
        assert low <= method.novel - method.novel_spread < high
        assert method.novel + method.novel_spread < high
    assert "photos" in axes.get_xlabel()


def test_a_method_over_several_seeds_has_mean_and_deviation() -> None:
    found = Method.of("MoFM", [(0.7, 0.4), (0.8, 0.6)])
    assert (found.own, found.novel) == pytest.approx((0.75, 0.5))
    assert (found.own_spread, found.novel_spread) == pytest.approx((0.05 * 2**0.5, 0.1 * 2**0.5))
    once = Method.of("MoFM", [(0.7, 0.4)])
    assert (once.own, once.novel, once.own_spread, once.novel_spread) == (0.7, 0.4, 0.0, 0.0)


def test_methods_differ_in_colour_or_marker() -> None:
    axes = Figure().subplots()
    draw_own_against_novel(axes, [Method(str(index), 0.5, 0.5) for index in range(14)])
    points = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]  # type: ignore[arg-type]
    assert len({(line.get_color(), line.get_marker()) for line in points}) == 14


def test_a_line_of_equal_harmonic_mean_has_that_mean() -> None:
    axes = Figure().subplots()
    draw_own_against_novel(axes, METHODS)
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]  # type: ignore[arg-type]
    assert lines
    for line in lines:
        means = [2 * x * y / (x + y) for x, y in zip(*line.get_data(), strict=True)]
        assert means == pytest.approx([means[0]] * len(means))
