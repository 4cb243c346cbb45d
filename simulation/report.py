"""Writes what a simulation found: tables, charts, report.html, and the best setting as a configuration for a server."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fedfmsl.common import web_page
from fedfmsl.common.cli import console
from fedfmsl.common.files import write_atomically
from simulation.charts import labels_by_device, own_against_novel
from simulation.methods.base import stage_rounds
from simulation.methods.fedfmsl import FedFMSL
from simulation.results import STREAM, Result, as_csv, as_markdown, rows_of
from simulation.settings import SimulationSettings

PRINTED = ("own", "novel", f"{STREAM}0.1", "harmonic")
PRINTED_WIDTH = 120  # a narrower terminal breaks the lines, so that no number is cut off


def write_report(
    folder: Path,
    results: Sequence[Result],
    settings: SimulationSettings,
    classes: Sequence[str],
    label_counts: Callable[[], NDArray[np.int64]],
    coverage: str = "",
) -> None:
    """`coverage`: how many samples were used, if not all. Writes results.csv, results.md, charts, report.html, and
    server.toml if FedFMSL was run. Files of an earlier simulation that it does not write are removed. Prints the main
    columns and the paths."""
    images = {"labels.svg": labels_by_device(label_counts(), classes), "accuracy.svg": own_against_novel(results)}
    server = server_settings(results, settings)
    files = {
        "results.csv": as_csv(results).encode(),
        "results.md": as_markdown(results).encode(),
        **images,
        "report.html": _page(settings, results, images, coverage).encode(),
        "server.toml": server.encode() if server else None,
    }
    for name, data in files.items():
        if data is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_atomically(folder / name, data)
    Console(width=max(console.width, PRINTED_WIDTH)).print(_printed(results))
    console.print(f"\nreport     {folder / 'report.html'}")
    if server:
        console.print(f"settings   {folder / 'server.toml'}, for python -m trainer_server start --config")


def _printed(results: Sequence[Result]) -> Table:
    head, *rows = rows_of(results, PRINTED)
    printed = Table(box=None, pad_edge=False)
    for index, name in enumerate(head):
        printed.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        printed.add_row(*row)
    return printed


def server_settings(results: Sequence[Result], settings: SimulationSettings) -> str:
    """A configuration of the server: that of FedFMSL with the best held-out accuracy, the mean over all α and seeds. ""
    if it was not run."""
    name = FedFMSL.name
    by_rate: dict[float, list[float]] = {}
    for result in results:
        if result["method"] == name:
            by_rate.setdefault(result["learning_rate"], []).append(result["held_out"][name])
    if not by_rate:
        return ""
    scores = {rate: statistics.mean(accuracies) for rate, accuracies in by_rate.items()}
    best = max(scores, key=scores.__getitem__)
    stage1, stage2 = stage_rounds(settings.rounds)
    lines = [
        f"# The best of {len(scores)} learning rates in a simulation: held-out accuracy {scores[best]:.3f}.",
        f'run = "{settings.name}"',
        f"bundle = {json.dumps(str(settings.bundle.resolve()), ensure_ascii=False)}",  # JSON's escapes are TOML's
        f"devices = {settings.devices}",
        f"stage1_rounds = {stage1}",
        f"stage2_rounds = {stage2}",
        f"epochs = {settings.epochs}",
        f"batch_size = {settings.batch_size}",
        f"learning_rate = {best!r}",
        *([f"max_level = {settings.max_level}"] if settings.max_level else []),
        *(['select = "random"', f"fraction = {settings.fraction!r}"] if settings.fraction < 1 else []),
    ]
    return "\n".join(lines) + "\n"


def _page(
    settings: SimulationSettings, results: Sequence[Result], images: Mapping[str, bytes | None], coverage: str
) -> str:
    summary = (
        f"{settings.devices} devices · {settings.rounds} rounds · partition {settings.partition.value} · share of "
        f"devices per round {settings.fraction:g} · {settings.seeds} seed{'s' if settings.seeds > 1 else ''}"
    )
    charts = web_page.charts([(name.removesuffix(".svg"), svg) for name, svg in images.items() if svg is not None])
    lines = [f"<p>{html.escape(line)}</p>" for line in (summary, coverage) if line]
    parts = [*lines, charts, web_page.table(rows_of(results))]
    return web_page.page(settings.name, "\n".join(parts))
