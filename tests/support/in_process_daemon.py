"""A daemon in the test's process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.daemon.announce import Announcer, device_link
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.loop import DaemonLoop
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.daemon.timing import DEFAULT_TIMING, Timing
from edge_runtime.daemon.worker import Worker, progress_poster
from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.folder import SampleFolder
from edge_runtime.engines.base import MemoryPlan
from edge_runtime.engines.factory import open_engine
from edge_runtime.resources.governor import Governor, Limits, Readings
from edge_runtime.resources.level_cap import LevelCap
from edge_runtime.resources.plan import Plan
from edge_runtime.resources.probe import BATCH
from edge_runtime.resources.throttle import ControlledEngine, LevelCapTracker, StepControl, reported_and_checked
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import DeviceContext
from edge_runtime.training.gate import Gate
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link
from support.bundles import Built

RUN = "r"
NOWHERE = "mqtt://127.0.0.1:9"
LEVEL_CAP = 2
LIMITS = Limits()


@dataclass(frozen=True)
class InProcessDaemon:
    """A daemon as `python -m edge_runtime run` makes one. Its link is not connected."""

    device: DeviceContext
    runner: RoundRunner
    loop: DaemonLoop
    link: Link

    def connect_and_serve(self) -> bool:
        self.link.connect()
        return self.loop.serve()


def make_daemon(
    built: Built,
    photos: Path,
    folder: Path,
    name: str = "d",
    broker: str = NOWHERE,
    run: str = RUN,
    limits: Limits = LIMITS,
    read: Callable[[], Readings] = Readings,
    timing: Timing = DEFAULT_TIMING,
    runner_type: type[RoundRunner] = RoundRunner,
) -> InProcessDaemon:
    """`read` stands for the device's sensors."""
    bundle, store, topics = built.bundle, DeviceStore(folder), Topics(run)
    levels = range(1, LEVEL_CAP + 1)
    plan = Plan(
        feature_batch=4, memory_plans=dict.fromkeys(levels, MemoryPlan(BATCH)), seconds=dict.fromkeys(levels, 1.0)
    )
    name = store.ensure_name(name)
    link = device_link(broker, topics, name)
    control, tracker = StepControl(), LevelCapTracker(LevelCap.planned(plan, step_seconds=60.0))
    report = reported_and_checked(progress_poster(link.post) if broker != NOWHERE else no_report, control.check)
    samples = SampleFolder(photos, bundle, store, run=run)
    device = DeviceContext(
        device_name=name,
        bundle=bundle,
        scanned=samples.scan(wait=3.0),
        cache=FeatureCache(DiskCache(store.cache, 2**30), bundle, 1, report),
        engine=ControlledEngine(open_engine("step-graph", bundle, 1), control, tracker),
        gate=Gate(bundle, 1),
        store=store,
        level_cap=LEVEL_CAP,
        report=report,
    )
    runner = runner_type(device, samples, control, tracker, no_report)
    health = HealthReporter(link, topics, name, store, read, timing.health)
    governor, worker = Governor(limits, read), Worker(control, link.post)
    loop = DaemonLoop(topics, link, Announcer(link, topics, name), health, governor, runner, worker, timing=timing)
    return InProcessDaemon(device, runner, loop, link)


def no_report(activity: str, done: int, total: int) -> None:
    """Progress that nothing receives: without a loop, posted events would fill the link's queue."""
