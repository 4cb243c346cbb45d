"""python -m benchmarks.accuracy: whole trials over seeds and α, as tables with means and spread, and a picture per α.

Runs `devices.trial` once per α and seed (about five minutes each on two cores) and reads its report.json. A finished
trial is not repeated, so an interrupted call can be repeated. Remove runs/accuracy-* to start over.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.tables import spread
from devices.trial.charts import COLOURS, MARKERS, NAMES, STYLE
from fedfmsl.common.cli import application
from fedfmsl.common.scatter import Method, draw_own_against_novel
from fedfmsl.errors import RunError

Report = dict[str, Any]  # the content of a report.json
Measure = Callable[[Report, str], float | None]  # of one model

MEASURES: dict[str, Measure] = {
    "own": lambda report, model: report["accuracy"][model]["mean"],
    "novel": lambda report, model: report["accuracy_novel"][model]["mean"],
    "fleet": lambda report, model: report["accuracy_fleet"][model]["mean"],
    "harmonic": lambda report, model: report["harmonic"][model],
    "worst decile": lambda report, model: report["worst_decile"][model],
    "stream 10%": lambda report, model: report["accuracy_stream"][model].get("0.1"),
    "stream 50%": lambda report, model: report["accuracy_stream"][model].get("0.5"),
}

app = application()


@app.command()
def accuracy(
    alpha: list[float] = typer.Option([0.5, 0.1], help="Dirichlet α; may be repeated."),
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    out: Path = typer.Option(Path("docs/accuracy.md"), help="Tables to write. The pictures are written beside them."),
) -> None:
    """Run trials over several seeds and values of α, and write tables and pictures of their accuracies."""
    lines = [
        "# Accuracy",
        "",
        "Test accuracy: mean ± standard deviation over the seeds. [Glossary](glossary.md#evaluation) defines the",
        "columns.",
        f"Written by `python -m benchmarks.accuracy --seeds {seeds}`.",
    ]
    for value in alpha:
        reports = [_trial(value, seed) for seed in range(seeds)]
        picture = out.with_name(f"{out.stem}-{value:g}.png")
        picture.write_bytes(own_against_novel(reports))
        lines += ["", f"## α = {value:g}", "", f"![own against novel accuracy]({picture.name})", "", *tables(reports)]
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())


def tables(reports: Sequence[Report]) -> list[str]:
    """All measures of each model over the reports of several seeds, and own and novel of each seed."""
    models = _models(reports)
    lines = [f"| model | {' | '.join(MEASURES)} |", f"|---|{'---|' * len(MEASURES)}"]
    for model in models:
        cells = [_cell([measure(report, model) for report in reports]) for measure in MEASURES.values()]
        lines.append(f"| {NAMES[model]} | {' | '.join(cells)} |")
    weights = spread([report["gate"]["mean_local_weight"] for report in reports])
    training = [sum(report["seconds"][part] for part in ("features", "stage1", "stage2")) for report in reports]
    lines += ["", f"Mean gate weight of the local experts: {weights}. Training: {statistics.mean(training):.0f} s."]
    lines += ["", f"| own / novel | {' | '.join(NAMES[model] for model in models)} |", f"|---|{'---|' * len(models)}"]
    for report in reports:
        pairs = [[MEASURES[name](report, model) for name in ("own", "novel")] for model in models]
        cells = [" / ".join(_cell([value]) for value in pair) for pair in pairs]
        lines.append(f"| seed {report['seed']} | {' | '.join(cells)} |")
    return lines


def own_against_novel(reports: Sequence[Report]) -> bytes:
    """A PNG with one point per model: the mean over the reports, with standard deviations."""
    methods = []
    for model in _models(reports):
        own, novel = ([MEASURES[name](report, model) for report in reports] for name in ("own", "novel"))
        known = [(x, y) for x, y in zip(own, novel, strict=True) if x is not None and y is not None]
        if known:
            methods.append(Method.of(NAMES[model], known, COLOURS[model], MARKERS[model]))
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        draw_own_against_novel(figure.subplots(), methods, reports[0]["samples"])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _models(reports: Sequence[Report]) -> list[str]:
    return [model for model in NAMES if all(model in report["accuracy"] for report in reports)]


def _cell(values: Sequence[float | None]) -> str:
    """Over the seeds that have the value: if every device holds every class, nothing is novel."""
    known = [value for value in values if value is not None]
    return spread(known) if known else "–"


def _trial(alpha: float, seed: int) -> Report:
    name = f"accuracy-{alpha}-{seed}"
    path = Path("runs") / name / "report.json"
    command = [sys.executable, "-m", "devices.trial", "--name", name, "--alpha", str(alpha), "--seed", str(seed)]
    command += ["--precision", "fp32"]
    if not path.is_file() and subprocess.run(command, check=False).returncode:
        raise RunError(f"the trial {name} failed; its logs are in runs/{name}/logs")
    report: Report = json.loads(path.read_text())
    if "harmonic" not in report:
        raise RunError(f"{path} was written by an earlier version; remove runs/{name} to repeat the trial")
    return report


if __name__ == "__main__":
    app()
