"""A daemon within the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_runtime.daemon.announce import device_link
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.loop import Service
from edge_runtime.daemon.timing import DEFAULT_TIMING, Timing
from edge_runtime.daemon.worker import Worker
from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.folder import SampleFolder
from edge_runtime.engines.base import MemoryPlan
from edge_runtime.engines.factory import open_engine
from edge_runtime.resources.governor import Limits, Readings
from edge_runtime.resources.level_cap import LevelCap
from edge_runtime.resources.probe import BATCH, Plan
from edge_runtime.resources.throttle import Pace, PacedEngine
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.gate import Gate
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link
from support.bundles import Built

RUN = "r"
NOWHERE = "mqtt://127.0.0.1:9"
LEVEL_CAP = 2
LIMITS = Limits()


class Nobody:
    """Hosts a pace before the service does."""

    def progress(self, activity: str, done: int, total: int) -> None: ...

    def pause(self, reason: str) -> None: ...


def started(
    built: Built,
    photos: Path,
    folder: Path,
    name: str = "d",
    broker: str = NOWHERE,
    run: str = RUN,
    limits: Limits = LIMITS,
    read: Callable[[], Readings] = Readings,
    timing: Timing = DEFAULT_TIMING,
) -> tuple[TrainingContext, Service, Link]:
    """A daemon as `python -m edge_runtime run` makes one, before it talks to anybody; its link is not connected. `read`
    stands for its sensors."""
    bundle = built.bundle
    store = DeviceStore(folder)
    levels = range(1, LEVEL_CAP + 1)
    plan = Plan(
        feature_batch=4, memory_plans=dict.fromkeys(levels, MemoryPlan(BATCH)), seconds=dict.fromkeys(levels, 1.0)
    )
    pace = Pace(limits, read, LevelCap.planned(plan, step_seconds=60.0), Nobody())
    samples = SampleFolder(photos, bundle, store)
    device = TrainingContext(
        device_name=store.identity(name),
        bundle=bundle,
        scanned=samples.scan(wait=3.0),
        cache=FeatureCache(DiskCache(store.cache, 2**30), bundle, 1, pace),
        engine=PacedEngine(open_engine("step-graph", bundle, 1), pace),
        gate=Gate(bundle, 1),
        store=store,
        level_cap=LEVEL_CAP,
        report=pace,
    )
    link = device_link(broker, Topics(run), device.device_name)
    health_reporter = HealthReporter(link, Topics(run), device.device_name, store, read)
    return device, Service(Worker(device, samples, pace), run, link, health_reporter, timing=timing), link
