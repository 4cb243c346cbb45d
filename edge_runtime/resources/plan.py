"""Which levels fit into the device's memory and time, and how to compute them (ours).

The feature pass is measured first, with fewer samples at once until it fits. Then each level is measured, with smaller
micro-batches and finally a `lean` memory plan. The last level that fits is the level cap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from edge_runtime.data.features import BATCH as FEATURE_BATCH
from edge_runtime.engines.base import MemoryPlan
from edge_runtime.engines.memory import usable_memory
from edge_runtime.engines.runtime import onnxruntime
from edge_runtime.engines.sessions import CPU
from edge_runtime.engines.step_graph import default_micro_batch
from edge_runtime.resources.probe import BATCH, FEATURES, Measure, Measurement, ProbeProcess, measured_classes
from edge_runtime.resources.unfinished import UnfinishedWork
from edge_runtime.store import DeviceStore
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import EngineName
from fedfmsl.protocol.task_bundle import TaskBundle

MEMORY_SHARE = 0.5  # of the machine's memory; the default budget
LIMIT_SHARE = 2 / 3  # of the memory that the container or service may use; at most this is the default budget
RESERVE = 32 * 2**20  # bytes for what the probe does not have in memory: messages, globals, results


class Plan(BaseModel):
    """`feature_batch`: samples per feature pass. `memory_plans` and `seconds` have each level from 1 to the level cap:
    how to compute a step, and how long one of BATCH samples takes."""

    feature_batch: int
    memory_plans: dict[int, MemoryPlan]
    seconds: dict[int, float]

    @property
    def level_cap(self) -> int:
        return len(self.memory_plans)


class _Conditions(BaseModel):
    """Everything that a plan depends on."""

    bundle: str
    classes: int
    engine: EngineName
    threads: int
    provider: str
    onnxruntime: str
    memory: int
    step_seconds: float
    largest: int


class _StoredPlan(BaseModel):
    """In STATE/plan.json, so that a device has the same plan after every start."""

    conditions: _Conditions
    plan: Plan


def make_plan(
    bundle: TaskBundle,
    store: DeviceStore,
    engine: EngineName,
    threads: int,
    provider: str,
    largest: tuple[int, Path],
    memory: int | None,
    step_seconds: float,
    heartbeat: Callable[[], None] = lambda: None,
) -> Plan:
    """`largest`: extent and file of the sample that takes most memory to read. `memory`: bytes for the whole daemon,
    by default a share of the machine's. `step_seconds`: the longest allowed step. `heartbeat` is called after each
    measurement, because all of them together may take as long as a watchdog waits.

    Raises ConfigError if level 1 does not fit, RunError if it cannot be measured.
    """
    budget = _budget(memory)
    path = store.root / "plan.json"
    conditions = _Conditions(
        bundle=bundle.sha256,
        classes=measured_classes(bundle),
        engine=engine,
        threads=threads,
        provider=provider,
        onnxruntime=onnxruntime.__version__,
        memory=budget,
        step_seconds=step_seconds,
        largest=largest[0],
    )
    with contextlib.suppress(OSError, ValidationError):
        stored = _StoredPlan.model_validate_json(path.read_bytes())
        if stored.conditions == conditions:
            return stored.plan
    probe = ProbeProcess(bundle, engine, threads, provider, largest[1], store.root)

    def measure(feature_batch: int, first: int, memory_plan: MemoryPlan) -> Iterator[Measurement]:
        for measured in probe(feature_batch, first, memory_plan):
            heartbeat()
            yield measured

    with UnfinishedWork(store.root).counted(provider):
        plan = plan_within(measure, bundle, budget - RESERVE, step_seconds, provider)
        if not plan.memory_plans:
            raise ConfigError(_why_nothing_fits(_measure_minimum(measure), budget, step_seconds))
    # durable, because a measurement that ends starts the count of unfinished work anew
    write_atomically(path, _StoredPlan(conditions=conditions, plan=plan).model_dump_json().encode(), durable=True)
    return plan


def largest_extent(memory: int | None) -> int:
    """Bytes that reading one sample may take: half of the limit `memory`, so that no single file decides what fits."""
    return _budget(memory) // 2


def measure_minimum(
    bundle: TaskBundle,
    engine: EngineName,
    threads: int,
    provider: str,
    sample: Path,
    memory: int | None,
    step_seconds: float,
    scratch: Path,
) -> tuple[int, float]:
    """Bytes of memory and seconds per step that a round at level 1 takes at least. Raises ConfigError if that does not
    fit, RunError if it cannot be measured. Writes into `scratch` only."""
    budget = _budget(memory)
    measurements = _measure_minimum(ProbeProcess(bundle, engine, threads, provider, sample, scratch))
    last = measurements[-1] if len(measurements) == 2 else None
    if last is None or last.peak_rss + RESERVE > budget or last.seconds > step_seconds:
        raise ConfigError(_why_nothing_fits(measurements, budget, step_seconds))
    return last.peak_rss + RESERVE, last.seconds


def plan_within(measure: Measure, bundle: TaskBundle, budget: int, step_seconds: float, provider: str = CPU) -> Plan:
    """The plan with the highest level cap within `budget` bytes.

    A measurement's peak memory covers all earlier ones of its process, so everything up to it fits together.
    """
    levels, dims = bundle.manifest.levels, bundle.manifest.dims
    feature_batch, memory_plan = FEATURE_BATCH, MemoryPlan(BATCH)
    plans, seconds = dict[int, MemoryPlan](), dict[int, float]()
    while len(plans) < levels:
        failed = FEATURES  # what does not fit, also if the process runs out of memory
        for measured in measure(feature_batch, len(plans) + 1, memory_plan):
            if measured.peak_rss > budget:
                break
            if measured.level != FEATURES:
                if measured.seconds > step_seconds:
                    return Plan(feature_batch=feature_batch, memory_plans=plans, seconds=seconds)
                plans[measured.level] = MemoryPlan(measured.micro_batch, memory_plan.lean)
                seconds[measured.level] = measured.seconds
            failed = len(plans) + 1
        if failed > levels:
            break
        if failed == FEATURES:
            if feature_batch == 1:
                break
            feature_batch //= 2
        elif memory_plan.lean:
            break
        else:
            tried = min(memory_plan.micro_batch, default_micro_batch(dims, failed, provider))
            memory_plan = MemoryPlan(tried // 2) if tried > 1 else MemoryPlan(1, lean=True)
    return Plan(feature_batch=feature_batch, memory_plans=plans, seconds=seconds)


def _budget(memory: int | None) -> int:
    return memory or int(min(MEMORY_SHARE * psutil.virtual_memory().total, LIMIT_SHARE * usable_memory()))


def _measure_minimum(measure: Measure) -> list[Measurement]:
    """A feature pass and a step at level 1 with the least memory; fewer than two if the process died."""
    return [measured for measured, _ in zip(measure(1, 1, MemoryPlan(1, lean=True)), (FEATURES, 1), strict=False)]


def _why_nothing_fits(minimum: Sequence[Measurement], budget: int, step_seconds: float) -> str:
    if len(minimum) < 2:
        return (
            "what a round at level 1 needs could not be measured: memory ran out before its end; use a bundle of a "
            "smaller model, or one built with --precision int8"
        )
    least = minimum[-1].peak_rss + RESERVE
    if least > budget:
        return (
            f"a round at level 1 needs {_megabytes(least)}, more than the budget of {budget / 1e6:.0f}MB; set --memory "
            f"{_megabytes(least)}, or use a bundle of a smaller model, or one built with --precision int8"
        )
    return (
        f"a step at level 1 takes {minimum[-1].seconds:.1f} s, longer than --step-seconds {step_seconds}; "
        "raise it, or use a bundle of a smaller model"
    )


def _megabytes(size: int) -> str:
    """Rounded up, as --memory takes it."""
    return f"{-(-size // 10**7) * 10}MB"
