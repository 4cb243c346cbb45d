"""python -m benchmarks.accuracy: whole trials over seeds and α, as one table with means and spread.

Runs `devices.trial` once per α and seed (about five minutes each on two cores) and reads its report.json. A finished
trial is not repeated, so an interrupted call can be repeated. Remove runs/accuracy-* to start over.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from benchmarks.tables import spread
from fedfmsl.common.cli import application
from fedfmsl.errors import RunError

MODELS = ("start", "local_only", "global", "global_prior", "local_expert", "mofm")

app = application()


@app.command()
def accuracy(
    alpha: list[float] = typer.Option([0.5, 0.1], help="Dirichlet α; may be repeated."),
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    out: Path = typer.Option(Path("docs/accuracy.md"), help="Table to write."),
) -> None:
    """Run trials over several seeds and values of α, and write a table of their accuracies."""
    lines = [
        "# Accuracy",
        "",
        "Accuracy on the devices' own test samples, weighted by their number: mean ± standard deviation over "
        "the seeds.",
        f"Written by `python -m benchmarks.accuracy --seeds {seeds}`.",
        "",
        "In the README: `start` is class means, `local_only` is local only, `global_prior` is global + class prior,",
        "`local_expert` is local expert, `mofm` is MoFM.",
        "",
        f"| α | {' | '.join(MODELS)} | gate: local weight | training, s |",
        f"|---|{'---|' * (len(MODELS) + 2)}",
    ]
    for value in alpha:
        reports = [_trial(value, seed) for seed in range(seeds)]
        cells = [spread([report["accuracy"][name]["mean"] for report in reports]) for name in MODELS]
        cells.append(spread([report["gate"]["mean_local_weight"] for report in reports]))
        training = [sum(report["seconds"][part] for part in ("features", "stage1", "stage2")) for report in reports]
        cells.append(f"{statistics.mean(training):.0f}")
        lines.append(f"| {value} | {' | '.join(cells)} |")
        for seed, report in enumerate(reports):
            cells = [f"{report['accuracy'][name]['mean']:.3f}" for name in MODELS]
            cells.append(f"{report['gate']['mean_local_weight']:.2f}")
            lines.append(f"| {value}, seed {seed} | {' | '.join(cells)} | |")
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())


def _trial(alpha: float, seed: int) -> dict[str, Any]:
    name = f"accuracy-{alpha}-{seed}"
    path = Path("runs") / name / "report.json"
    command = [sys.executable, "-m", "devices.trial", "--name", name, "--alpha", str(alpha), "--seed", str(seed)]
    if not path.is_file() and subprocess.run(command, check=False).returncode:
        raise RunError(f"the trial {name} failed; its logs are in runs/{name}/logs")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


if __name__ == "__main__":
    app()
