"""What of a run fits into this device's memory and time: measured by doing it, in a process of its own (ours).

A daemon's work falls into passes over new samples and steps at some level. Passes come first, with fewer samples at
once until they fit; then level by level, with smaller micro-batches and at last `lean`. The first level that fits in no
way ends it, and the one before is the device's level cap.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
from pydantic import BaseModel, ValidationError

from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import BATCH as FEATURE_BATCH
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.samples import Sample
from edge_runtime.engines.base import Batch, MemoryPlan
from edge_runtime.engines.factory import open_engine
from edge_runtime.engines.memory import peak_rss
from edge_runtime.engines.step_graph import default_micro_batch
from edge_runtime.store import DeviceStore
from edge_runtime.training.gate import Gate
from edge_runtime.training.loop import Targets
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.bundle import Bundle, file_sha256
from fedfmsl.protocol.messages import EngineChoice, EngineName, Training

MEMORY_SHARE = 0.5  # of the machine's, where nobody says how much
RESERVE = 32 * 2**20  # what a daemon holds beside what is measured: messages, global experts, results
BATCH = 16  # samples of a step, as the server has it unless it is told otherwise
PASSES = 0  # stands for the passes where levels are numbered from 1


class Measured(BaseModel):
    """One thing that was done, `seconds` for BATCH samples, and the peak memory in bytes until then."""

    level: int
    micro_batch: int
    seconds: float
    peak_rss: int


class Plan(BaseModel):
    """`feature_batch` samples per pass; how each level fits, from level 1 to the level cap, and the `seconds` that a
    step of BATCH samples takes there."""

    feature_batch: int
    memory_plans: dict[int, MemoryPlan]
    seconds: dict[int, float]

    @property
    def level_cap(self) -> int:
        return len(self.memory_plans)


Measure = Callable[
    [int, int, MemoryPlan], Iterator[Measured]
]  # feature batch, first level, how that and the next are tried


class _Question(BaseModel):
    """All that the answer depends on."""

    bundle: str
    engine: EngineName
    threads: int
    memory: int
    step_seconds: float
    largest: int


class _Answered(BaseModel):
    """Kept on disk, so that a device gives the same answer at every start."""

    question: _Question
    plan: Plan


def make_plan(
    bundle: Bundle,
    store: DeviceStore,
    engine: EngineName,
    threads: int,
    largest: tuple[int, Path],
    memory: int | None,
    step_seconds: float,
) -> Plan:
    """`largest` is the extent and the file of the sample that takes most memory to read; `memory`, in bytes, is for all
    that the daemon does.

    Raises ConfigError if not even level 1 fits.
    """
    budget = _budget(memory)
    path = store.root / "plan.json"
    question = _Question(
        bundle=bundle.sha256,
        engine=engine,
        threads=threads,
        memory=budget,
        step_seconds=step_seconds,
        largest=largest[0],
    )
    with contextlib.suppress(OSError, ValidationError):
        kept = _Answered.model_validate_json(path.read_bytes())
        if kept.question == question:
            return kept.plan

    def measure(feature_batch: int, first: int, fit: MemoryPlan) -> Iterator[Measured]:
        return _measured(bundle, engine, threads, largest[1], feature_batch, first, fit)

    plan = plan_within(measure, bundle, budget - RESERVE, step_seconds)
    if not plan.memory_plans:
        raise ConfigError(_refusal(_least(measure), budget, step_seconds))
    write_atomically(path, _Answered(question=question, plan=plan).model_dump_json().encode())
    return plan


def measure_least(
    bundle: Bundle, engine: EngineName, threads: int, sample: Path, memory: int | None, step_seconds: float
) -> tuple[int, float]:
    """Bytes of memory and seconds per step of the least that there is, a round at level 1. Raises ConfigError if it
    does not fit."""
    budget = _budget(memory)
    lines = _least(
        lambda feature_batch, first, fit: _measured(bundle, engine, threads, sample, feature_batch, first, fit)
    )
    if len(lines) < 2 or lines[-1].peak_rss + RESERVE > budget or lines[-1].seconds > step_seconds:
        raise ConfigError(_refusal(lines, budget, step_seconds))
    return lines[-1].peak_rss + RESERVE, lines[-1].seconds


def plan_within(measure: Measure, bundle: Bundle, budget: int, step_seconds: float) -> Plan:
    """The most that fits. A process's peak covers all it has done, so all of it fits, or `measure` is left."""
    levels, dims = bundle.manifest.levels, bundle.manifest.dims
    feature_batch, fit, memory_plans, seconds = (
        FEATURE_BATCH,
        MemoryPlan(BATCH),
        dict[int, MemoryPlan](),
        dict[int, float](),
    )
    while len(memory_plans) < levels:
        todo = PASSES  # what ends the measurement, if the process dies of it without a word
        for line in measure(feature_batch, len(memory_plans) + 1, fit):
            if line.peak_rss > budget:
                break
            if line.level != PASSES:
                if line.seconds > step_seconds:
                    return Plan(feature_batch=feature_batch, memory_plans=memory_plans, seconds=seconds)
                memory_plans[line.level] = MemoryPlan(line.micro_batch, fit.lean)
                seconds[line.level] = line.seconds
            todo = len(memory_plans) + 1
        if todo > levels:
            break
        if todo == PASSES:
            if feature_batch == 1:
                break
            feature_batch //= 2
        elif fit.lean:
            break
        else:
            tried = min(fit.micro_batch, default_micro_batch(dims, todo))
            fit = MemoryPlan(tried // 2) if tried > 1 else MemoryPlan(1, lean=True)
    return Plan(feature_batch=feature_batch, memory_plans=memory_plans, seconds=seconds)


def probe_levels(
    bundle: Bundle, choice: EngineChoice, threads: int, sample: Path, feature_batch: int, first: int, fit: MemoryPlan
) -> Iterator[Measured]:
    """Does what a daemon does: a pass over `feature_batch` times the sample, then each level's prediction and step."""
    with contextlib.suppress(OSError):  # if memory runs out it is this process that has to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    dims, levels, theta = bundle.manifest.dims, bundle.manifest.levels, bundle.initial()[0]
    gate = Gate(bundle, threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(DiskCache(Path(folder), 2**40), bundle, threads, batch_size=feature_batch)
        samples = [Sample(sample, file_sha256(sample), 0)] * feature_batch
        started = time.perf_counter()
        gate.log_weights(bundle.initial()[1], cache.pooled(samples, 1))
        cache.lifted(samples, levels, 1, theta)
        yield _line(PASSES, feature_batch, started)
    memory_plans = {
        k: MemoryPlan(min(fit.micro_batch, default_micro_batch(dims, k)), fit.lean) for k in range(first, levels + 1)
    }
    engine = open_engine(choice, bundle, threads, memory_plans)
    hidden = np.random.default_rng(0).standard_normal((BATCH, dims.tokens, dims.hidden), np.float32)
    for level, each in memory_plans.items():
        size, trainables = each.micro_batch, theta[: bundle.expert.size(level)]
        targets = Targets.cross_entropy(np.zeros(size, np.int64))
        batch = Batch(hidden[:size], targets.labels, targets.gate, targets.other, np.zeros(dims.classes, np.float32))
        engine.load(level)
        engine.set(trainables)
        engine.predict(hidden[:feature_batch])
        engine.set(trainables, Training(epochs=1, learning_rate=1e-3))
        engine.step(batch)
        started = time.perf_counter()
        engine.step(batch)
        yield _line(level, size, started)


def _line(level: int, size: int, started: float) -> Measured:
    seconds = (time.perf_counter() - started) * BATCH / size
    return Measured(level=level, micro_batch=size, seconds=seconds, peak_rss=peak_rss())


def _measured(
    bundle: Bundle, engine: EngineName, threads: int, sample: Path, feature_batch: int, first: int, fit: MemoryPlan
) -> Iterator[Measured]:
    """`probe_levels` in a process of its own, which is ended when nobody wants more lines."""
    options: dict[str, object] = {"bundle": bundle.root, "engine": engine, "threads": threads, "sample": sample}
    options |= {"feature-batch": feature_batch, "first": first, "micro-batch": fit.micro_batch}
    command = [sys.executable, "-m", "edge_runtime", "probe", *(["--lean"] if fit.lean else [])]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            for text in process.stdout or ():
                yield Measured(**json.loads(text))
        finally:
            process.kill()


def _budget(memory: int | None) -> int:
    return memory or int(MEMORY_SHARE * psutil.virtual_memory().total)


def _least(measure: Measure) -> list[Measured]:
    """A pass and a step at level 1 with as little as can be; fewer than two if it ended early."""
    return [line for line, _ in zip(measure(1, 1, MemoryPlan(1, lean=True)), (PASSES, 1), strict=False)]


def _refusal(lines: Sequence[Measured], budget: int, step_seconds: float) -> str:
    """Why nothing fits, from what the least there is takes."""
    if len(lines) < 2:
        return (
            "what a round at level 1 needs could not be measured: it ended early, most likely for want of memory; "
            "take a bundle of a smaller model, or of --precision int8"
        )
    least = lines[-1].peak_rss + RESERVE
    if least > budget:
        return (
            f"a round at level 1 needs {_megabytes(least)}, more than the budget of {budget / 1e6:.0f}MB; "
            f"give it --memory {_megabytes(least)}, or take a bundle of a smaller model, or of --precision int8"
        )
    return (
        f"a step at level 1 takes {lines[-1].seconds:.1f} s, longer than --step-seconds {step_seconds}; "
        "allow more, or take a bundle of a smaller model"
    )


def _megabytes(size: int) -> str:
    """Rounded up, as it may be typed in."""
    return f"{-(-size // 10**7) * 10}MB"
