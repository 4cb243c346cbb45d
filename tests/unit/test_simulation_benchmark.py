"""The measurement of `benchmarks.simulation`, without Flower."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

from benchmarks.process_tree import Mark, Usage, measure
from benchmarks.simulation_runs import Run
from fedfmsl.errors import RunError

BURN = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
PARENT = f"""
import subprocess, sys
print('{{"name": "round 0", "training": 0}}', flush=True)
print("other output", flush=True)
subprocess.run([sys.executable, "-c", {BURN!r}])
print('{{"name": "round 1", "training": 0.5}}', flush=True)
"""


def test_the_processor_time_of_children_counts() -> None:
    usage = measure([sys.executable, "-c", PARENT], os.environ)
    first, last = usage.marks
    assert (first.name, last.name, last.training) == ("round 0", "round 1", 0.5)
    assert last.processor - first.processor > 0.25  # a child's last INTERVAL may be missing
    assert usage.wall >= last.wall > first.wall
    assert usage.peak_mb > 1


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(RunError, match="failed"):
        measure([sys.executable, "-c", "raise SystemExit(3)"], os.environ)


def test_the_first_round_is_not_in_the_mean() -> None:
    """Flower's actors load the model in it."""
    marks = [Mark(f"round {index}", *([seconds] * 3)) for index, seconds in enumerate((4.0, 14.0, 16.0, 18.0))]
    run = Run(Usage([Mark("features", 0.0, 3.0, 3.0), *marks], 20.0, 20.0, 1.0), {0: 0.1, 3: 0.5})
    assert run.per_round.processor == 2.0
    assert run.processor_after(3) == 18.0
    assert run.processor_after(5) == 22.0
    assert Run.from_json(run.to_json()) == run


def test_the_flower_side_needs_none_of_our_packages() -> None:
    tree = ast.parse((Path(__file__).parents[2] / "benchmarks" / "flower_simulation.py").read_text())
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        + ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
    }
    assert names - sys.stdlib_module_names == {"flwr", "numpy", "peft", "torch", "transformers"}
