"""The charts of a simulation: own against novel accuracy, and the labels of each device."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from devices.trial.charts import INK, STYLE
from simulation.results import Result, grouped, value_of

# The palette of Okabe and Ito; models beyond it have another marker.
COLOURS = ("#009e73", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00", "#9a9a9a")
MARKERS = "osD^v"


def own_against_novel(results: Sequence[Result]) -> bytes | None:
    """A point for each model: means over the seeds. SVG; None if no device has novel test samples."""
    points = []
    for (method, row, alpha, rate), same in grouped(results).items():
        pairs = [(value_of(result, row, "novel"), value_of(result, row, "own")) for result in same]
        known = [(novel, own) for novel, own in pairs if novel is not None and own is not None]
        if known:
            label = row if row == method else f"{row} ({method})"
            label += "" if alpha is None else f", α {alpha:g}"
            points.append((f"{label}, rate {rate:g}", *(statistics.mean(each) for each in zip(*known, strict=True))))
    if not points:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        for index, (label, novel, own) in enumerate(points):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS) % len(MARKERS)]
            axes.plot(novel, own, marker, color=colour, markersize=8, label=label)
        axes.set_xlabel("accuracy on classes that the device does not hold (novel)")
        axes.set_ylabel("accuracy on the device's own test samples")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid()
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), labelcolor=INK, fontsize=9)
        return _svg(figure)


def labels_by_device(counts: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Training samples by device and class. `counts` (K, C). SVG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 1.5 + 0.25 * min(len(classes), 40)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(counts.T, aspect="auto", cmap="Greens", interpolation="nearest")
        axes.set_xlabel("device")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(classes) <= 40:
            axes.set_yticks(range(len(classes)), list(classes), color=INK)
        else:
            axes.set_ylabel("class")
        figure.colorbar(image, label="training samples")
        return _svg(figure)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
