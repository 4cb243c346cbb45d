"""The charts of a simulation: own against novel accuracy, and the labels of each device."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from devices.trial.charts import INK, STYLE
from fedfmsl.common.scatter import Method, draw_own_against_novel
from simulation.results import Result, grouped, value_of


def own_against_novel(results: Sequence[Result]) -> bytes | None:
    """A point for each model: means over the seeds, with standard deviations. SVG; None if no device has novel test
    samples."""
    methods = []
    for (method, row, alpha, rate), same in grouped(results).items():
        pairs = [(value_of(result, row, "own"), value_of(result, row, "novel")) for result in same]
        known = [(own, novel) for own, novel in pairs if own is not None and novel is not None]
        if known:
            label = row if row == method else f"{row} ({method})"
            label += "" if alpha is None else f", α {alpha:g}"
            methods.append(Method.of(f"{label}, rate {rate:g}", known))
    if not methods:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5), layout="constrained")
        draw_own_against_novel(figure.subplots(), methods)
        return _svg(figure)


def labels_by_device(counts: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Training samples by device and class. `counts` (K, C). SVG, whose reader chooses the font: names may be in any
    script."""
    with rc_context({**STYLE, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
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
