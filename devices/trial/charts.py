"""The charts of a report. Each panel fills a (sub)figure and returns its title, which states the result.

A model has the same colour and marker in every panel. The colours are from the colour-blind-safe palette of Okabe and
Ito.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedfmsl.common.scatter import Method, draw_own_against_novel

NAMES = {
    "start": "first round",
    "local_only": "local only",
    "global": "global",
    "global_prior": "global + prior",
    "local_expert": "local expert",
    "mofm": "MoFM",
}
COLOURS = {
    "start": "#9a9a9a",
    "local_only": "#e69f00",
    "global": "#0072b2",
    "global_prior": "#56b4e9",
    "local_expert": "#cc79a7",
    "mofm": "#009e73",
}
MARKERS = {"start": "P", "local_only": "o", "global": "s", "global_prior": "v", "local_expert": "^", "mofm": "D"}
INK, FAINT, SHADE = "#222222", "#6b6b6b", "#d5dbe1"
STYLE = {
    "font.size": 11,
    "text.parse_math": False,  # names of classes and devices may have dollar signs
    "text.color": INK,
    "axes.edgecolor": "#b0b0b0",
    "axes.labelcolor": FAINT,
    "axes.titlecolor": FAINT,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": "cycler(color=['#222222'])",
    "grid.color": "#e8e8e8",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.hashsalt": "fedfmsl",  # equal charts give equal files
}

Accuracies = Mapping[str, Mapping[str, float]]  # model → device → accuracy


@dataclass(frozen=True)
class Point:
    """One round of stage 1 or 2. `held_out`: accuracy by model. `level`: in stage 2 the mean of the devices' levels."""

    stage: int
    level: float
    held_out: Mapping[str, float]
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class ChartData:
    """Test accuracies, the number of test `samples` ("photos") of each device, and the rounds of both stages.

    `means` and `novel`: own and novel accuracy by model. `novel` is None if every device holds every class.
    """

    headline: str
    means: Mapping[str, float]
    novel: Mapping[str, float | None]
    accuracies: Accuracies
    samples: str
    tested: Mapping[str, int]
    points: Sequence[Point]

    @property
    def first_personal(self) -> int:
        """The first round of stage 2; rounds are drawn from 1."""
        return 1 + sum(point.stage == 1 for point in self.points)


def png(data: ChartData) -> bytes:
    """All panels in one image of 1600 × 1000 pixels."""
    with rc_context(STYLE):
        figure = Figure(figsize=(13.6, 8.5))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        figure.suptitle(data.headline, x=0.012, ha="left", fontsize=16, color=FAINT)
        grid = figure.add_gridspec(2, 2)
        for place, panel in enumerate(PANELS):
            panel(figure.add_subfigure(grid[place]), data)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=1600 / 13.6)
    return buffer.getvalue()


def svgs(data: ChartData) -> list[tuple[str, bytes]]:
    """Each panel as (title, SVG)."""
    drawn = []
    with rc_context(STYLE):
        for panel in PANELS:
            figure = Figure(figsize=(6.2, 4.6), layout="constrained")
            title = panel(figure, data)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            drawn.append((title, buffer.getvalue()))
    return drawn


def own_against_novel(figure: Figure | SubFigure, data: ChartData) -> str:
    """The accuracies by model where nothing is novel."""
    methods = [
        Method(NAMES[model], data.means[model], novel, colour=COLOURS[model], marker=MARKERS[model])
        for model in NAMES
        if model in data.means and (novel := data.novel.get(model)) is not None
    ]
    novel_of_mofm = data.novel.get("mofm")
    if novel_of_mofm is None:
        return accuracy_by_model(figure, data)
    draw_own_against_novel(figure.subplots(), methods, data.samples)
    own = f"{data.means['mofm']:.0%} of a device's own {data.samples}"
    return _titled(figure, f"MoFM knows {own}, {novel_of_mofm:.0%} of novel ones")


