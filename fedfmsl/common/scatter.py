"""The picture of own against novel accuracy: one point per method. Needs matplotlib.

A method is better the further it is up and to the right. Lines of equal harmonic mean show what a trade is worth.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

# The palette of Okabe and Ito, safe for the colour-blind. Methods beyond it have another marker.
PALETTE = ("#009e73", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00", "#9a9a9a")
MARKERS = "osD^vPX"
LINES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # harmonic means
MARGIN = 0.06  # between the outer points and the frame
FAINT = "#a0a0a0"


@dataclass(frozen=True)
class Method:
    """Accuracies in 0 … 1; the spreads are standard deviations, drawn as bars. `colour` and `marker` are as in
    matplotlib; "" chooses one of PALETTE and of MARKERS."""

    name: str
    own: float
    novel: float
    own_spread: float = 0.0
    novel_spread: float = 0.0
    colour: str = ""
    marker: str = ""

    @classmethod
    def of(cls, name: str, pairs: Sequence[tuple[float, float]], colour: str = "", marker: str = "") -> Method:
        """Mean and standard deviation of (own, novel) of at least one seed."""
        own, novel = ([pair[axis] for pair in pairs] for axis in (0, 1))
        own_spread, novel_spread = (statistics.stdev(values) if len(pairs) > 1 else 0.0 for values in (own, novel))
        return cls(name, statistics.mean(own), statistics.mean(novel), own_spread, novel_spread, colour, marker)


def draw_own_against_novel(axes: Axes, methods: Sequence[Method], samples: str = "samples") -> None:
    """Draws the methods into `axes`, with a legend on the right. `samples`: what they classify, like "photos"."""
    for place, method in enumerate(methods):
        axes.errorbar(
            method.own,
            method.novel,
            xerr=method.own_spread or None,
            yerr=method.novel_spread or None,
            fmt=method.marker or MARKERS[place // len(PALETTE) % len(MARKERS)],
            color=method.colour or PALETTE[place % len(PALETTE)],
            label=method.name,
            markersize=11,
            markeredgecolor="white",
            elinewidth=1.2,
            clip_on=False,
            zorder=3,
        )
    left, right = _limits([(method.own, method.own_spread) for method in methods])
    low, high = _limits([(method.novel, method.novel_spread) for method in methods])
    low = min(low, 0.0)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    _draw_harmonic_means(axes, right, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"own: accuracy on the device's own test {samples}")
    axes.set_ylabel("novel: on other devices' classes")
    if methods:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)


def _limits(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    least = min((value - spread for value, spread in values), default=0.0)
    most = max((value + spread for value, spread in values), default=1.0)
    return max(least - MARGIN, -0.02), min(most + MARGIN, 1.02)


def _draw_harmonic_means(axes: Axes, right: float, high: float) -> None:
    """Lines of equal harmonic mean h: novel = h · own / (2 · own - h)."""
    for mean in LINES:
        own = np.linspace(mean / 2 + 1e-3, 1.0, 400)
        novel = mean * own / (2 * own - mean)
        axes.plot(own, novel, color="#dddddd", linewidth=0.9, zorder=1)
        at_right = mean * right / (2 * right - mean) if 2 * right > mean else np.inf
        if at_right < high:
            axes.annotate(f"{mean:.1f}", (right, at_right), color=FAINT, fontsize=8, ha="right", va="bottom")
