"""python -m benchmarks.compare: is a training step slower than it was?

Runs rows of the step table in benchmarks/results/step-MODEL.json again. A row's time is divided by that of a matrix
product in the same round, so that the result depends little on the machine's speed. A row that takes more than SLOWER
times as long as in the file, by this measure, is shown as slower, and the exit code is 1. On a processor with other
features the ratios differ.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from fnmatch import fnmatch

import typer

from benchmarks.machine import describe_machine
from benchmarks.step import bundle_of
from benchmarks.step_table import PRODUCT, ratio, results_of
from benchmarks.step_variants import Setting
from benchmarks.step_worker import Worker, take_turns
from fedfmsl.common.cli import application
from fedfmsl.errors import ConfigError

SLOWER = 1.5

app = application()


@app.command()
def compare(
    variants: str = typer.Option("step-graph-*", help="Patterns of the rows to run, separated by commas."),
    rounds: int = typer.Option(3, min=2, help="Turns of each variant."),
    model: str = typer.Option("vit-b16", help="Whose table."),
) -> None:
    """Show the rows of the step table that have become slower."""
    results = results_of(model)
    if not results.is_file():
        raise ConfigError(f"--model {model}: {results} does not exist")
    committed = json.loads(results.read_text(encoding="utf-8"))
    names = [name for name in committed["rows"] if any(fnmatch(name, each) for each in variants.split(","))]
    if not names:
        raise ConfigError(f"--variants {variants}: no row of {results} has such a name")
    given, threads = committed["setting"], min(committed["machine"]["threads"], os.cpu_count() or 1)
    weights = given["weights"]
    workers = []
    for name in (PRODUCT, *names):
        bundle = bundle_of(model, weights, "int8" if "-int8-" in name else "fp32")
        workers.append(Worker(name, Setting(bundle, model, weights, given["batch"], threads, given["seed"])))
    turns = take_turns(workers, rounds)
    seconds = {name: [turn["seconds"] for turn in each] for name, each in turns.items()}
    now = {name: ratio(seconds[name], seconds[PRODUCT]) for name in names}
    before = {name: committed["rows"][name]["of_product"] for name in names}
    features = describe_machine(threads)["features"]
    if features != committed["machine"]["features"]:
        print(f"another processor: {features}; the file is from one with ", end="")
        print(", ".join(committed["machine"]["features"]) + "\n")
    slow = slower(before, now)
    print("| variant | of a product, committed | now | times as long | |\n|---|---|---|---|---|")
    for name in names:
        mark = "**slower**" if name in slow else ""
        print(f"| {name} | {before[name]:.3g} | {now[name]:.3g} | {now[name] / before[name]:.2f} | {mark} |")
    sys.exit(1 if slow else 0)


def slower(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """The rows that take more than SLOWER times as long as before."""
    return [name for name, value in now.items() if value > SLOWER * before[name]]


if __name__ == "__main__":
    app()
