"""The variants of `benchmarks.step` in their processes, which take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import Progress

from benchmarks.step_variants import Setting
from fedfmsl.common.cli import console
from fedfmsl.errors import RunError

Turns = Mapping[str, Sequence[Mapping[str, float]]]  # variant → `seconds` and `peak_rss_mb` of each turn


class Worker:
    """A variant in its own process. It answers each line on its standard input with the measurements of one turn."""

    def __init__(self, name: str, setting: Setting, runtime: Path | None = None) -> None:
        """`runtime`: folder of an ONNX Runtime that replaces the installed one."""
        self.name = name
        command = [sys.executable, "-m", "benchmarks.step_variants", name, json.dumps(vars(setting), default=str)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment_of(runtime)
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


def take_turns(workers: Sequence[Worker], rounds: int) -> Turns:
    """Ends the workers."""
    turns: dict[str, list[dict[str, float]]] = {worker.name: [] for worker in workers}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("turns", total=rounds * len(workers))
        for worker in [*workers] * rounds:
            turns[worker.name].append(worker.take_turn())
            progress.advance(task)
    for worker in workers:
        worker.close()
    return turns


def environment_of(runtime: Path | None) -> dict[str, str]:
    """With this folder's ONNX Runtime in place of the installed one."""
    if runtime is None:
        return dict(os.environ)
    paths = [str(runtime.resolve()), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
