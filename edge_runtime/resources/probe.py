"""Measures memory and duration of a device's computations by running them in a separate process (ours)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.samples import Sample
from edge_runtime.engines.base import Batch, MemoryPlan
from edge_runtime.engines.factory import open_engine
from edge_runtime.engines.memory import peak_rss
from edge_runtime.engines.step_graph import default_micro_batch
from edge_runtime.training.gate import Gate
from fedfmsl.protocol.bundle import Bundle, file_sha256
from fedfmsl.protocol.messages import EngineChoice, EngineName, Training

BATCH = 16  # samples per step; the server's default
FEATURES = 0  # stands for the feature pass where levels are numbered from 1


class Measurement(BaseModel):
    """`level`: the level of a step, or FEATURES. `seconds` for BATCH samples. `peak_rss`: the process's peak memory in
    bytes until then."""

    level: int
    micro_batch: int
    seconds: float
    peak_rss: int


# Arguments: samples per feature pass, first level, how to compute a step at that level and the following ones.
Measure = Callable[[int, int, MemoryPlan], Iterator[Measurement]]


def probe_levels(
    bundle: Bundle,
    choice: EngineChoice,
    threads: int,
    sample: Path,
    feature_batch: int,
    first: int,
    memory_plan: MemoryPlan,
) -> Iterator[Measurement]:
    """A feature pass over `feature_batch` times the sample, then a prediction and a step at each level from `first`."""
    with contextlib.suppress(OSError):  # if memory runs out, the kernel ends this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    dims, levels, theta = bundle.manifest.dims, bundle.manifest.levels, bundle.initial()[0]
    gate = Gate(bundle, threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(DiskCache(Path(folder), 2**40), bundle, threads, batch_size=feature_batch)
        samples = [Sample(sample, file_sha256(sample), 0)] * feature_batch
        started = time.perf_counter()
        gate.log_weights(bundle.initial()[1], cache.pooled(samples, 1), np.zeros((len(samples), 2), np.float32))
        cache.lifted(samples, levels, 1, theta)
        yield _measurement(FEATURES, feature_batch, started)
    memory_plans = {
        level: MemoryPlan(min(memory_plan.micro_batch, default_micro_batch(dims, level)), memory_plan.lean)
        for level in range(first, levels + 1)
    }
    engine = open_engine(choice, bundle, threads, memory_plans)
    hidden = np.random.default_rng(0).standard_normal((BATCH, dims.tokens, dims.hidden), np.float32)
    for level, each in memory_plans.items():
        size, trainables = each.micro_batch, theta[: bundle.expert.size(level)]
        batch = Batch.cross_entropy(hidden[:size], np.zeros(size, np.int64), dims.classes)
        engine.load(level)
        engine.set(trainables)
        engine.predict(hidden[:feature_batch])
        engine.set(trainables, Training(epochs=1, learning_rate=1e-3))
        engine.step(batch)
        started = time.perf_counter()
        engine.step(batch)
        yield _measurement(level, size, started)


def _measurement(level: int, size: int, started: float) -> Measurement:
    seconds = (time.perf_counter() - started) * BATCH / size
    return Measurement(level=level, micro_batch=size, seconds=seconds, peak_rss=peak_rss())


@dataclass(frozen=True)
class ProbeProcess:
    """A Measure that runs `probe_levels` in a separate process and ends it when no more measurements are needed."""

    bundle: Bundle
    engine: EngineName
    threads: int
    sample: Path

    def __call__(self, feature_batch: int, first: int, memory_plan: MemoryPlan) -> Iterator[Measurement]:
        options = {
            "bundle": self.bundle.root,
            "engine": self.engine,
            "threads": self.threads,
            "sample": self.sample,
            "feature-batch": feature_batch,
            "first": first,
            "micro-batch": memory_plan.micro_batch,
        }
        command = [sys.executable, "-m", "edge_runtime", "probe", *(["--lean"] if memory_plan.lean else [])]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                for text in process.stdout or ():
                    yield Measurement(**json.loads(text))
            finally:
                process.kill()
