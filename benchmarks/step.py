"""python -m benchmarks.step: time and memory of a training step, for several variants in interleaved turns.

Each variant has its own process. After all are set up, they take turns, `--rounds` times, and only one computes
at a time, so a slow phase of the machine affects all. Times are medians with their spread, memory is the peak of the
process.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import typer
from rich.progress import Progress

from benchmarks.step_variants import Setting
from fedfmsl.common.cli import application, console
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.bundle import Bundle, TextPreprocessing

LEVELS = (1, 2, 4, 8, 12)
REFERENCE = "torch-whole"
PRODUCT = "product"

app = application()


class Worker:
    """A variant in its own process. It answers each line on its standard input with the measurements of one turn."""

    def __init__(self, name: str, setting: Setting, runtime: Path | None = None) -> None:
        """`runtime`: folder of an ONNX Runtime that replaces the installed one."""
        self.name = name
        command = [sys.executable, "-m", "benchmarks.step_variants", name, json.dumps(vars(setting), default=str)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(runtime)
        )
        self.flops = int(self._answer()["flops"])

    def take_turn(self) -> dict[str, float]:
        """Median `seconds` of a step, and the peak memory of the process, `peak_rss_mb`, so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{self.name} ended early; see its output above")
        answer: dict[str, float] = json.loads(line)
        return answer


@app.command()
def compare(
    model: str = typer.Option("vit-b16", help="As for export.build."),
    weights: str | None = typer.Option("random", help="As for export.build."),
    bundle: list[Path] = typer.Option(
        [], help="Bundles of the model; may be repeated. Default: fp32 and int8, built once."
    ),
    levels: str = typer.Option(",".join(map(str, LEVELS)), help="SAL levels, separated by commas."),
    batch: int = typer.Option(8, min=1),
    threads: int = typer.Option(0, min=0, help="0: one per core."),
    ort_training: Path | None = typer.Option(
        None, help="Also compare onnxruntime-training-cpu, installed in this folder with pip --target."
    ),
    rounds: int = typer.Option(7, min=2, help="Turns of each variant."),
    seed: int = typer.Option(0),
    out: Path | None = typer.Option(None, "--json", help="File to write the measurements to."),
) -> None:
    """Measure time and memory of a training step, against torch + PEFT."""
    folders = bundle or [bundle_of(model, weights, precision, ort_training) for precision in ("fp32", "int8")]
    if any(isinstance(Bundle.load(folder).manifest.preprocessing, TextPreprocessing) for folder in folders):
        raise ConfigError("this benchmark needs a vision model; give another --model or --bundle")
    threads = threads or os.cpu_count() or 1
    chosen = [int(level) for level in levels.split(",")]
    settings = [Setting(folder, model, weights, batch, threads, seed) for folder in folders]
    workers = [Worker(name, settings[0]) for name in (PRODUCT, REFERENCE, *(f"torch-suffix-{k}" for k in chosen))]
    for setting in settings:
        label = Bundle.load(setting.bundle).manifest.precision
        workers += [Worker(f"step-graph-{label}-{k}", setting) for k in chosen]
        if ort_training and label == "fp32":
            workers += [Worker(f"ort-training-{k}", setting, ort_training) for k in chosen]
    turns: dict[str, list[dict[str, float]]] = {worker.name: [] for worker in workers}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("turns", total=rounds * len(workers))
        for worker in workers * rounds:
            turns[worker.name].append(worker.take_turn())
            progress.advance(task)
    for worker in workers:
        worker.close()
    results = _results(workers, turns, batch)
    _show(results)
    if out:
        machine = {"processor": _processor(), "threads": threads, "batch": batch, "model": model, "seed": seed}
        out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def _results(
    workers: list[Worker], turns: dict[str, list[dict[str, float]]], batch: int
) -> dict[str, dict[str, float]]:
    """Ratios are medians of the ratios within a round, so that a change of the machine's speed cancels out."""
    results: dict[str, dict[str, float]] = {}
    rates = [workers[0].flops / turn["seconds"] for turn in turns[PRODUCT]]
    reference = [turn["seconds"] for turn in turns[REFERENCE]]
    for worker in workers:
        seconds = [turn["seconds"] for turn in turns[worker.name]]
        median = statistics.median(seconds)
        results[worker.name] = {
            "seconds": median,
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "images_per_second": batch / median,
            "times_faster": statistics.median(r / s for r, s in zip(reference, seconds, strict=True)),
            "peak_rss_mb": max(turn["peak_rss_mb"] for turn in turns[worker.name]),
            "gflop": worker.flops / 1e9,
            "share_of_product_rate": statistics.median(
                worker.flops / s / rate for s, rate in zip(seconds, rates, strict=True)
            ),
        }
    return results


def _show(results: dict[str, dict[str, float]]) -> None:
    """Prints the Markdown table of docs/benchmarks.md."""
    torch = results[REFERENCE]
    print("| variant | ms per step | lowest–highest | images/s | × torch | peak MB | of torch's | GFLOP | of rate |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, r in results.items():
        lowest, highest = 1e3 * r["seconds_min"], 1e3 * r["seconds_max"]
        print(
            f"| {name} | {1e3 * r['seconds']:.1f} | {lowest:.1f}–{highest:.1f} | {r['images_per_second']:.1f} "
            f"| {r['times_faster']:.1f} | {r['peak_rss_mb']:.0f} | {r['peak_rss_mb'] / torch['peak_rss_mb']:.2f} "
            f"| {r['gflop']:.1f} | {r['share_of_product_rate']:.0%} |"
        )


def bundle_of(model: str, weights: str | None, precision: str, ort_training: Path | None = None) -> Path:
    """The bundle of the model. Builds it if it does not exist."""
    with_training = ort_training is not None and precision == "fp32"
    folder = Path("bundles") / f"benchmark-{model}-{precision}{'-training' if with_training else ''}"
    if not (folder / "manifest.json").is_file():
        command = [sys.executable, "-m", "export.build", "--model", model, "--classes", "100", "--out", str(folder)]
        command += ["--precision", precision, *(["--weights", weights] if weights else [])]
        command += ["--ort-training"] if with_training else []
        if subprocess.run(command, env=_environment(ort_training if with_training else None), check=False).returncode:
            raise RunError(f"the bundle of {model} could not be built")
    return folder


def _environment(runtime: Path | None) -> dict[str, str]:
    if runtime is None:
        return dict(os.environ)
    paths = [str(runtime.resolve()), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    app()
