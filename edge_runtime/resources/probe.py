"""Measures memory and duration of a device's computations by running them in a separate process (ours)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
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
from edge_runtime.store.device_store import PROBE
from edge_runtime.training.gate import Gate
from fedfmsl.errors import RunError, one_line
from fedfmsl.protocol.bundle import file_sha256
from fedfmsl.protocol.messages import EngineName, Training
from fedfmsl.protocol.setting_types import EngineChoice
from fedfmsl.protocol.task_bundle import TaskBundle

BATCH = 16  # samples per step; the server's default
OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "Failed to allocate memory", "Cannot allocate memory")  # in error texts
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
    bundle: TaskBundle,
    choice: EngineChoice,
    threads: int,
    provider: str,
    sample: Path,
    feature_batch: int,
    first: int,
    memory_plan: MemoryPlan,
    scratch: Path,
) -> Iterator[Measurement]:
    """A feature pass over `feature_batch` times the sample, then a prediction and a step at each level from `first`.
    Writes features into the folder `scratch`."""
    with contextlib.suppress(OSError):  # if memory runs out, the kernel ends this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    dims, levels, theta = bundle.manifest.dims, bundle.manifest.levels, bundle.initial()[0]
    gate = Gate(bundle, threads)
    # with all levels ahead, because a pass with all of them takes most memory
    cache = FeatureCache(
        DiskCache(scratch, 2**40), bundle, threads, batch_size=feature_batch, provider=provider, ahead=levels
    )
    samples = [Sample(sample, file_sha256(sample), 0)] * feature_batch
    started = time.perf_counter()
    gate.log_weights(bundle.initial()[1], cache.pooled(samples, 1), np.zeros((len(samples), 2), np.float32))
    cache.lifted(samples, levels, 1, theta)
    yield _measurement(FEATURES, feature_batch, started)
    memory_plans = {
        level: MemoryPlan(min(memory_plan.micro_batch, default_micro_batch(dims, level, provider)), memory_plan.lean)
        for level in range(first, levels + 1)
    }
    engine = open_engine(choice, bundle, threads, memory_plans, provider)
    hidden = np.random.default_rng(0).standard_normal((BATCH, dims.tokens, dims.hidden), np.float32)
    for level, each in memory_plans.items():
        size, trainables = each.micro_batch, theta[: bundle.expert.size(level)]
        batch = Batch.cross_entropy(hidden[:size], np.zeros(size, np.int64), len(bundle.classes))
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
    """A Measure that runs `probe_levels` in a separate process and ends it when no more measurements are needed.

    It needs no other writable folder than `folder`. Measurements end early if memory runs out. Raises RunError if the
    process fails for another reason, OSError if the disk is full.
    """

    bundle: TaskBundle
    engine: EngineName
    threads: int
    provider: str
    sample: Path
    folder: Path

    def __call__(self, feature_batch: int, first: int, memory_plan: MemoryPlan) -> Iterator[Measurement]:
        options = {
            "bundle": self.bundle.root,
            "classes": measured_classes(self.bundle),
            "engine": self.engine,
            "threads": self.threads,
            "provider": self.provider,
            "sample": self.sample,
            "feature-batch": feature_batch,
            "first": first,
            "micro-batch": memory_plan.micro_batch,
        }
        command = [sys.executable, "-m", "edge_runtime", "probe", *(["--lean"] if memory_plan.lean else [])]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with (
            tempfile.TemporaryDirectory(dir=self.folder, prefix=PROBE) as scratch,
            tempfile.TemporaryFile(dir=scratch) as errors,
        ):
            command += ["--scratch", scratch]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace"
            ) as process:
                try:
                    for text in process.stdout or ():
                        yield Measurement(**json.loads(text))
                    process.wait()
                    errors.seek(0)
                    check_end(process.returncode, errors.read().decode(errors="replace"))
                finally:
                    process.kill()


def measured_classes(bundle: TaskBundle) -> int:
    """The classes of a measurement: the next power of two, so that a few more classes need no other measurement."""
    return 1 << (len(bundle.classes) - 1).bit_length()


def check_end(code: int, errors: str) -> None:
    """Raises RunError if the process ended with an error other than a lack of memory, OSError if the disk is full."""
    if code == os.EX_IOERR:
        raise OSError(errno.ENOSPC, "no space for the measurement of memory and time")
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"exit code {code}")
    if code > 0 and not any(text in errors for text in OUT_OF_MEMORY):
        raise RunError(f"memory and time of a round could not be measured: {one_line(last.removeprefix('error: '))}")
