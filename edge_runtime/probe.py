"""The device's level cap: the highest SAL level whose training step fits its memory and time, measured (ours)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from edge_runtime.engine import Batch, Engine
from edge_runtime.memory import peak_rss_mb
from edge_runtime.store import DeviceStore
from edge_runtime.training import Targets
from protocol.bundle import Bundle
from protocol.errors import ConfigError
from protocol.messages import EngineName, Training
from shell.files import write_atomically

MEMORY_SHARE = 0.5
BATCH = 8


class _Measured(BaseModel):
    """Kept on disk, so that a device gives the same answer at every start."""

    bundle: str
    engine: str
    threads: int
    memory_mb: float
    step_seconds: float
    levels: list[dict[str, float]]


def measure_cap(
    bundle: Bundle, store: DeviceStore, engine: EngineName, threads: int, memory_mb: int | None, step_seconds: float
) -> int:
    """Runs levels in a process of its own, which may die of them, up to the first that does not fit.

    Raises ConfigError if not even level 1 fits.
    """
    budget = memory_mb or MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    path = store.root / "levels.json"
    asked = _Measured(
        bundle=bundle.sha256,
        engine=engine,
        threads=threads,
        memory_mb=budget,
        step_seconds=step_seconds,
        levels=[],
    )
    measured = _read(path)
    if measured is None or measured.model_copy(update={"levels": []}) != asked:
        measured = asked.model_copy(update={"levels": _measure(bundle, engine, threads, budget, step_seconds)})
        write_atomically(path, measured.model_dump_json().encode())
    cap = 0
    for line in measured.levels:
        if not _fits(line, budget, step_seconds):
            break
        cap = int(line["level"])
    if cap == 0:
        least = f"{measured.levels[0]['peak_rss_mb']:.0f} MB" if measured.levels else "more memory than there is"
        raise ConfigError(
            f"a step at level 1 needs {least}, more than the budget of {budget:.0f} MB or {step_seconds} s"
        )
    return cap


def probe_levels(bundle: Bundle, engine: Engine) -> Iterator[dict[str, float]]:
    """One training step of 8 random images at each level: level, seconds, peak_rss_mb."""
    dims = bundle.manifest.dims
    rng = np.random.default_rng(0)
    targets = Targets.cross_entropy(rng.integers(0, dims.classes, BATCH))
    hidden = rng.normal(size=(BATCH, dims.tokens, dims.hidden)).astype(np.float32)
    batch = Batch(hidden, targets.labels, targets.gate, targets.other, np.zeros(dims.classes, np.float32))
    for level in range(1, bundle.manifest.levels + 1):
        size = bundle.expert.size(level)
        engine.load(level)
        engine.set(bundle.initial()[0][:size], Training(epochs=1, learning_rate=1e-3))
        started = time.perf_counter()
        engine.step(batch)
        yield {"level": level, "seconds": time.perf_counter() - started, "peak_rss_mb": peak_rss_mb()}


def _measure(
    bundle: Bundle, engine: EngineName, threads: int, budget: float, step_seconds: float
) -> list[dict[str, float]]:
    command = [
        sys.executable,
        "-m",
        "edge_runtime",
        "probe",
        "--bundle",
        str(bundle.root),
        "--engine",
        engine,
        "--threads",
        str(threads),
    ]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout or ():
            lines.append(json.loads(text))
            if not _fits(lines[-1], budget, step_seconds):
                process.kill()
    return lines


def _fits(line: dict[str, float], budget: float, step_seconds: float) -> bool:
    return line["peak_rss_mb"] <= budget and line["seconds"] <= step_seconds


def _read(path: Path) -> _Measured | None:
    try:
        return _Measured.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