def accuracy_by_model(figure: Figure | SubFigure, data: ChartData) -> str:
    axes = figure.subplots()
    models = [model for model in NAMES if model in data.means]
    for place, model in enumerate(models):
        mean, values = data.means[model], list(data.accuracies[model].values())
        axes.bar(place, mean, width=0.72, color=COLOURS[model])
        axes.text(place, 0.03, f"{mean:.0%}", ha="center", color=INK, weight="bold", size=13)
        spread = [place + 0.5 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
        axes.plot(spread, values, "o", markersize=5, color=INK, markeredgecolor="white", markeredgewidth=0.8)
    axes.set_xticks(range(len(models)), [NAMES[model].replace(" ", "\n", 1) for model in models], color=INK)
    axes.set_title(f"test accuracy: mean over all test {data.samples} (bar), each device (dot)")
    _percent(axes, 0.0)
    return _titled(
        figure, f"MoFM classifies {data.means['mofm']:.0%} of the devices' own test {data.samples} correctly"
    )


def accuracy_by_round(figure: Figure | SubFigure, data: ChartData) -> str:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    rounds = range(1, len(data.points) + 1)
    values = [value for point in data.points for value in point.held_out.values()]
    for model in ("global", "global_prior", "local_expert", "mofm"):
        curve = [
            (at, point.held_out[model])
            for at, point in zip(rounds, data.points, strict=True)
            if model in point.held_out
        ]
        if curve:
            label = "global, among the device's classes" if model == "global" else NAMES[model]
            above.plot(
                *zip(*curve, strict=True), marker=MARKERS[model], markersize=5, color=COLOURS[model], label=label
            )
    above.set_title(f"held-out accuracy, mean over the devices' held-out {data.samples}")
    above.legend(loc="best", labelcolor=INK, fontsize=10, frameon=True, edgecolor="white", framealpha=1.0)
    _percent(above, max(0.0, min(values, default=0.0) - 0.1))
    edges = [at - 0.5 for at in range(1, len(data.points) + 2)]
    levels = [point.level for point in data.points]
    below.stairs(levels, edges, fill=True, color=SHADE)
    below.set_ylim(0, max(levels, default=1.0) * 1.15)
    below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    below.set_title("level: transformer blocks with active LoRA")
    _mark_stages((above, below), data)
    return _titled(figure, _progress(data))


def accuracy_by_device(figure: Figure | SubFigure, data: ChartData) -> str:
    axes = figure.subplots()
    devices = list(data.tested)
    models = [model for model in ("local_only", "global", "mofm") if model in data.means]
    for row, device in enumerate(devices):
        values = [data.accuracies[model][device] for model in models if device in data.accuracies[model]]
        axes.plot([min(values), max(values)], [row, row], color=SHADE, linewidth=3, zorder=1)
    for model in models:
        held = data.accuracies[model]
        rows = [row for row, device in enumerate(devices) if device in held]
        at = [held[devices[row]] for row in rows]
        axes.plot(at, rows, MARKERS[model], markersize=10, color=COLOURS[model], label=NAMES[model])
    tested = [f"{name}\n{data.tested[name]} {data.samples}" for name in devices]
    axes.set_yticks(range(len(devices)), tested, color=INK)
    axes.set_ylim(len(devices) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))  # whole percents
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x")
    axes.set_title("test accuracy of each device's models")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(models), labelcolor=INK, handletextpad=0.2)
    other_model = "local_only" if "local_only" in data.means else "global"
    mofm, other = data.accuracies["mofm"], data.accuracies[other_model]
    ahead = sum(mofm[device] > accuracy for device, accuracy in other.items())
    than = "training alone" if other_model == "local_only" else "the global expert"
    return _titled(figure, f"MoFM is better than {than} on {ahead} of {len(other)} devices")


def cost_by_round(figure: Figure | SubFigure, data: ChartData) -> str:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    rounds = range(1, len(data.points) + 1)
    down = [_mean(list(point.bytes_down.values())) / 1000 for point in data.points]
    up = [_mean(list(point.bytes_up.values())) / 1000 for point in data.points]
    sizes = [(at, size / 1000) for at, p in zip(rounds, data.points, strict=True) for size in p.bytes_up.values()]
    above.plot(rounds, down, color="#f3cf80", linewidth=6, label="down", solid_capstyle="round")
    above.plot(rounds, up, color="#0072b2", label="up")
    above.plot(*zip(*sizes, strict=True), "o", markersize=4, color="#0072b2")
    above.set_ylim(0)
    above.yaxis.set_major_locator(MaxNLocator(nbins=4))
    above.grid(axis="y")
    above.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, labelcolor=INK, fontsize=10)
    above.set_title("kilobytes per device and round")
    below.bar(rounds, [point.seconds for point in data.points], width=0.72, color="#9a9a9a")
    below.set_title("seconds per round")
    below.yaxis.set_major_locator(MaxNLocator(nbins=3))
    below.grid(axis="y")
    _mark_stages((above, below), data)
    least, most = min(size for _, size in sizes), max(size for _, size in sizes)
    return _titled(figure, f"A device sends {least:.0f} to {most:.0f} kB in a round")


PANELS = (own_against_novel, accuracy_by_round, accuracy_by_device, cost_by_round)


def _progress(data: ChartData) -> str:
    first = [point.held_out["global"] for point in data.points if "global" in point.held_out]
    second = [point.held_out["mofm"] for point in data.points if "mofm" in point.held_out]
    parts = [f"{first[0]:.0%} → {first[-1]:.0%} in stage 1"] if first else []
    parts += [f"{second[-1]:.0%} in stage 2"] if second else []
    return f"Held out: {', '.join(parts) or 'not measured'}"


def _titled(figure: Figure | SubFigure, title: str) -> str:
    figure.suptitle(title, x=0.012, ha="left", weight="bold", fontsize=13.5)
    return title


def _percent(axes: Axes, least: float) -> None:
    axes.set_ylim(least, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y")


def _mark_stages(pair: tuple[Axes, Axes], data: ChartData) -> None:
    """Draws a line at the start of stage 2, and names both stages below the axis."""
    first, last = data.first_personal, len(data.points)
    for axes in pair:
        axes.axvline(first - 0.5, color="#b0b0b0", linewidth=1, linestyle=(0, (4, 3)))
    pair[1].set_xlim(0.5, last + 0.5)
    ticks = [at for at in range(1, last + 1) if last <= 20 or at % 5 == 0]
    pair[1].set_xticks(ticks, [str(at if at < first else at - first + 1) for at in ticks])
    pair[1].set_xlabel("round of stage 1 (global expert), then of stage 2 (local experts and gate)")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
